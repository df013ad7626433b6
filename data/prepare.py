"""Documents to token shards: what every `data/NAME/prepare.py` calls."""

import argparse
import base64
import hashlib
import json
import os
import shutil
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken

from data.shards import available_cores, fail, shard_header

# How text is cut into words before byte pairs are merged; a .tiktoken file does not say. GPT-2's, by OpenAI.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
END_OF_TEXT = "<|endoftext|>"
VOCABULARY_FILE = "vocabulary.tiktoken"


def load_tokenizer(name: str, folder: Path = Path()) -> tiktoken.Encoding:
    """A tiktoken encoding by name, or from a `.tiktoken` file (relative to `folder`), whose last id is end-of-text."""
    if not name.endswith(".tiktoken"):
        if name not in tiktoken.list_encoding_names():
            fail(f"no tokenizer {name!r}: give one of {', '.join(tiktoken.list_encoding_names())}, or a .tiktoken file")
        try:
            return tiktoken.get_encoding(name)
        except (OSError, ValueError) as error:
            fail(f"the vocabulary of {name!r} cannot be fetched ({type(error).__name__}): set TIKTOKEN_CACHE_DIR to a copy")
    path = folder / name
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line.strip()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([b]) not in ranks for b in range(256)):
            raise ValueError("ranks must run from 0 without a gap and every single byte must be there")
    except (OSError, ValueError) as error:
        fail(f"{path} is no usable .tiktoken file: {error}")
    return tiktoken.Encoding(path.stem, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)})


class ShardWriter:
    """Writes one split's tokens into `split_000000.bin`, `split_000001.bin`, … of at most `shard_tokens` each."""

    def __init__(self, folder: Path, split: str, shard_tokens: int, vocab_size: int):
        self.folder, self.split, self.shard_tokens, self.vocab_size = folder, split, shard_tokens, vocab_size
        self.token_type = shard_header(0, vocab_size)[1]
        self.counts = np.zeros(vocab_size, dtype=np.int64)  # how often each token came
        self.pending, self.n_pending, self.n_shards = [], 0, 0

    def write(self, tokens: np.ndarray):
        self.counts += np.bincount(tokens, minlength=self.vocab_size)
        self.pending.append(tokens.astype(self.token_type))
        self.n_pending += len(tokens)
        while self.n_pending >= self.shard_tokens:
            self._flush(self.shard_tokens)

    def _flush(self, n_tokens: int):
        tokens = np.concatenate(self.pending)
        shard, rest = tokens[:n_tokens], tokens[n_tokens:]
        with open(self.folder / f"{self.split}_{self.n_shards:06d}.bin", "wb") as file:
            file.write(shard_header(len(shard), self.vocab_size)[0].tobytes())
            file.write(shard.tobytes())
        self.pending, self.n_pending, self.n_shards = [rest], len(rest), self.n_shards + 1

    def close(self):
        if self.n_pending:
            self._flush(self.n_pending)

    def unigram_entropy(self) -> float:
        """−Σ p ln p of the token frequencies, nats: the loss of a model that knows frequencies and nothing else."""
        p = self.counts[self.counts > 0] / self.counts.sum()
        return float(-(p * np.log(p)).sum())


def prepare(documents, out: Path, tokenizer: str, *, source: str, shard_tokens: int = 100_000_000, val_fraction: float = 0.005):
    """Tokenise an iterable of strings into `out`: shards, then `meta.json`. Each document starts with end-of-text.

    A document is validation when the hash of its text says so: the split depends on neither order nor machine.
    Everything is written beside `out` first and moved in at the end, so a killed preparation leaves nothing behind
    that looks finished. Ends the program (exit 2) rather than overwrite shards that are there.
    """
    partial = out / ".partial"
    try:
        if (partial / "meta.json").exists():  # whole, and killed while it was moved in
            return _move_in(partial, out)
        if list(out.glob("*.bin")):
            fail(f"{out} already holds shards: choose another --out, or delete them first")
        encoding = load_tokenizer(tokenizer)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        train, val = (ShardWriter(partial, split, shard_tokens, encoding.n_vocab) for split in ("train", "val"))
        _tokenise(documents, encoding, train, val, val_fraction)
        if not val.counts.any() or not train.counts.any():
            missing = "train" if val.counts.any() else "val"
            fail(f"no document of {source} fell into the {missing} split: change --val_fraction={val_fraction}")
        meta = {
            "tokenizer": tokenizer,
            "vocab_size": encoding.n_vocab,
            "source": source,
            "train_tokens": int(train.counts.sum()),
            "val_tokens": int(val.counts.sum()),
            "val_unigram_entropy": val.unigram_entropy(),
        }
        if tokenizer.endswith(".tiktoken"):
            meta["tokenizer"] = VOCABULARY_FILE
            shutil.copy(tokenizer, partial / VOCABULARY_FILE)
        (partial / "meta.json.tmp").write_text(json.dumps(meta, indent=1) + "\n")
        os.replace(partial / "meta.json.tmp", partial / "meta.json")
        _move_in(partial, out)
    except OSError as error:
        fail(f"{out} cannot be written: {error.strerror or error}")
    finally:
        if not (partial / "meta.json").exists():
            shutil.rmtree(partial, ignore_errors=True)


