"""data/: the shard format, the order of samples, the loader, documents to shards."""

import argparse
import base64
import fcntl
import gzip
import json
import lzma
import os
import random
import shutil
import struct
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from data.fineweb.prepare import link_shards
from data.hugging_face import HuggingFaceDocuments
from data.prepare import _encode as encode
from data.prepare import load_tokenizer, prepare
from data.shards import (
    Loader, TokenWindows, open_dataset, open_shard, permute, read_meta, samples_of_process, windows_of_samples,
)  # fmt: skip
from data.text.prepare import documents as documents_of_files
from tests.conftest import PATIENCE, ROOT, VOCAB, fails_in_one_line, fill, write_shard

STDLIB_VOCABULARY = str(ROOT / "data/stdlib/vocabulary.tiktoken")


# --- format


def test_a_shard_is_what_others_write_and_read(tmp_path):
    """Byte for byte the llm.c / modded-nanogpt layout, both token widths."""
    tokens = np.arange(1000) * 61 % 50257
    path = tmp_path / "fineweb_train_000001.bin"
    path.write_bytes(struct.pack("<256i", 20240520, 1, 1000, *[0] * 253) + tokens.astype("<u2").tobytes())
    assert np.array_equal(open_shard(path), tokens)
    ours = tmp_path / "train_000000.bin"
    write_shard(ours, tokens, 50257)
    assert ours.read_bytes() == path.read_bytes()
    wide = tokens * 2
    path.write_bytes(struct.pack("<256i", 20240801, 7, 1000, *[0] * 253) + wide.astype("<u4").tobytes())
    assert np.array_equal(open_shard(path), wide)
    write_shard(ours, wide, 128_256)
    assert ours.read_bytes() == path.read_bytes()
    header_less = tmp_path / "val.bin"  # nanoGPT's
    header_less.write_bytes(tokens.astype("<u2").tobytes())
    assert np.array_equal(open_shard(header_less), tokens)


@pytest.mark.parametrize(
    "damage, says",
    (
        (lambda b: b[:-1], "truncated"),
        (lambda b: b[:600], "truncated"),
        (lambda b: b + b"\0\0", "header"),
        (lambda b: b"", "not a token shard"),
        (lambda b: b[:2], "not a token shard"),
        (lambda b: struct.pack("<i", 7) + b[4:], "not a token shard"),
        (lambda b: b[:4] + struct.pack("<i", 9) + b[8:], "version"),
        (lambda b: b[:8] + struct.pack("<i", -5) + b[12:], "header"),
        (lambda b: b[:8] + struct.pack("<i", 0) + b[12:1024], "no token"),
        (lambda b: b[:-2] + struct.pack("<H", VOCAB), "beyond vocab_size"),
    ),
)
def test_damaged_shards_are_refused(data, capsys, damage, says):
    path = data / "train_000001.bin"
    path.write_bytes(damage(path.read_bytes()))
    line = fails_in_one_line(capsys, open_dataset, data, 32, VOCAB)
    assert says in line and "train_000001.bin" in line


def test_a_damaged_header_is_not_taken_for_a_file_without_one(tmp_path, capsys):
    path = tmp_path / "train.bin"
    write_shard(path, np.arange(5000) % VOCAB)
    path.write_bytes(b"\0\1\2\3" + path.read_bytes()[4:])
    assert "not a token shard" in fails_in_one_line(capsys, open_shard, path)


def test_unusable_datasets_are_refused(data, tmp_path, capsys):
    assert "no dataset folder" in fails_in_one_line(capsys, open_dataset, tmp_path / "none", 32, VOCAB)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no train shard" in fails_in_one_line(capsys, open_dataset, empty, 32, VOCAB)
    assert "val" in fails_in_one_line(capsys, open_dataset, data, 4003, VOCAB)  # val is shorter than one window
    (data / "meta.json").write_text('{"vocab_size": 299, "tokenizer": "gpt2"}')
    assert "--vocab_size=299" in fails_in_one_line(capsys, open_dataset, data, 32, VOCAB)
    for text in ("{", "[]", "3", "[" * 100_000, '{"vocab_size": "300", "tokenizer": "gpt2"}', '{"vocab_size": 300}', "\xff"):
        (data / "meta.json").write_bytes(text.encode("latin-1"))
        assert "meta.json" in fails_in_one_line(capsys, read_meta, data)
    (data / "val_000000.bin").unlink()
    (data / "meta.json").unlink()
    (data / "val_000000.bin").mkdir()
    assert "val_000000.bin" in fails_in_one_line(capsys, open_dataset, data, 32, VOCAB)


def test_a_token_beyond_the_vocabulary_deep_inside_is_found_when_it_is_read(tmp_path, capsys):
    tokens = np.zeros(100_000, dtype=np.int64)
    tokens[30_000] = VOCAB
    write_shard(tmp_path / "train.bin", tokens)
    windows = TokenWindows(tmp_path, "train", 100, VOCAB)
    windows.read(np.array([0, 1, 2]))
    assert "beyond vocab_size" in fails_in_one_line(capsys, windows.read, np.array([299]))


