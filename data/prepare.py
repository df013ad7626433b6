"""Documents to token shards: what every `data/NAME/prepare.py` calls."""

import argparse
import base64
import hashlib
import math
import os
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import islice
from pathlib import Path

import numpy as np
import tiktoken

from data.partial import check_space, finish, move_in, partial_folder, read_record, write_json
from data.shards import HEADER_INTS, open_shard, shard_header, split_files
from runtime.errors import fail

# How text is cut into words before byte pairs are merged; a .tiktoken file does not say. GPT-2's, by OpenAI.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
END_OF_TEXT = "<|endoftext|>"
SMALL_VAL_FRACTION = 0.1  # least validation share of a text that has too few documents to split by
BYTES = "bytes"  # the tokenizer without a vocabulary: a token for each byte


def load_tokenizer(name: str, folder: Path = Path()) -> tiktoken.Encoding:
    """A tiktoken encoding by name, or from a `.tiktoken` file (relative to `folder`), or the 256 bytes; in the last two the
    last id is end-of-text."""
    if name == BYTES:
        ranks = {bytes([byte]): byte for byte in range(256)}
        return tiktoken.Encoding(BYTES, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 256})
    if not name.endswith(".tiktoken"):
        if name not in tiktoken.list_encoding_names():
            fail(f"no tokenizer {name!r}: give one of {', '.join(tiktoken.list_encoding_names())}, {BYTES}, or a .tiktoken file")
        try:
            return tiktoken.get_encoding(name)
        except (OSError, ValueError) as error:
            fail(f"the vocabulary of {name!r} cannot be fetched ({type(error).__name__}): set TIKTOKEN_CACHE_DIR to a copy, or use --tokenizer=bytes")
    path = folder / name
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line.strip()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([b]) not in ranks for b in range(256)):
            raise ValueError("ranks must run from 0 without a gap and every single byte must be there")
    except (OSError, ValueError) as error:
        fail(f"{path} is not a usable .tiktoken file: {error}")
    return tiktoken.Encoding(path.stem, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)})


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class ShardWriter:
    """Writes one split's tokens into `split_000000.bin`, `split_000001.bin`, … of `shard_tokens` each. The first
    `n_tokens` are already written. A shard that is not full is shorter than its header says, so that no reader takes it."""

    def __init__(self, folder: Path, split: str, shard_tokens: int, vocab_size: int, n_tokens: int):
        self.folder, self.split, self.shard_tokens, self.vocab_size = folder, split, shard_tokens, vocab_size
        self.n_tokens, self.token_type, self.file = n_tokens, shard_header(0, vocab_size)[1], None
        kept = [self._path(shard) for shard in range(-(-n_tokens // shard_tokens))]
        for path in set(folder.glob(f"{split}_*.bin")) - set(kept):
            path.unlink()  # newer than the record
        for path in kept[: n_tokens // shard_tokens]:
            open_shard(path)  # whole, or the program ends
        if in_last := n_tokens % shard_tokens:
            size = 4 * HEADER_INTS + in_last * np.dtype(self.token_type).itemsize
            if not kept[-1].is_file() or kept[-1].stat().st_size < size:
                fail(f"{kept[-1]} is not what the record says: delete {folder} to start again")
            self.file = open(kept[-1], "r+b")
            self.file.truncate(size)
            self.file.seek(size)

    def _path(self, shard: int) -> Path:
        return self.folder / f"{self.split}_{shard:06d}.bin"

    def write(self, tokens: np.ndarray):
        tokens = tokens.astype(self.token_type)
        while len(tokens):
            n_full, in_last = divmod(self.n_tokens, self.shard_tokens)
            if not in_last:
                self.file = open(self._path(n_full), "wb")
                self.file.write(shard_header(self.shard_tokens, self.vocab_size)[0])
            written = tokens[: self.shard_tokens - in_last]
            self.file.write(written)
            self.n_tokens, tokens = self.n_tokens + len(written), tokens[len(written) :]
            if self.n_tokens % self.shard_tokens == 0:
                self._close()

    def sync(self):
        if self.file:
            self.file.flush()
            os.fsync(self.file.fileno())

    def _close(self):
        self.sync()
        self.file.close()
        self.file = None

    def finish(self):
        """The last shard, which is not full, gets the header of its length."""
        if self.file:
            self.file.seek(0)
            self.file.write(shard_header(self.n_tokens % self.shard_tokens, self.vocab_size)[0])
            self._close()


def prepare(
    documents, out: Path, tokenizer: str, *, source: str, shard_tokens: int = 100_000_000, val_fraction: float = 0.005,
    max_tokens: int | None = None, expected_tokens: int | None = None,
):  # fmt: skip
    """Tokenise an iterable of strings into `out`: shards, then `meta.json`. Each document starts with end-of-text.

    A document is validation when the hash of its text says so: the split depends on neither order nor machine.
    Everything is written into `out/.partial` first and moved in at the end, so a killed preparation leaves nothing behind
    that looks finished, and the same call resumes from its last record, with the same bytes at the end. Ends the program
    (exit 2) rather than overwrite shards that are there. `expected_tokens` serves only to check the disk space and to estimate
    the time left.
    """
    with partial_folder(out) as partial:
        if (partial / "meta.json").exists():  # whole, and killed while it was moved in
            return move_in(partial, out)
        encoding = load_tokenizer(tokenizer)
        vocabulary = _hash(Path(tokenizer).read_text()).hex() if tokenizer.endswith(".tiktoken") else tokenizer
        command = {
            "source": source, "tokenizer": tokenizer, "vocabulary": vocabulary, "shard_tokens": shard_tokens,
            "val_fraction": val_fraction, "max_tokens": max_tokens,
        }  # fmt: skip
        record = read_record(partial, command)
        expected_tokens = min(filter(None, (max_tokens, expected_tokens)), default=0)
        check_space(partial, expected_tokens - record["train"] - record["val"], encoding.n_vocab)
        train, val = (ShardWriter(partial, split, shard_tokens, encoding.n_vocab, record[split]) for split in ("train", "val"))
        groups = _groups(documents, _documents_after(record, documents, partial))
        _write(_encoded(groups, encoding), train, val, partial, record, expected_tokens)
        train.finish()
        val.finish()
        if not val.n_tokens or not train.n_tokens:
            (partial / "record.json").unlink(missing_ok=True)  # what follows cannot be resumed
            _split_tail(partial, max(val_fraction, SMALL_VAL_FRACTION), shard_tokens, encoding.n_vocab, source)
        finish(partial, out, tokenizer, encoding.n_vocab, source)


def _split_tail(partial: Path, val_fraction: float, shard_tokens: int, vocab_size: int, source: str):
    """A text of so few documents that one split has none: the tail of its tokens becomes the validation split."""
    paths = split_files(partial, "train") + split_files(partial, "val")
    tokens = np.concatenate([np.zeros(0, np.uint32), *map(open_shard, paths)])
    n_val = math.ceil(val_fraction * len(tokens))
    if n_val == len(tokens):
        fail(f"{source} holds {len(tokens)} tokens, too few to train on (or --max_tokens is too low)")
    for path in paths:
        path.unlink()
    for split, part in {"train": tokens[:-n_val], "val": tokens[-n_val:]}.items():
        writer = ShardWriter(partial, split, shard_tokens, vocab_size, 0)
        writer.write(part)
        writer.finish()
    print(f"too few documents for a split by documents: the last {n_val:,} tokens are for validation", file=sys.stderr)


def _documents_after(record: dict, documents, partial: Path):
    """What follows the documents on record. A source that tells its position (`state_dict`) goes there at once; another is
    read again, which shows whether it is still the same."""
    n_documents = record["documents"]
    if n_documents:
        print(f"resuming after {n_documents:,} documents, {record['train'] + record['val']:,} tokens", file=sys.stderr)
    if record["position"] is not None:
        documents.load_state_dict(record["position"])
        return iter(documents)
    rest, digest = iter(documents), ""
    for number, text in enumerate(islice(rest, n_documents), 1):
        digest = _chain(digest, _hash(text))
        if number % 10_000 == 0:
            print(f"\r{number:,} documents read again", end="", file=sys.stderr, flush=True)
    if digest != record["digest"]:
        fail(f"the first {n_documents:,} documents are no longer those in {partial}: restore them, or delete that folder")
    return rest


def _groups(documents, rest, characters: int = 200_000):
    """Yields lists of documents, about `characters` long together (worth a thread's task), each with where the source stands
    after it."""
    state_dict = getattr(documents, "state_dict", lambda: None)
    group, size = [], 0
    for text in rest:
        group.append(text)
        size += len(text)
        if size >= characters:
            yield group, state_dict()
            group, size = [], 0
    if group:
        yield group, state_dict()


def _encoded(groups, encoding: tiktoken.Encoding):
    """Yields for each group, in order, (hash, tokens) of its documents, and where the source stands after the group. All cores
    encode, since tiktoken releases Python's lock; a bounded number of groups is in memory."""

    def encode(texts: list[str]) -> list[tuple[bytes, np.ndarray]]:
        return [(_hash(text), _with_end_of_text(encoding, text)) for text in texts]

    cores = available_cores()
    in_flight = deque()
    with ThreadPoolExecutor(cores) as pool:
        for texts, position in groups:
            in_flight.append((pool.submit(encode, texts), position))
            if len(in_flight) > 4 * cores:
                encoded, position = in_flight.popleft()
                yield encoded.result(), position
        while in_flight:
            encoded, position = in_flight.popleft()
            yield encoded.result(), position


def _write(groups, train: ShardWriter, val: ShardWriter, partial: Path, record: dict, expected_tokens: int):
    """Encoded groups into the shards; a record when a shard is full, and every ten seconds."""
    max_tokens, val_fraction = record["command"]["max_tokens"] or math.inf, record["command"]["val_fraction"]
    start = last_report = last_record = time.monotonic()
    n_before = n_tokens = train.n_tokens + val.n_tokens

    def report(end: str = ""):
        rate = (n_tokens - n_before) / (time.monotonic() - start)
        left = max(0, expected_tokens - n_tokens) / rate if rate and not end else 0
        text = f"\r{record['documents']:,} documents, {n_tokens:,} tokens, {rate:,.0f} tokens/s"
        print(text + f", {timedelta(seconds=round(left))} left " * (left > 0), end=end, file=sys.stderr, flush=True)

    for encoded, position in groups:
        for text_hash, tokens in encoded:
            if n_tokens + len(tokens) > max_tokens:
                return report(end="\n")
            is_val = int.from_bytes(text_hash, "little") < val_fraction * 2**64
            (val if is_val else train).write(tokens)
            n_tokens += len(tokens)
            record["documents"], record["digest"] = record["documents"] + 1, _chain(record["digest"], text_hash)
        now = time.monotonic()
        if now - last_report > 1:
            last_report = now
            report()
        full = any(x.n_tokens // x.shard_tokens > record[x.split] // x.shard_tokens for x in (train, val))
        if full or now - last_record > 10:
            last_record = now
            train.sync()
            val.sync()
            record |= {"position": position, "train": train.n_tokens, "val": val.n_tokens}
            write_json(partial / "record.json", record)
    report(end="\n")


def _with_end_of_text(encoding: tiktoken.Encoding, text: str) -> np.ndarray:
    text = text.encode("utf-8", errors="replace").decode()  # a lone surrogate is not text
    return np.concatenate((np.array([encoding.eot_token], np.uint32), _encode(encoding, text)))


def _encode(encoding: tiktoken.Encoding, text: str) -> np.ndarray:
    """The ids of a text. tiktoken's pattern cannot match very long runs of spaces: such a text is encoded in pieces, cut
    between a letter and a space, where words are cut anyway, or in the middle where there is no such place."""
    try:
        return encoding.encode_to_numpy(text, disallowed_special=())
    except ValueError:
        if len(text) < 1000:
            raise
    middle = len(text) // 2
    at = next((at for at in range(middle, len(text) - 1) if text[at - 1].isalnum() and text[at].isspace()), middle)
    return np.concatenate((_encode(encoding, text[:at]), _encode(encoding, text[at:])))


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", errors="replace"), digest_size=8).digest()


def _chain(digest: str, text_hash: bytes) -> str:
    return hashlib.blake2b(digest.encode() + text_hash, digest_size=8).hexdigest()


def read_command_line(description: str, default_out: Path, add_arguments) -> argparse.Namespace:
    """The command line that every prepare.py shares."""
    parser = argparse.ArgumentParser(description=description + " The same command resumes a preparation that was stopped.")
    add_arguments(parser)
    parser.add_argument("--out", type=Path, default=default_out, help="folder for the shards (default: %(default)s)")
    parser.add_argument("--tokenizer", default="gpt2", help="tiktoken encoding, bytes, or a .tiktoken file (default: %(default)s)")
    parser.add_argument("--shard_tokens", type=int, default=100_000_000, help="tokens in a shard (default: %(default)s)")
    parser.add_argument("--val_fraction", type=float, default=0.005, help="share of documents for validation (default: %(default)s)")
    parser.add_argument("--max_tokens", type=int, help="the first documents, with at most so many tokens (default: all)")
    arguments = parser.parse_args()
    if not 0 < arguments.shard_tokens < 2**31 or not 0 < arguments.val_fraction < 1:
        fail("--shard_tokens must be at least 1 and below 2**31, --val_fraction between 0 and 1")
    if arguments.max_tokens is not None and arguments.max_tokens < 1:
        fail("--max_tokens must be at least 1")
    return arguments


def prepare_as_told(arguments: argparse.Namespace, documents, source: str, expected_tokens: int | None = None):
    options = {name: getattr(arguments, name) for name in ("shard_tokens", "val_fraction", "max_tokens")}
    try:
        prepare(documents, arguments.out, arguments.tokenizer, source=source, expected_tokens=expected_tokens, **options)
    except KeyboardInterrupt:
        fail("stopped; run the same command again to resume")