def _move_in(partial: Path, out: Path):
    """The shards, then `meta.json`, into `out`; what a kill leaves undone here the next call does."""
    meta = json.loads((partial / "meta.json").read_text())
    for path in sorted(partial.iterdir(), key=lambda path: path.name == "meta.json"):
        os.replace(path, out / path.name)
    print(f"{out}: {meta['train_tokens']:,} train and {meta['val_tokens']:,} val tokens, vocabulary {meta['vocab_size']:,},")
    print(f"unigram entropy of val {meta['val_unigram_entropy']:.3f} nats")


def _tokenise(documents, encoding, train: ShardWriter, val: ShardWriter, val_fraction: float):
    """Documents through all cores (tiktoken works outside Python's lock), results in order, a bounded number in flight."""

    def encode(texts: list[str]) -> list[tuple[bool, np.ndarray]]:
        return [(_is_val(text, val_fraction), _with_end_of_text(encoding, text)) for text in texts]

    start = last_report = time.monotonic()
    n_documents = n_tokens = 0
    cores = available_cores()
    in_flight = deque()

    def finish_oldest():
        nonlocal n_documents, n_tokens, last_report
        for is_val, tokens in in_flight.popleft().result():
            (val if is_val else train).write(tokens)
            n_documents, n_tokens = n_documents + 1, n_tokens + len(tokens)
        if time.monotonic() - last_report > 1:
            last_report = time.monotonic()
            rate = n_tokens / (last_report - start)
            print(f"\r{n_documents:,} documents, {n_tokens:,} tokens, {rate:,.0f} tokens/s ", end="", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(cores) as pool:
        for texts in _groups(documents):
            in_flight.append(pool.submit(encode, texts))
            if len(in_flight) > 4 * cores:
                finish_oldest()
        while in_flight:
            finish_oldest()
    train.close()
    val.close()
    seconds = time.monotonic() - start
    print(f"\r{n_documents:,} documents, {n_tokens:,} tokens in {seconds:.1f} s, {n_tokens / seconds:,.0f} tokens/s", file=sys.stderr, flush=True)


def _groups(documents, characters: int = 200_000):
    """Lists of documents of about `characters` in all, so that a task is worth handing to a thread."""
    group, size = [], 0
    for text in documents:
        group.append(text)
        size += len(text)
        if size >= characters:
            yield group
            group, size = [], 0
    if group:
        yield group


def _with_end_of_text(encoding: tiktoken.Encoding, text: str) -> np.ndarray:
    text = text.encode("utf-8", errors="replace").decode()  # a lone surrogate is no text
    return np.concatenate((np.array([encoding.eot_token], np.uint32), encoding.encode_to_numpy(text, disallowed_special=())))


def _is_val(text: str, val_fraction: float) -> bool:
    digest = hashlib.blake2b(text.encode("utf-8", errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < val_fraction * 2**64


def prepare_from_command_line(description: str, default_out: Path, add_arguments, documents):
    """The command line that every prepare.py shares; `documents(arguments)` yields its strings."""
    parser = argparse.ArgumentParser(description=description)
    add_arguments(parser)
    parser.add_argument("--out", type=Path, default=default_out, help="folder for the shards (default: %(default)s)")
    parser.add_argument("--tokenizer", default="gpt2", help="tiktoken encoding, or a .tiktoken file (default: %(default)s)")
    parser.add_argument("--shard_tokens", type=int, default=100_000_000, help="tokens in a shard (default: %(default)s)")
    parser.add_argument("--val_fraction", type=float, default=0.005, help="share of documents for validation (default: %(default)s)")
    arguments = parser.parse_args()
    if not 0 < arguments.shard_tokens < 2**31 or not 0 < arguments.val_fraction < 1:
        fail("--shard_tokens must be at least 1 and below 2**31, --val_fraction between 0 and 1")
    options = {"shard_tokens": arguments.shard_tokens, "val_fraction": arguments.val_fraction}
    prepare(documents(arguments), arguments.out, arguments.tokenizer, source=parser.prog, **options)


def hugging_face_documents(source: str, name: str | None):
    """Texts of a Hugging Face dataset's train split, streamed; a local folder of parquet or JSON files works too."""
    try:
        import datasets
    except ImportError:
        fail("this dataset comes through the datasets package: pip install datasets")
    try:
        name = None if Path(source).is_dir() else name
        stream = datasets.load_dataset(source, name, split="train", streaming=True)
        for row in stream:
            if not isinstance(row.get("text"), str):
                fail(f"{source} has no column 'text' of strings: its columns are {', '.join(row)}")
            yield row["text"]
    except (OSError, ValueError, RuntimeError) as error:
        fail(f"{source} cannot be streamed: {type(error).__name__}: {str(error)[:200]}; check the network or give --source a local folder")