def test_the_split_is_a_whole_word_of_a_files_name(tmp_path, capsys):
    names = ("medieval_train_000001", "tiny-train-2", "train", "fineweb_val_000000", "validation", ".train_hidden", "brain", "evaluate")
    for name in names:
        write_shard(tmp_path / f"{name}.bin", np.arange(100))
    train, val = open_dataset(tmp_path, 8, VOCAB)
    assert [path.stem for path in train.paths] == ["medieval_train_000001", "tiny-train-2", "train"]
    assert [path.stem for path in val.paths] == ["fineweb_val_000000", "validation"]
    write_shard(tmp_path / "train_val_000.bin", np.arange(100))
    assert "train_val_000.bin" in fails_in_one_line(capsys, open_dataset, tmp_path, 8, VOCAB)


def test_header_less_files_hold_16_bit_tokens(tmp_path, capsys):
    """uint32 or int64 in their place would be read as halves: refused, whatever the vocabulary."""
    tokens = np.arange(5_000) * 19 % 100_277
    for token_type, vocab_size, says in ((np.uint32, 100_277, "uint16"), (np.uint16, 100_277, "uint16"), (np.uint32, VOCAB, "32 bits"), (np.int64, VOCAB, "32 bits")):
        for name in ("train.bin", "val.bin"):
            (tmp_path / name).write_bytes((tokens % min(vocab_size, 2**16)).astype(token_type).tobytes())
        assert says in fails_in_one_line(capsys, open_dataset, tmp_path, 32, vocab_size)


def test_shards_of_many_kinds_in_one_folder(tmp_path, capsys):
    """Hundreds of small ones, other lengths and types, links: read as they are. One that cannot be read is named."""
    dice = np.random.default_rng(0)
    folder, parts = tmp_path / "data", []
    folder.mkdir()
    for number in range(300):
        parts.append(dice.integers(0, VOCAB, dice.integers(9, 60)))
        write_shard(folder / f"train_{number:06d}.bin", parts[-1], 100_000 if number % 3 else VOCAB)
    write_shard(tmp_path / "elsewhere.bin", parts[0])
    (folder / "train_linked.bin").symlink_to("../elsewhere.bin")
    write_shard(folder / "val.bin", parts[0])
    train, _ = open_dataset(folder, 8, VOCAB)
    expected = [part[at : at + 9] for part in [*parts, parts[0]] for at in range(0, len(part) - 8, 8)]
    assert np.array_equal(train.read(np.arange(len(train))), np.stack(expected))
    (tmp_path / "elsewhere.bin").unlink()
    assert "train_linked.bin" in fails_in_one_line(capsys, open_dataset, folder, 8, VOCAB)


# --- windows and their order


def test_windows_cover_the_shards_without_overlap(data):
    windows = TokenWindows(data, "train", 32, VOCAB)
    batch = windows.read(np.arange(len(windows)))
    expected = []
    for name in ("train_000000.bin", "train_000001.bin"):
        shard = open_shard(data / name)
        n = (len(shard) - 1) // 32
        expected += [shard[i * 32 : i * 32 + 33] for i in range(n)]
    assert batch.dtype == np.int64 and np.array_equal(batch, np.stack(expected))


@pytest.mark.parametrize("size", (1, 2, 3, 5, 64, 1000, 4097))
def test_permute_is_a_permutation(size):
    for key in (0, 1, 2**63):
        assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


def test_permute_shuffles():
    """Different keys, unrelated orders; neighbours do not stay neighbours."""
    a, b = (permute(np.arange(10_000), 10_000, key) for key in (1, 2))
    assert (a == b).mean() < 1e-3
    for order in (a, b):
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
        assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05
        assert (np.abs(np.diff(order)) == 1).mean() < 1e-3


def test_permute_of_a_vast_set_costs_no_memory():
    size = 10**14
    start = time.perf_counter()
    picked = permute(np.array([0, 1, size - 1]), size, 5)
    assert time.perf_counter() - start < 1 and len(set(picked)) == 3 and (picked < size).all() and (picked >= 0).all()


def test_every_window_of_an_epoch_comes_once_and_epochs_differ():
    epochs = windows_of_samples(np.arange(3 * 777), 777, seed=5).reshape(3, 777)
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), np.arange(777))
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[0], windows_of_samples(np.arange(777), 777, seed=6))
    one_by_one = [windows_of_samples(np.array([i]), 777, seed=5)[0] for i in range(700, 900)]
    assert one_by_one == epochs.flatten()[700:900].tolist()  # a pure function of (seed, sample index)


@pytest.mark.parametrize("world_size", (1, 2, 4))
def test_a_step_has_the_same_samples_on_any_number_of_processes(world_size):
    streams = [list(samples_of_process(3, 7, 16, 2, rank, world_size)) for rank in range(world_size)]
    passes = 16 // 2 // world_size
    for step in range(4):
        samples = np.concatenate([np.concatenate(s[step * passes : (step + 1) * passes]) for s in streams])
        assert np.array_equal(np.sort(samples), np.arange(16) + (3 + step) * 16)


def test_fingerprint_sees_other_data(data, tmp_path):
    first = TokenWindows(data, "train", 32, VOCAB).fingerprint()
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    assert TokenWindows(copy, "train", 32, VOCAB).fingerprint() == first
    blob = bytearray((copy / "train_000001.bin").read_bytes())
    blob[-2:] = struct.pack("<H", 1 + blob[-2])
    (copy / "train_000001.bin").write_bytes(blob)
    assert TokenWindows(copy, "train", 32, VOCAB).fingerprint() != first


