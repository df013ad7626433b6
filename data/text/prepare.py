"""Any text: .txt, .jsonl, .jsonl.gz, .jsonl.xz files, or folders of them."""

import codecs
import gzip
import io
import json
import lzma
import os
import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.prepare import prepare_as_told, read_command_line
from runtime.errors import fail

OPENERS = {".txt": open, ".jsonl": open, ".jsonl.gz": gzip.open, ".jsonl.xz": lzma.open}
PIECE_CHARACTERS = 200_000  # a longer .txt file is cut into documents of about this size, at a blank line
# The first bytes by which a file says how it is encoded.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip


def kind_of(path: Path) -> str | None:
    return next((kind for kind in OPENERS if path.name.endswith(kind)), None)


def files_of(inputs: list[Path]):
    """The files to read, each once: those that are named, and those in folders that are named, without hidden ones."""
    seen = set()
    for given in inputs:
        found = sorted(files_in(given)) if given.is_dir() else [given]
        if not given.exists() or not found or not kind_of(found[0]):
            fail(f"{given} is neither a {', '.join(OPENERS)} file nor a folder that holds one")
        for path in found:
            if path.resolve() in seen:
                warn(f"{path} was read before, by this name or another: left out")
                continue
            seen.add(path.resolve())
            yield path


def files_in(given: Path):
    """Files below a folder, without hidden ones (editors' copies) and links to folders (they may form a circle)."""
    for folder, subfolders, names in os.walk(given, onerror=lambda error: fail(f"{error.filename} cannot be read: {error.strerror}")):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in subfolders:
            if Path(folder, name).is_symlink():
                warn(f"{Path(folder, name)} is a link to a folder: left out; name that folder too if you want it")
        yield from (Path(folder, name) for name in names if kind_of(Path(name)) and not name.startswith("."))


def documents(arguments):
    n_files, empty = 0, []
    for n_files, path in enumerate(files_of(arguments.inputs), 1):
        try:
            texts = texts_of(path, arguments)
            first = next(texts, None)
            if first is None:
                empty.append(path)
            else:
                yield first
                yield from texts
        except (OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeError) as error:
            fail(f"{path} cannot be read: {error}")
    if len(empty) == n_files:
        fail(f"there is nothing to prepare: {', '.join(map(str, empty))} {'is' if n_files == 1 else 'are'} empty")
    for path in empty:
        warn(f"{path} is empty")


def texts_of(path: Path, arguments):
    """The texts of one file. What cannot be decoded becomes U+FFFD, and is counted and said; or it ends the program."""
    with OPENERS[kind_of(path)](path, "rb") as binary:
        binary = io.BufferedReader(binary)
        encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if binary.peek(4).startswith(mark)), arguments.encoding)
        undecodable = 0

        def replace(error: UnicodeError) -> tuple[str, int]:
            nonlocal undecodable
            if arguments.undecodable == "refuse":
                fail(f"{path} is not {encoding} ({error.reason}, {error.object[error.start : error.end]!r}): give its --encoding")
            undecodable += 1
            return "\ufffd", error.end

        codecs.register_error("nanoOEC", replace)
        n_zeros = 0
        file = io.TextIOWrapper(binary, encoding, errors="nanoOEC")
        try:
            for text in pieces(file) if path.suffix == ".txt" else json_lines(file, path, arguments.text_key):
                n_zeros += text.count("\0")
                yield text
        finally:  # also where --max_tokens ends it
            if undecodable:
                warn(f"{path}: {undecodable:,} places are not {encoding} and became U+FFFD; give its --encoding, or --undecodable=refuse")
            if n_zeros:
                warn(f"{path} holds {n_zeros:,} NUL characters: if that is not text, give its --encoding (utf-16-le?)")


def warn(message: str):
    print(message, file=sys.stderr, flush=True)


def json_lines(file, path: Path, text_key: str):
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[text_key]
        except (ValueError, KeyError, TypeError, RecursionError):
            fail(f"{path}, line {number}: no JSON object with {text_key!r}; name the text's field with --text_key")
        if not isinstance(text, str):
            fail(f"{path}, line {number}: {text_key!r} is not a string")
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


def encoding_name(name: str) -> str:
    try:
        io.TextIOWrapper(io.BytesIO(), name)
        return name
    except LookupError:
        fail(f"Python does not know --encoding={name!r}: give utf-8, utf-16-le, latin-1 or another of its names")


def add_arguments(parser):
    parser.add_argument("inputs", nargs="+", type=Path, help="files or folders")
    parser.add_argument("--encoding", type=encoding_name, default="utf-8", help="of files without a byte order mark (default: %(default)s)")
    parser.add_argument("--undecodable", choices=("replace", "refuse"), default="replace", help="what to do with bytes that are not in the encoding: write U+FFFD, or stop (default: %(default)s)")
    parser.add_argument("--text_key", default="text", help="field of a JSON line that holds the text (default: %(default)s)")


if __name__ == "__main__":
    arguments = read_command_line(__doc__, Path(__file__).parent, add_arguments)
    # The record holds the settings that change the text, so that a preparation is not resumed with others.
    reading = {"encoding": "utf-8", "undecodable": "replace", "text_key": "text"}
    changed = [f"--{name}={getattr(arguments, name)}" for name, usual in reading.items() if getattr(arguments, name) != usual]
    prepare_as_told(arguments, documents(arguments), source=" ".join([*map(str, arguments.inputs), *changed]))
