"""Token shards: the format, its reader, and a loader that is a pure function of (seed, sample index).

A shard is what llm.c and modded-nanogpt read: 256 int32 of header (20240520, 1, n_tokens), then uint16 tokens;
(20240801, 7, n_tokens), then uint32 tokens, where the vocabulary exceeds 65,536. A `train.bin` or `val.bin` without a
magic number is nanoGPT's: uint16 tokens alone.
"""

import hashlib
import json
import os
import queue
import re
import threading
from itertools import islice
from pathlib import Path

import numpy as np

from runtime.errors import fail

HEADER_INTS = 256
# magic number: (version, token type)
FORMATS = {20240520: (1, np.uint16), 20240801: (7, np.uint32)}
# The words in a file's name that say which split it belongs to.
SPLIT_WORDS = {"train": {"train", "training"}, "val": {"val", "valid", "validation"}}


# --- format --------------------------------------------------------------------------------------


def shard_header(n_tokens: int, vocab_size: int) -> tuple[np.ndarray, type]:
    """The header of a shard of `n_tokens`, and the type of its tokens."""
    magic = 20240520 if vocab_size <= 2**16 else 20240801
    version, token_type = FORMATS[magic]
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = magic, version, n_tokens
    return header, token_type


def open_shard(path: Path) -> np.ndarray:
    """The tokens of a shard, memory-mapped, uint16 or uint32. Ends the program for a file that is not a whole shard."""
    if not path.is_file():
        fail(f"{path} is not a file: prepare the data again")
    try:
        size = path.stat().st_size
        header = np.fromfile(path, dtype="<i4", count=min(HEADER_INTS, size // 4))
        magic, version, n_tokens = (*header.tolist(), 0, 0, 0)[:3]
        if magic not in FORMATS:
            # nanoGPT's names for its header-less files; a header whose magic number is damaged still ends in zeros
            if path.name not in ("train.bin", "val.bin") or len(header) == HEADER_INTS and not header[3:].any():
                fail(f"{path} is not a token shard: it starts with {magic}, not with 20240520 or 20240801; prepare the data again")
            if size == 0 or size % 2:
                fail(f"{path} has {size} bytes: not a whole number of uint16 tokens; prepare the data again")
            tokens = np.memmap(path, dtype=np.uint16, mode="r")
            if len(tokens) > 16 and tokens[:4096].any() and not tokens[1:4096:2].any():  # the upper halves of small numbers
                fail(f"{path} has no header and every second uint16 in it is 0: are its tokens 32 bits wide? write them as uint16")
            return np.asarray(tokens)  # slices of a memmap object take longer
        expected_version, token_type = FORMATS[magic]
        expected = 4 * HEADER_INTS + n_tokens * np.dtype(token_type).itemsize
        if version != expected_version or n_tokens < 0:
            fail(f"{path} has a damaged header: version {version}, {n_tokens} tokens; prepare the data again")
        if size != expected:
            fail(f"{path} is {size} bytes and its header says {expected} ({n_tokens} tokens): {'truncated' if size < expected else 'too long'}; prepare the data again")
        if n_tokens == 0:
            fail(f"{path} holds no token; prepare the data again")
        return np.asarray(np.memmap(path, dtype=token_type, mode="r", offset=4 * HEADER_INTS, shape=(n_tokens,)))
    except OSError as error:
        fail(f"{path} cannot be read: {error.strerror or error}")


# --- the windows of a split ----------------------------------------------------------------------


def split_files(folder: Path, split: str) -> list[Path]:
    """The shards of a split in the order of their names: "train" or "val" is a whole word of the name. Ends the program for
    a file whose name has both. Hidden files are not shards."""
    files = []
    for path in sorted(folder.glob("*.bin")):
        words = set(re.split("[^A-Za-z]+", path.stem))
        splits = [name for name, of_split in SPLIT_WORDS.items() if words & of_split]
        if path.name.startswith(".") or split not in splits:
            continue
        if len(splits) > 1:
            fail(f"{path} names two splits, {' and '.join(splits)}: rename it, so that it belongs to one of them")
        files.append(path)
    return files


class TokenWindows:
    """All windows of `block_size` tokens (and the one that follows) of a folder's shards of one split."""

    def __init__(self, folder: Path, split: str, block_size: int, vocab_size: int):
        self.folder, self.block_size, self.vocab_size = folder, block_size, vocab_size
        self.paths = split_files(folder, split)
        if not self.paths:
            script = folder / "prepare.py"
            hint = f"python {os.path.relpath(script)}" if script.exists() else "see docs/data.md"
            fail(f"there is no {split} shard (a .bin file with the word {split} in its name) in {folder}: prepare the data first ({hint})")
        self.shards = [open_shard(path) for path in self.paths]
        for path, shard in zip(self.paths, self.shards):
            if shard.dtype == np.uint16 and vocab_size > 2**16:
                fail(f"{path} holds uint16 tokens, which cannot be of a vocabulary of {vocab_size}: write them as uint32, with a header")
        # Windows of a shard do not overlap, but for the last target of one being the first token of the next.
        counts = [max(0, (len(shard) - 1) // block_size) for shard in self.shards]
        self.first_window = np.cumsum([0, *counts])
        if len(self) == 0:
            hint = "lower block_size, or prepare more text" + (" with a larger --val_fraction" if split == "val" else "")
            fail(f"{split} in {folder} is shorter than one window of {block_size + 1} tokens: {hint}")
        for path, sample in zip(self.paths, self.samples()):
            if sample.max() >= vocab_size:
                fail(f"{path} holds token {sample.max()}, beyond vocab_size={vocab_size}: give --vocab_size, the number of tokens of the data's tokenizer")

    def __len__(self) -> int:
        return int(self.first_window[-1])

    def samples(self) -> list[np.ndarray]:
        """Of each shard the first, middle and last few thousand tokens: what is checked and fingerprinted at start."""
        cuts = [(0, len(s) // 2, max(0, len(s) - 4096)) for s in self.shards]
        return [np.concatenate([s[at : at + 4096] for at in cut]) for s, cut in zip(self.shards, cuts)]

    def read(self, windows: np.ndarray) -> np.ndarray:
        """Tokens of the given windows, int64, (len(windows), block_size + 1)."""
        batch = np.empty((len(windows), self.block_size + 1), dtype=np.int64)
        shard_of = np.searchsorted(self.first_window, windows, side="right") - 1
        for row, window, shard in zip(batch, windows, shard_of):
            start = int(window - self.first_window[shard]) * self.block_size
            row[:] = self.shards[shard][start : start + self.block_size + 1]
        if batch.max() >= self.vocab_size:
            fail(f"{self.folder} holds token {batch.max()}, beyond vocab_size={self.vocab_size}: prepare the data again")
        return batch

    def fingerprint(self) -> str:
        """Changes when the shards' number, order, lengths or sampled tokens change."""
        digest = hashlib.sha256()
        for shard, sample in zip(self.shards, self.samples()):
            digest.update(f"{len(shard)} {shard.dtype}".encode() + sample.tobytes())
        return digest.hexdigest()


def read_meta(folder: Path) -> dict:
    """`meta.json` of a prepared folder; {} where there is none (published shards have none)."""
    path = folder / "meta.json"
    if not path.is_file():
        return {}
    try:
        meta = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        fail(f"{path} cannot be read ({error}): prepare the dataset again, or delete that file if nanoOEC did not prepare the shards")
    good = isinstance(meta, dict) and type(meta.get("vocab_size")) is int and type(meta.get("tokenizer")) is str
    if not good or meta["vocab_size"] < 1:
        fail(f"{path} lacks vocab_size or tokenizer: prepare the dataset again, or delete that file if nanoOEC did not prepare the shards")
    return meta


def dataset_folder(dataset: str, data_dir: str) -> Path:
    """Where the shards of a run with these settings are."""
    return Path(data_dir) if data_dir else Path(__file__).resolve().parent / dataset


def prepare_built_in(folder: Path):
    """Prepares data/stdlib where it is asked for and not there yet."""
    if folder == dataset_folder("stdlib", "") and not (folder / "meta.json").exists():
        from data.stdlib.prepare import main as prepare_stdlib  # here, since it needs tiktoken

        prepare_stdlib()


def open_dataset(folder: Path, block_size: int, vocab_size: int) -> tuple[TokenWindows, TokenWindows]:
    """The train and val windows of a folder of shards, checked against its `meta.json` where it has one."""
    if not os.path.isdir(folder):
        fail(f"there is no dataset folder {folder}: prepare it first (see docs/data.md)")
    if (folder / ".partial").exists():
        fail(f"the preparation of {folder} is not finished: wait for it, or run its prepare.py again")
    stated = read_meta(folder).get("vocab_size", vocab_size)
    if stated != vocab_size:
        fail(f"{folder} has a vocabulary of {stated} tokens, the model of {vocab_size}: use --vocab_size={stated}")
    train, val = (TokenWindows(folder, split, block_size, vocab_size) for split in ("train", "val"))
    return train, val


# --- the order of samples ------------------------------------------------------------------------


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """A keyed permutation of 0..size-1 in O(1) memory: a Feistel cipher on the next power of four, walked along
    its cycle until it falls inside (Black & Rogaway 2002)."""
    half_bits = max(1, -(-max(1, (size - 1).bit_length()) // 2))
    result = np.asarray(index, dtype=np.uint64)
    outside = np.ones(result.shape, dtype=bool)
    while outside.any():
        result = np.where(outside, _feistel(result, half_bits, key), result)
        outside = result >= size
    return result.astype(np.int64)


def _feistel(value: np.ndarray, half_bits: int, key: int, rounds: int = 6) -> np.ndarray:
    bits, mask = np.uint64(half_bits), np.uint64(2**half_bits - 1)
    left, right = value >> bits, value & mask
    for round in range(rounds):
        left, right = right, left ^ (_mix(right + np.uint64((key + round * 0x9E3779B97F4A7C15) % 2**64)) & mask)
    return (left << bits) | right


def _mix(value: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: every input bit reaches every output bit."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def windows_of_samples(samples: np.ndarray, n_windows: int, seed: int) -> np.ndarray:
    """Which window each sample of the run is: every epoch visits each window once, in an order of its own."""
    windows = np.empty(len(samples), dtype=np.int64)
    epochs = samples // n_windows
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        key = int.from_bytes(hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8).digest(), "little")
        windows[chosen] = permute(samples[chosen] % n_windows, n_windows, key)
    return windows


def samples_of_process(step: int, max_steps: int, batch_size: int, micro_batch_size: int, rank: int, world_size: int):
    """Sample numbers of each forward pass of one process from `step` on. Step s takes samples s·batch_size to
    (s + 1)·batch_size − 1 whatever the number of processes."""
    for first in range(step * batch_size, max_steps * batch_size, micro_batch_size * world_size):
        yield first + rank * micro_batch_size + np.arange(micro_batch_size)


# --- the loader ----------------------------------------------------------------------------------


class Loader:
    """Yields (tokens, targets), int64 (B, T) each on the torch.device `device`, for each array of sample numbers in `batches`.

    A background thread reads one batch ahead, into pinned memory for a GPU.
    """

    def __init__(self, data: TokenWindows, batches, seed: int, device):
        self.device, self.batches = device, batches
        self.data, self.seed = data, seed
        self.ready = queue.Queue(maxsize=1)
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._fill, daemon=True)
        self.thread.start()

    def _fill(self):
        from torch import from_numpy  # here, since preparing data can do without the seconds that importing torch takes

        try:
            for windows in self._windows():
                tokens = from_numpy(self.data.read(windows))
                self._put(tokens.pin_memory() if self.device.type == "cuda" else tokens)
                if self.stopped.is_set():
                    return
            self._put(None)
        except BaseException as error:  # raised again where the batch is awaited
            self._put(error)

    def _windows(self):
        """The windows of each batch, for 64 batches at once: while this thread runs Python, the main thread cannot launch a step."""
        batches = iter(self.batches)
        while group := list(islice(batches, 64)):
            windows = windows_of_samples(np.concatenate(group), len(self.data), self.seed)
            yield from np.split(windows, np.cumsum([len(samples) for samples in group])[:-1])

    def _put(self, item):
        while not self.stopped.is_set():
            try:
                return self.ready.put(item, timeout=0.1)
            except queue.Full:
                pass

    def __iter__(self):
        while (item := self.ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            tokens = item.to(self.device, non_blocking=True)
            yield tokens[:, :-1], tokens[:, 1:]

    def close(self):
        self.stopped.set()
        self.thread.join()
