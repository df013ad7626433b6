"""The Python sources every machine has, in the project's own vocabulary of 4,096 tokens: no network, ready in seconds.

`train.py` prepares it by itself on first use.
"""

import argparse
import sys
import sysconfig
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))
from data.partial import VOCABULARY_FILE
from data.prepare import prepare

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}


def documents():
    """Sources of the standard library without its tests, in the order of their paths, each cut into documents."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    for path in sorted(stdlib.rglob("*.py")):
        if not LEFT_OUT & set(path.relative_to(stdlib).parts):
            yield from cut(path.read_text(encoding="utf-8", errors="replace"))


def cut(source: str, at_definition: int = 2_000, anywhere: int = 4_000):
    """Cuts at the first top-level definition after `at_definition` characters, or at the first line after `anywhere` characters.

    Documents of about one size make the validation split a fair sample: whole files would put the long tables of
    character encodings, a seventh of all text and easy to predict, into the train split alone.
    """
    lines, size = [], 0
    for line in source.splitlines(keepends=True):
        is_definition = line.startswith(("def ", "class ", "async def ", "@"))
        if size >= (at_definition if is_definition else anywhere):
            yield "".join(lines)
            lines, size = [], 0
        lines.append(line)
        size += len(line)
    if lines:
        yield "".join(lines)


def main():
    print("preparing the built-in dataset", flush=True)
    prepare(documents(), FOLDER, str(FOLDER / VOCABULARY_FILE), source="Python standard library", val_fraction=0.05)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
