"""The Python sources every machine has, cut by the project's own 4,096 tokens: no network, ready in seconds.

`train.py` prepares it by itself on first use.
"""

import sys
import sysconfig
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))
from data.prepare import VOCABULARY_FILE, prepare

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}


def documents():
    """Sources of the standard library without its tests, in the order of their paths, cut at top-level definitions
    into documents of about what a short context holds: so validation sees all kinds of module."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    for path in sorted(stdlib.rglob("*.py")):
        if not LEFT_OUT & set(path.relative_to(stdlib).parts):
            yield from cut(path.read_text(encoding="utf-8", errors="replace"))


def cut(source: str, characters: int = 2_000):
    lines, size = [], 0
    for line in source.splitlines(keepends=True):
        if size >= characters and line.startswith(("def ", "class ", "async def ", "@")):
            yield "".join(lines)
            lines, size = [], 0
        lines.append(line)
        size += len(line)
    if lines:
        yield "".join(lines)


def main():
    prepare(documents(), FOLDER, str(FOLDER / VOCABULARY_FILE), source="Python standard library", val_fraction=0.05)


if __name__ == "__main__":
    main()