# --- the loader


def test_loader_delivers_the_windows_in_order_and_ends(data):
    windows = TokenWindows(data, "train", 32, VOCAB)
    loader = Loader(windows, samples_of_process(0, 3, 8, 4, 0, 1), 1, torch.device("cpu"))
    batches = list(loader)
    assert len(batches) == 6
    expected = windows.read(windows_of_samples(np.arange(24), len(windows), 1))
    assert np.array_equal(torch.cat([tokens for tokens, _ in batches]).numpy(), expected[:, :-1])
    assert np.array_equal(torch.cat([targets for _, targets in batches]).numpy(), expected[:, 1:])
    loader.close()
    assert not loader.thread.is_alive()


def test_loader_closes_early_and_passes_errors_on(data):
    windows = TokenWindows(data, "train", 32, VOCAB)
    loader = Loader(windows, samples_of_process(0, 10**6, 8, 4, 0, 1), 1, torch.device("cpu"))
    next(iter(loader))
    loader.close()
    assert not loader.thread.is_alive()

    def broken():
        raise OSError("the network share is gone")
        yield

    with pytest.raises(OSError, match="gone"):
        next(iter(Loader(windows, broken(), 1, torch.device("cpu"))))


# --- documents to shards


def texts(n=200):
    return [f"document {i}: " + " ".join(str(i * j) for j in range(i % 50)) for i in range(n)]


def test_prepared_shards_hold_the_documents(tmp_path):
    out = tmp_path / "out"
    prepare(texts(), out, STDLIB_VOCABULARY, source="test", shard_tokens=1000, val_fraction=0.1)
    encoding = load_tokenizer(STDLIB_VOCABULARY)
    meta = json.loads((out / "meta.json").read_text())
    found = {}
    for split in ("train", "val"):
        shards = [open_shard(path) for path in sorted(out.glob(f"{split}_*.bin"))]
        assert all(len(shard) == 1000 for shard in shards[:-1])
        tokens = np.concatenate(shards)
        assert len(tokens) == meta[f"{split}_tokens"]
        assert tokens[0] == encoding.eot_token
        documents = encoding.decode(tokens[1:].tolist()).split("<|endoftext|>")
        found[split] = documents
        assert documents == [text for text in texts() if text in set(documents)]  # in order
    assert sorted(found["train"] + found["val"]) == sorted(texts())
    counts = np.bincount(tokens)
    p = counts[counts > 0] / counts.sum()
    assert meta["val_unigram_entropy"] == pytest.approx(-(p * np.log(p)).sum())
    assert meta["vocab_size"] == 4096 and not (out / ".partial").exists()
    # The folder stands by itself: its tokenizer came along.
    assert load_tokenizer(meta["tokenizer"], out).n_vocab == 4096


def test_the_split_depends_on_neither_order_nor_shard_size(tmp_path):
    prepare(texts(), tmp_path / "a", STDLIB_VOCABULARY, source="test", val_fraction=0.1)
    prepare(texts()[::-1], tmp_path / "b", STDLIB_VOCABULARY, source="test", val_fraction=0.1, shard_tokens=777)
    a, b = (json.loads((tmp_path / x / "meta.json").read_text()) for x in "ab")
    assert a == b


def test_a_prepared_folder_is_never_overwritten(tmp_path, capsys):
    out = tmp_path / "out"
    prepare(texts(), out, STDLIB_VOCABULARY, source="test", val_fraction=0.1)
    before = {path: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    line = fails_in_one_line(capsys, lambda: prepare(texts(), out, STDLIB_VOCABULARY, source="test"))
    assert "already holds shards" in line
    assert before == {path: path.read_bytes() for path in out.iterdir()}


def test_a_failed_preparation_leaves_nothing(tmp_path):
    def documents():
        yield from texts(50)
        raise SystemExit(2)

    with pytest.raises(SystemExit):
        prepare(documents(), tmp_path / "out", STDLIB_VOCABULARY, source="test", shard_tokens=100)
    assert not (tmp_path / "out").exists()


def test_a_preparation_killed_while_it_moved_its_files_in_is_finished_by_the_next(tmp_path, capsys, monkeypatch):
    out, whole = tmp_path / "out", tmp_path / "whole"
    prepare(texts(), whole, STDLIB_VOCABULARY, source="test", shard_tokens=1000, val_fraction=0.1)
    real, moves = os.replace, []

    def replace(source, target):
        moves.append(target)
        if len(moves) == 4:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        prepare(texts(), out, STDLIB_VOCABULARY, source="test", shard_tokens=1000, val_fraction=0.1)
    monkeypatch.undo()
    capsys.readouterr()
    assert "not finished" in fails_in_one_line(capsys, open_dataset, out, 32, 4096)
    prepare(iter(()), out, STDLIB_VOCABULARY, source="test")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}


