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
    """Sources of the standard library without its tests, in the order of their paths."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    for path in sorted(stdlib.rglob("*.py")):
        if not LEFT_OUT & set(path.relative_to(stdlib).parts):
            yield path.read_text(encoding="utf-8", errors="replace")


def main():
    prepare(documents(), FOLDER, str(FOLDER / VOCABULARY_FILE), source="Python standard library", val_fraction=0.05)


if __name__ == "__main__":
    main()
