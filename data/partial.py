"""A dataset's folder while it is prepared: locked, with a record of how far it came, and moved into place when it is whole."""

import fcntl
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from data.shards import open_shard, shard_header, split_files
from runtime.errors import fail

VOCABULARY_FILE = "vocabulary.tiktoken"


@contextmanager
def partial_folder(out: Path):
    """`out/.partial`, for this process alone. What a later call can resume from stays there; anything else is deleted."""
    partial, is_new = out / ".partial", not out.exists()
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = _lock(partial)
        try:
            if not (partial / "meta.json").exists() and list(out.glob("*.bin")):
                fail(f"{out} already holds shards: choose another --out, or delete them first")
            for path in () if _can_go_on(partial) else partial.iterdir():
                path.unlink()
            yield partial
        finally:
            if not _can_go_on(partial):
                shutil.rmtree(partial, ignore_errors=True)
            if is_new and not any(out.iterdir()):
                out.rmdir()
            os.close(lock)
    except OSError as error:
        go_on = "; run the same command again to resume" if _can_go_on(partial) else ""
        fail(f"{out} cannot be written: {error.strerror or error}{go_on}")


def _lock(folder: Path) -> int:
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another process is preparing {folder.parent}: wait for it, or choose another --out")
    except OSError:
        pass  # this file system has no locks
    return lock


def _can_go_on(partial: Path) -> bool:
    return any((partial / name).exists() for name in ("meta.json", "record.json"))


def finish(partial: Path, out: Path, tokenizer: str, vocab_size: int, source: str):
    """Whole shards get their `meta.json` and are moved in."""
    n_tokens, counts = {"train": 0, "val": 0}, np.zeros(vocab_size, dtype=np.int64)
    for split in n_tokens:
        for path in split_files(partial, split):
            shard = open_shard(path)
            n_tokens[split] += len(shard)
            for at in range(0, len(shard) if split == "val" else 0, 2**20):
                found = np.bincount(shard[at : at + 2**20], minlength=vocab_size)
                if len(found) > vocab_size:
                    fail(f"{path.name} holds token {len(found) - 1}, beyond the vocabulary of {vocab_size}: get it again")
                counts += found
    p = counts[counts > 0] / counts.sum()
    meta = {
        "tokenizer": tokenizer,
        "vocab_size": vocab_size,
        "source": source,
        "train_tokens": n_tokens["train"],
        "val_tokens": n_tokens["val"],
        # −Σ p ln p of the token frequencies, nats: the loss of a model that knows frequencies and nothing else
        "val_unigram_entropy": float(-(p * np.log(p)).sum()),
    }
    if tokenizer.endswith(".tiktoken"):
        meta["tokenizer"] = VOCABULARY_FILE
        shutil.copy(tokenizer, partial / VOCABULARY_FILE)
    write_json(partial / "meta.json", meta)
    move_in(partial, out)


def move_in(partial: Path, out: Path):
    """Moves the shards, then `meta.json`, into `out`. If it is killed, the next call moves the rest."""
    meta = json.loads((partial / "meta.json").read_text())
    for path in partial.glob("record.json*"):
        path.unlink()
    for path in sorted(partial.iterdir(), key=lambda path: path.name == "meta.json"):
        os.replace(path, out / path.name)
    print(f"{out}: {meta['train_tokens']:,} train and {meta['val_tokens']:,} val tokens, vocabulary {meta['vocab_size']:,},")
    print(f"unigram entropy of val {meta['val_unigram_entropy']:.3f} nats")


def write_json(path: Path, content: dict):
    """Whole or not at all, whenever the process or the machine dies."""
    with open(f"{path}.tmp", "w") as file:
        file.write(json.dumps(content, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


def read_record(partial: Path, command: dict) -> dict:
    """How far an earlier call with the same arguments came: documents, their digest, where the source stands, tokens."""
    path = partial / "record.json"
    if not path.exists():
        return {"command": command, "documents": 0, "digest": "", "position": None, "train": 0, "val": 0}
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        fail(f"{path} is damaged ({error}): delete {partial} to start again")
    earlier = record["command"]
    if changed := [f"{k} was {earlier.get(k)!r}, is {v!r}" for k, v in command.items() if earlier.get(k) != v]:
        fail(f"{partial} holds a part of another preparation: {'; '.join(changed)}; set it back, or delete that folder")
    return record


def check_space(folder: Path, n_tokens: int, vocab_size: int):
    """Ends the program where the file system of `folder` has no room for so many tokens."""
    n_bytes, free = n_tokens * np.dtype(shard_header(0, vocab_size)[1]).itemsize, shutil.disk_usage(folder).free
    if n_bytes > free:
        says = f"{n_bytes / 1e9:,.1f} GB are needed and {free / 1e9:,.1f} GB free"
        fail(f"no space for the shards in {folder.parent}: {says}; choose another --out, or a part with --max_tokens")