def test_a_new_preparation_brings_its_own_vocabulary(tmp_path):
    out, other = tmp_path / "out", tmp_path / "other.tiktoken"
    prepare(texts(), out, STDLIB_VOCABULARY, source="test", val_fraction=0.1)
    for path in (*out.glob("*.bin"), out / "meta.json"):
        path.unlink()
    with open(STDLIB_VOCABULARY) as file:
        other.write_text("".join(line for line, _ in zip(file, range(1000))))
    prepare(texts(), out, str(other), source="test", val_fraction=0.1)
    assert load_tokenizer("vocabulary.tiktoken", out).n_vocab == json.loads((out / "meta.json").read_text())["vocab_size"] == 1001


# --- a preparation that is stopped and resumed


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    """Some 10 MB of documents of very different lengths, the same on every machine."""
    lines = Path(STDLIB_VOCABULARY).read_bytes().splitlines()
    words = [base64.b64decode(line.split()[0]).decode(errors="replace").strip() or "\n" for line in lines]
    dice = random.Random(0)
    return [" ".join(dice.choices(words, k=dice.randint(20, 3000))) for _ in range(1500)]


@pytest.fixture
def one_core(monkeypatch):
    """Few documents in flight: a small corpus has many moments at which it can be stopped."""
    monkeypatch.setattr("data.prepare.available_cores", lambda: 1)


