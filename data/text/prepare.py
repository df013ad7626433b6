"""Any text: .txt, .jsonl, .jsonl.gz, .jsonl.xz files, or folders of them."""

import gzip
import json
import lzma
import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.prepare import prepare_as_told, read_command_line
from runtime.errors import fail

OPENERS = {".txt": open, ".jsonl": open, ".jsonl.gz": gzip.open, ".jsonl.xz": lzma.open}
PIECE_CHARACTERS = 200_000  # a longer .txt file is cut into documents of about this size, at a blank line


def kind_of(path: Path) -> str | None:
    return next((kind for kind in OPENERS if path.name.endswith(kind)), None)


def documents(arguments):
    for given in arguments.inputs:
        paths = sorted(p for p in given.rglob("*") if kind_of(p)) if given.is_dir() else [given]
        if not given.exists() or not paths or not kind_of(paths[0]):
            fail(f"{given} is no {', '.join(OPENERS)} file and no folder that holds one")
        for path in paths:
            try:
                with OPENERS[kind_of(path)](path, "rt", encoding="utf-8", errors="replace") as file:
                    yield from pieces(file) if path.suffix == ".txt" else json_lines(file, path, arguments.text_key)
            except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
                fail(f"{path} cannot be read: {error}")


def json_lines(file, path: Path, text_key: str):
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[text_key]
        except (ValueError, KeyError, TypeError, RecursionError):
            fail(f"{path}, line {number}: no JSON object with {text_key!r}; name the text's field with --text_key")
        if not isinstance(text, str):
            fail(f"{path}, line {number}: {text_key!r} is no string")
        yield text


def pieces(file):
    lines, size = [], 0
    for line in file:
        lines.append(line)
        size += len(line)
        if size >= PIECE_CHARACTERS and not line.strip():
            yield "".join(lines)
            lines, size = [], 0
    if lines:
        yield "".join(lines)


def add_arguments(parser):
    parser.add_argument("inputs", nargs="+", type=Path, help="files or folders")
    parser.add_argument("--text_key", default="text", help="field of a JSON line that holds the text (default: %(default)s)")


if __name__ == "__main__":
    arguments = read_command_line(__doc__, Path(__file__).parent, add_arguments)
    prepare_as_told(arguments, documents(arguments), source=" ".join(map(str, arguments.inputs)))