OPTIONS = {"source": "test", "shard_tokens": 200_000, "val_fraction": 0.02}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def finished_shards(partial: Path, shard_tokens: int) -> dict[str, tuple]:
    """Name, inode and time of change of the shards that the record says are full."""
    record = json.loads((partial / "record.json").read_text())
    names = [f"{split}_{i:06d}.bin" for split in ("train", "val") for i in range(record[split] // shard_tokens)]
    return {name: (status.st_ino, status.st_mtime_ns) for name in names if (status := (partial / name).stat())}


def until(documents, n: int):
    yield from islice(documents, n)
    raise KeyboardInterrupt


def test_a_stopped_preparation_goes_on_to_the_same_bytes(tmp_path, corpus, one_core):
    """Stopped anywhere, several times: finished shards are left as they are, and no document is encoded again for them."""
    dice = np.random.default_rng(0)
    prepare(corpus, tmp_path / "whole", STDLIB_VOCABULARY, **OPTIONS)
    out, finished, n_documents, n_beyond = tmp_path / "out", {}, [], 0
    for stop in sorted(dice.integers(500, len(corpus), 4)):
        with pytest.raises(KeyboardInterrupt):
            prepare(until(corpus, stop), out, STDLIB_VOCABULARY, **OPTIONS)
        assert not list(out.glob("*.bin")) and not (out / "meta.json").exists()
        finished |= finished_shards(out / ".partial", OPTIONS["shard_tokens"])
        record = json.loads((out / ".partial/record.json").read_text())
        n_documents.append(record["documents"])
        n_tokens = sum((path.stat().st_size - 1024) // 2 for path in (out / ".partial").glob("train_*.bin"))
        n_beyond += n_tokens > record["train"]
    assert n_beyond, "nothing was written after a record: this test needs larger shards"
    assert n_documents == sorted(n_documents) and n_documents[-1] > n_documents[0] > 0 and len(finished) > 5
    (out / ".partial/train_000099.bin").write_bytes(b"newer than the record")
    prepare(corpus, out, STDLIB_VOCABULARY, **OPTIONS)
    assert contents(out) == contents(tmp_path / "whole")
    now = {name: ((out / name).stat().st_ino, (out / name).stat().st_mtime_ns) for name in finished}
    assert now == finished


@pytest.fixture
def stopped(tmp_path, corpus, one_core) -> Path:
    """A folder with a part of a preparation."""
    with pytest.raises(KeyboardInterrupt):
        prepare(until(corpus, 1000), tmp_path / "stopped", STDLIB_VOCABULARY, **OPTIONS)
    return tmp_path / "stopped"


@pytest.mark.parametrize("change", ({"source": "x"}, {"shard_tokens": 7777}, {"val_fraction": 0.5}, {"max_tokens": 9**9}))
def test_a_part_of_another_preparation_is_refused_and_kept(stopped, corpus, capsys, change):
    before = contents(stopped / ".partial")
    capsys.readouterr()
    line = fails_in_one_line(capsys, lambda: prepare(corpus, stopped, STDLIB_VOCABULARY, **(OPTIONS | change)))
    assert f"{next(iter(change))} was" in line and contents(stopped / ".partial") == before


def test_a_part_with_another_tokenizer_is_refused(stopped, corpus, capsys, tmp_path):
    other = tmp_path / "other.tiktoken"
    other.write_text("".join(Path(STDLIB_VOCABULARY).read_text().splitlines(keepends=True)[:1000]))
    capsys.readouterr()
    assert "tokenizer was" in fails_in_one_line(capsys, lambda: prepare(corpus, stopped, str(other), **OPTIONS))


def test_documents_that_are_no_longer_the_same_are_found(stopped, corpus, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit):
        prepare(["new", *corpus], stopped, STDLIB_VOCABULARY, **OPTIONS)
    assert "no longer those" in capsys.readouterr().err and (stopped / ".partial/record.json").exists()


@pytest.mark.parametrize("damage", (lambda path: os.truncate(path, 1030), Path.unlink), ids=("cut", "gone"))
def test_a_damaged_part_is_not_gone_on_with(stopped, corpus, capsys, damage):
    record = json.loads((stopped / ".partial/record.json").read_text())
    for name in ("train_000000.bin", f"train_{record['train'] // OPTIONS['shard_tokens']:06d}.bin"):  # full, and not
        whole = (stopped / ".partial" / name).read_bytes()
        damage(stopped / ".partial" / name)
        with pytest.raises(SystemExit) as end:
            prepare(corpus, stopped, STDLIB_VOCABULARY, **OPTIONS)
        line = capsys.readouterr().err
        assert end.value.code == 2 and name in line and "cannot be written" not in line
        (stopped / ".partial" / name).write_bytes(whole)


def test_one_process_prepares_a_folder(stopped, corpus, capsys):
    lock = os.open(stopped / ".partial", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    capsys.readouterr()
    assert "another process" in fails_in_one_line(capsys, lambda: prepare(corpus, stopped, STDLIB_VOCABULARY, **OPTIONS))
    os.close(lock)


def test_max_tokens_takes_the_first_documents(tmp_path, corpus):
    options = OPTIONS | {"max_tokens": 300_000}
    prepare(corpus, tmp_path / "part", STDLIB_VOCABULARY, **options)
    meta = read_meta(tmp_path / "part")
    encoding = load_tokenizer(STDLIB_VOCABULARY)
    lengths = np.cumsum([1 + len(encoding.encode_ordinary(text)) for text in corpus[:300]])
    assert meta["train_tokens"] + meta["val_tokens"] == lengths[lengths <= 300_000][-1] < lengths[-1]


def test_a_disk_without_room_is_refused_at_once(tmp_path, capsys):
    line = fails_in_one_line(
        capsys, lambda: prepare(texts(), tmp_path / "out", STDLIB_VOCABULARY, source="test", max_tokens=10**15)
    )
    assert "2,000,000.0 GB are needed" in line and not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_keeps_the_finished_shards(small_disk, tmp_path, corpus, capsys, one_core):
    prepare(corpus, tmp_path / "whole", STDLIB_VOCABULARY, **OPTIONS)
    with open(small_disk / "ballast", "wb") as ballast:
        ballast.write(bytes(6 * 2**20))
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        prepare(corpus, small_disk / "out", STDLIB_VOCABULARY, **OPTIONS)
    says = [line for line in capsys.readouterr().err.splitlines() if "nanoOEC" in line]
    assert end.value.code == 2 and len(says) == 1 and "No space left" in says[0] and "run the same command again" in says[0]
    finished = finished_shards(small_disk / "out/.partial", OPTIONS["shard_tokens"])
    assert finished
    (small_disk / "ballast").unlink()
    prepare(corpus, small_disk / "out", STDLIB_VOCABULARY, **OPTIONS)
    assert contents(small_disk / "out") == contents(tmp_path / "whole")
    assert {name: (small_disk / "out" / name).stat().st_mtime_ns for name in finished} == {k: v[1] for k, v in finished.items()}


def kill_after_records(command: list, out: Path, times: int) -> dict[str, tuple]:
    """Runs a preparation on one core `times` times, each killed at a random moment after it made a record. What was
    finished at each kill."""
    record, finished, dice = out / ".partial/record.json", {}, np.random.default_rng(0)
    shard_tokens = int(command[command.index("--shard_tokens") + 1])
    for _ in range(times):
        before = record.read_bytes() if record.exists() else b""
        core = min(os.sched_getaffinity(0))
        run = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=lambda: os.sched_setaffinity(0, [core])
        )
        while run.poll() is None and (not record.exists() or record.read_bytes() == before):
            time.sleep(0.002)
        time.sleep(dice.uniform(0, 0.2))
        run.kill()
        status = run.wait()
        if status == 0:  # it was over before the kill
            break
        assert status == -9, f"the preparation failed with {status}"
        finished |= finished_shards(out / ".partial", shard_tokens)
    assert finished, "the preparation was over before a shard was finished and a kill came: give it more documents"
    return finished


def assert_kills_change_nothing(command: list, tmp_path: Path, times: int):
    done = subprocess.run([*command, "--out", str(tmp_path / "whole")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    command = [*command, "--out", str(tmp_path / "out")]
    finished = kill_after_records(command, tmp_path / "out", times)
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole") and len(finished) >= times
    now = {name: ((tmp_path / "out" / name).stat().st_ino, (tmp_path / "out" / name).stat().st_mtime_ns) for name in finished}
    assert now == finished


def prepare_command(name: str, *arguments, shard_tokens: int = 50_000) -> list[str]:
    options = ["--tokenizer", STDLIB_VOCABULARY, "--val_fraction", 0.02, "--shard_tokens", shard_tokens]
    return [sys.executable, *map(str, (ROOT / f"data/{name}/prepare.py", *arguments, *options))]


def test_kill_9_loses_no_shard(tmp_path, corpus):
    source = tmp_path / "corpus.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus[:1000]))
    assert_kills_change_nothing(prepare_command("text", source), tmp_path, times=2)


# --- through datasets


def write_dataset(folder: Path, kind: str, texts: list[str], n_files: int = 3) -> Path:
    """As published: several files with columns beside the text."""
    folder.mkdir()
    for i in range(n_files):
        rows = [{"id": f"{i}/{j}", "text": text, "score": j / 7} for j, text in enumerate(texts[i::n_files])]
        if kind == "json":
            (folder / f"{i:03d}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            arrow = pytest.importorskip("pyarrow", reason="parquet files are written with pyarrow")
            parquet = pytest.importorskip("pyarrow.parquet", reason="parquet files are written with pyarrow")
            parquet.write_table(arrow.Table.from_pylist(rows), folder / f"{i:03d}.parquet", row_group_size=100)
    return folder


class StoppedStream(HuggingFaceDocuments):
    def __iter__(self):
        return until(super().__iter__(), 600)


@pytest.mark.parametrize("kind", ("parquet", "json"))
def test_a_streamed_preparation_goes_on_from_its_position(tmp_path, corpus, one_core, kind):
    pytest.importorskip("datasets", reason="streaming goes through the datasets package")
    source = write_dataset(tmp_path / kind, kind, corpus)
    in_order = [text for i in range(3) for text in corpus[i::3]]
    prepare(in_order, tmp_path / "whole", STDLIB_VOCABULARY, **OPTIONS)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            prepare(StoppedStream(str(source), None), tmp_path / "out", STDLIB_VOCABULARY, **OPTIONS)
    record = json.loads((tmp_path / "out/.partial/record.json").read_text())
    assert record["documents"] > 600  # the second went on where the first was stopped
    prepare(HuggingFaceDocuments(str(source), None), tmp_path / "out", STDLIB_VOCABULARY, **OPTIONS)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("name, kind", (("openwebtext", "parquet"), ("fineweb", "json")))
def test_kill_9_loses_no_shard_of_a_stream(tmp_path, corpus, name, kind):
    pytest.importorskip("datasets", reason="streaming goes through the datasets package")
    source = write_dataset(tmp_path / kind, kind, corpus)
    assert_kills_change_nothing(prepare_command(name, "--source", source), tmp_path, times=6)


def test_a_folder_that_changed_is_not_gone_on_with(tmp_path, corpus, capsys, one_core):
    pytest.importorskip("datasets", reason="streaming goes through the datasets package")
    source = write_dataset(tmp_path / "json", "json", corpus)
    with pytest.raises(KeyboardInterrupt):
        prepare(StoppedStream(str(source), None), tmp_path / "out", STDLIB_VOCABULARY, **OPTIONS)
    with open(source / "000.jsonl", "a") as file:
        file.write('{"id": "new", "text": "new", "score": 0}\n')
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        prepare(HuggingFaceDocuments(str(source), None), tmp_path / "out", STDLIB_VOCABULARY, **OPTIONS)
    assert end.value.code == 2 and "have changed" in capsys.readouterr().err and (tmp_path / "out/.partial/record.json").exists()


def test_datasets_that_cannot_be_streamed_are_one_line(tmp_path, capsys, monkeypatch):
    pytest.importorskip("datasets", reason="streaming goes through the datasets package")
    empty, no_text, broken = (tmp_path / name for name in ("empty", "no_text", "broken"))
    for folder in (empty, no_text, broken):
        folder.mkdir()
    (no_text / "a.jsonl").write_text('{"body": "x", "url": "y"}\n')
    (broken / "a.jsonl").write_text("{\n")
    for folder, says in ((empty, "data files"), (no_text, "its columns are body, url"), (broken, "cannot be read")):
        assert says in fails_in_one_line(capsys, lambda: list(HuggingFaceDocuments(str(folder), None)))  # noqa: B023


def test_no_network_is_one_line(tmp_path):
    """The hub at a port where nothing listens."""
    pytest.importorskip("datasets", reason="streaming goes through the datasets package")
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    command = [*prepare_command("fineweb"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "check its name and the network" in done.stderr
    assert not (tmp_path / "out").exists()


def test_datasets_is_asked_for_where_it_is_missing(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in fails_in_one_line(capsys, lambda: list(HuggingFaceDocuments("nobody/nothing", None)))


# --- published shards


def published(folder: Path) -> Path:
    folder.mkdir()
    dice = np.random.default_rng(0)
    for name, size in (("train_000001", 30_000), ("train_000002", 20_000), ("val_000000", 10_000)):
        write_shard(folder / f"fineweb_{name}.bin", dice.integers(0, 50257, size), 50257)
    return folder


def test_published_shards_are_linked(tmp_path, monkeypatch, capsys):
    shards = published(tmp_path / "downloaded")
    monkeypatch.chdir(tmp_path)
    link_shards(Path("downloaded"), Path("out"))
    assert all(path.is_symlink() for path in (tmp_path / "out").glob("*.bin"))
    meta = read_meta(tmp_path / "out")
    assert (meta["tokenizer"], meta["vocab_size"], meta["train_tokens"], meta["val_tokens"]) == ("gpt2", 50257, 50_000, 10_000)
    train, val = open_dataset(tmp_path / "out", 32, 50257)
    assert np.array_equal(val.shards[0], open_shard(shards / "fineweb_val_000000.bin")) and len(train.shards) == 2
    capsys.readouterr()
    assert "already holds shards" in fails_in_one_line(capsys, link_shards, shards, tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) == 4 and len(list(shards.iterdir())) == 3


@pytest.mark.parametrize(
    "name, damage, says",
    (
        ("val_000000", lambda path: path.unlink(), "val"),
        ("train_000002", lambda path: path.write_bytes(path.read_bytes()[:-2]), "truncated"),
        ("train_000001", lambda path: path.write_bytes(b"<html>not found</html>"), "not a token shard"),
        ("train_000002", lambda path: write_shard(path, np.full(5000, 50257), 50257), "50257"),
        ("val_000000", lambda path: write_shard(path, (np.arange(60_000) == 20_000) * 60_000, 50257), "beyond"),
    ),
)
def test_published_shards_are_checked(tmp_path, capsys, name, damage, says):
    damage(published(tmp_path / "downloaded") / f"fineweb_{name}.bin")
    assert says in fails_in_one_line(capsys, link_shards, tmp_path / "downloaded", tmp_path / "out")
    assert not list(tmp_path.glob("out/*"))


# --- text files


def test_damaged_archives_are_one_line(tmp_path):
    """Flipped bits in a .gz and a .xz: exit 2 or read in spite of them, never a traceback."""
    dice = np.random.default_rng(0)
    arguments = argparse.Namespace(text_key="text", encoding="utf-8", undecodable="replace")
    lines = "\n".join(json.dumps({"text": text}) for text in texts(50)).encode()
    for name, compress in (("a.jsonl.gz", gzip.compress), ("a.jsonl.xz", lzma.compress)):
        arguments.inputs, whole = [tmp_path / name], compress(lines)
        for at in dice.integers(0, len(whole), 100):
            damaged = bytearray(whole)
            damaged[at] ^= 1 << dice.integers(8)
            (tmp_path / name).write_bytes(damaged)
            try:
                list(documents_of_files(arguments))
            except SystemExit as end:
                assert end.code == 2


def run_text_prepare(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "data/text/prepare.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)


def test_text_prepare_reads_every_kind_of_file(tmp_path):
    source = tmp_path / "source" / "deeper"
    source.mkdir(parents=True)
    lines = [json.dumps({"body": text}) for text in texts(40)]
    (source / "a.txt").write_text("plain text " * 10)
    (source / "b.jsonl").write_text("\n".join(lines[:10]) + "\n\n")
    with gzip.open(source / "c.jsonl.gz", "wt") as file:
        file.write("\n".join(lines[10:20]))
    with lzma.open(source / "d.jsonl.xz", "wt") as file:
        file.write("\n".join(lines[20:]))
    (source / "ignored.md").write_text("not read")
    options = ["--tokenizer", STDLIB_VOCABULARY, "--val_fraction", 0.2, "--text_key", "body"]
    done = run_text_prepare(tmp_path / "source", "--out", tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    encoding = load_tokenizer(STDLIB_VOCABULARY)
    decoded = "".join(encoding.decode(open_shard(p).tolist()) for p in (tmp_path / "out").glob("*.bin"))
    assert sorted(decoded.split("<|endoftext|>")[1:]) == sorted([*texts(40), "plain text " * 10])


@pytest.mark.parametrize(
    "name, content, options, says",
    (
        ("a.jsonl", b"{\n", [], "line 1"),
        ("a.jsonl", b'{"text": 3}', [], "not a string"),
        ("a.jsonl", b'{"body": "x"}', [], "--text_key"),
        ("a.jsonl.gz", b"no gzip", [], "a.jsonl.gz"),
        ("a.jsonl.xz", b"no xz", [], "a.jsonl.xz"),
        ("a.md", b"text", [], "a.md"),
        ("a.txt", b"", [], "a.txt is empty"),
        ("a.txt", b"t", ["--max_tokens", "1"], "too few"),
        ("a.txt", b"caf\xe9", ["--undecodable", "refuse"], "is not utf-8"),
        ("a.txt", b"text", ["--encoding", "rot13"], "rot13"),
        ("a.txt", b"text", ["--encoding", "utf-16"], "a.txt cannot be read"),
        ("a.txt", b"text", ["--tokenizer", "gpt9"], "gpt9"),
        ("a.txt", b"text", ["--tokenizer", "none.tiktoken"], "none.tiktoken"),
        ("a.txt", b"text", ["--tokenizer", __file__ + ".tiktoken"], "tiktoken"),
        ("a.txt", b"text", ["--val_fraction", "2"], "val_fraction"),
        ("a.txt", b"text", ["--out", "/dev/null/x"], "/dev/null/x"),
    ),
)
def test_bad_text_input_is_one_line(tmp_path, name, content, options, says):
    (tmp_path / name).write_bytes(content)
    out = [] if "--out" in options else ["--out", tmp_path / "out"]
    tokenizer = [] if "--tokenizer" in options else ["--tokenizer", STDLIB_VOCABULARY]
    done = run_text_prepare(tmp_path / name, *out, *tokenizer, *options)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.startswith("nanoOEC: ")]
    assert len(errors) == 1 and says in errors[0] and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out/*"))


def prepared_text(out: Path) -> str:
    """What the shards of a folder say, train first."""
    encoding = load_tokenizer(read_meta(out)["tokenizer"], out)
    train, val = open_dataset(out, 1, encoding.n_vocab)
    return encoding.decode(np.concatenate([*train.shards, *val.shards]).tolist())


def byte_prepare(out: Path, *arguments) -> str:
    """Prepares with one token for a byte; standard error."""
    done = run_text_prepare(*arguments, "--tokenizer", "bytes", "--out", out)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize("encoding", ("utf-8", "utf-8-sig", "utf-16", "utf-32"))
def test_byte_order_marks_are_understood(tmp_path, encoding):
    lines = "Zoë wrote 日本.\n" * 120
    (tmp_path / "a.txt").write_bytes(lines.encode(encoding))
    byte_prepare(tmp_path / "text", tmp_path / "a.txt")
    assert prepared_text(tmp_path / "text") == "<|endoftext|>" + lines
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((json.dumps({"text": lines}, ensure_ascii=False) + "\n").encode(encoding)))
    byte_prepare(tmp_path / "json", tmp_path / "a.jsonl.gz")
    assert prepared_text(tmp_path / "json") == "<|endoftext|>" + lines


def test_text_in_another_encoding_is_counted_or_read_as_told(tmp_path):
    lines = "café à la carte\n" * 120
    (tmp_path / "latin.txt").write_bytes(lines.encode("latin-1"))
    assert "240 places are not utf-8" in byte_prepare(tmp_path / "a", tmp_path / "latin.txt")
    assert prepared_text(tmp_path / "a").count("\ufffd") == 240
    assert "places" not in byte_prepare(tmp_path / "b", tmp_path / "latin.txt", "--encoding", "latin-1")
    assert prepared_text(tmp_path / "b") == "<|endoftext|>" + lines
    (tmp_path / "wide.txt").write_bytes("no mark\n".encode("utf-16-le") * 50)
    assert "400 NUL characters" in byte_prepare(tmp_path / "c", tmp_path / "wide.txt")
    assert "NUL" not in byte_prepare(tmp_path / "d", tmp_path / "wide.txt", "--encoding", "utf-16-le")


def test_hidden_files_links_and_files_named_twice_are_read_once_or_said(tmp_path):
    folder = tmp_path / "source"
    for path in ("sub/a.txt", "sub/.ipynb_checkpoints/a-checkpoint.txt", "._b.txt", ".git/c.txt"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("what the file says\n" * 20)
    (folder / "link.txt").symlink_to("sub/a.txt")
    (folder / "round").symlink_to(folder)
    error = byte_prepare(tmp_path / "out", folder, folder / "sub/a.txt")
    assert prepared_text(tmp_path / "out") == "<|endoftext|>" + "what the file says\n" * 20
    assert error.count("was read before") == 2 and "round is a link to a folder: left out" in error


def test_the_tail_of_a_text_of_too_few_documents_is_for_validation(tmp_path):
    text = "".join(f"line {number}\n" for number in range(8_000))
    (tmp_path / "a.txt").write_text(text)
    assert "for validation" in byte_prepare(tmp_path / "out", tmp_path / "a.txt", "--shard_tokens", "20000")
    assert prepared_text(tmp_path / "out") == "<|endoftext|>" + text
    meta = read_meta(tmp_path / "out")
    assert meta["val_tokens"] == -(-(meta["train_tokens"] + meta["val_tokens"]) // 10)
    open_dataset(tmp_path / "out", 1024, 257)


def test_runs_of_spaces_that_tiktoken_cannot_match(tmp_path):
    """The text comes back whole, and the documents around it have tiktoken's own ids."""
    documents = [*texts(50), " " * 999_999 + "x", "\n" * 300_000 + "y z", *texts(3)]
    prepare(documents, tmp_path, STDLIB_VOCABULARY, source="test", val_fraction=1e-9)
    encoding = load_tokenizer(STDLIB_VOCABULARY)
    assert prepared_text(tmp_path) == "".join("<|endoftext|>" + text for text in documents)
    whole = np.concatenate([open_shard(path) for path in sorted(tmp_path.glob("*.bin"))])  # train, val
    expected = [token for text in documents[:50] for token in [encoding.eot_token, *encoding.encode(text)]]
    assert whole[: len(expected)].tolist() == expected


def test_a_text_that_is_cut_has_the_ids_of_the_whole():
    encoding, text = load_tokenizer(STDLIB_VOCABULARY), (ROOT / "train.py").read_text()

    class Weak:
        def encode_to_numpy(self, text, **options):
            if len(text) > 1_500:
                raise ValueError("too long")
            return encoding.encode_to_numpy(text, **options)

    assert np.array_equal(encode(Weak(), text), encoding.encode_to_numpy(text))


@pytest.mark.slow
def test_preparation_keeps_up_with_tiktoken(shared, tmp_path):
    """At least 70% of the rate at which tiktoken encodes the same documents in one batch call on the same cores."""
    with lzma.open(shared / "corpus/docs.jsonl.xz", "rt") as file:
        documents = [json.loads(line)["text"] for line in file]
    encoding = load_tokenizer("gpt2")
    ratios = []
    for turn in range(3):
        start = time.perf_counter()
        encoding.encode_batch(documents, num_threads=len(os.sched_getaffinity(0)), disallowed_special=())
        batch_call = time.perf_counter() - start
        start = time.perf_counter()
        prepare(documents, tmp_path / f"{turn}", "gpt2", source="shared corpus")
        ratios.append(batch_call / (time.perf_counter() - start))
    print(f"rate of preparation over tiktoken's batch call: {ratios}")
    assert sorted(ratios)[1] >= 0.7
