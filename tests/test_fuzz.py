"""Random and mutated settings, config files, shards and meta.json: refused in one line or accepted for good reason.

20,000 inputs of each kind: `python -m pytest tests/test_fuzz.py -m slow`.
"""

import contextlib
import io
import json
import math
import shutil
import struct
from typing import Literal, get_args, get_origin

import numpy as np
import pytest
import torch

from data.shards import open_dataset, read_meta
from tests.conftest import ROOT, VOCAB, tiny_folder
from train import TrainConfig, learning_rate, load_config

hypothesis = pytest.importorskip("hypothesis", reason="fuzzing needs: pip install hypothesis")
from hypothesis import strategies as st  # noqa: E402


def fuzz(*strategies):
    """The check on a few hundred inputs, and, marked slow, on 20,000."""

    def decorate(check):
        def test(folder, n_inputs):
            @hypothesis.settings(max_examples=n_inputs, deadline=10_000, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck))
            @hypothesis.given(st.tuples(*strategies))
            def run(inputs):
                check(folder, *inputs)

            run()

        return pytest.mark.parametrize("n_inputs", (300, pytest.param(20_000, marks=pytest.mark.slow)))(test)

    return decorate


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("fuzz") / "data")


def accepted(function, *arguments):
    """What `function` returns; None where it ended the program as it should: status 2 and one line (0 for --help)."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            return function(*arguments)
    except SystemExit as end:
        message = err.getvalue()
        if end.code == 0:
            assert "--help" in arguments[0] or "-h" in arguments[0]
        else:
            assert end.code == 2 and message.startswith("nanoOEC: ") and message.count("\n") == 1, (end.code, message)


def assert_sane(config: TrainConfig):
    for name, field in TrainConfig.__dataclass_fields__.items():
        value = getattr(config, name)
        assert value in get_args(field.type) if get_origin(field.type) is Literal else type(value) is field.type, name
        assert field.type not in (int, float) or math.isfinite(value) and value >= 0, name
    assert config.n_embd % config.n_head == 0 and config.batch_size % config.micro_batch_size == 0
    assert (ROOT / "data" / config.dataset).resolve().parent == ROOT / "data"
    for step in (0, config.max_steps // 2, config.max_steps - 1):
        assert 0 <= learning_rate(config, step) <= config.learning_rate * (1 + 1e-9)


names = st.sampled_from([*TrainConfig.__dataclass_fields__]) | st.text(max_size=12)
numbers = st.one_of(st.integers(), st.integers(-2, 5000), st.floats(), st.booleans())
words = st.text(max_size=20) | st.sampled_from(["cpu", "cuda", "auto", "float16", "none", "mu_loss", "muon", "wsd", "stdlib", "..", "a/b", "1_0", "1e400", "²"])
settings = st.builds("--{}={}".format, names, numbers | words)
shipped = st.sampled_from([str(path) for path in sorted((ROOT / "config").glob("*.py"))] + ["config/none.py", "--help"])



@fuzz(st.lists(settings | shipped | words, max_size=4))
def test_settings(folder, argv):
    if config := accepted(load_config, argv):
        assert_sane(config)


@fuzz(st.lists(st.builds("{} = {!r}".format, names, numbers | words | st.none() | st.lists(numbers)) | st.text(max_size=30), max_size=4))
def test_config_files(folder, lines):
    path = folder / "fuzzed.py"
    path.write_text("\n".join(lines), encoding="utf-8", errors="replace")
    if config := accepted(load_config, [str(path)]):
        assert_sane(config)


@fuzz(
    st.sampled_from(["train_000001.bin", "val_000000.bin", "train.bin"]),
    st.lists(st.tuples(st.sampled_from("hbtax"), st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1)), max_size=3),
)
def test_shards(folder, name, mutations):
    work = folder.with_name("mutated")
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(folder, work)
    path = work / name
    original = (folder / "train_000001.bin").read_bytes()
    blob = bytearray(original)
    for kind, at, value in mutations:
        if kind == "h":  # a field of the header
            place = 4 * (at % 4)
            blob[place : place + 4] = struct.pack("<I", value)
        elif kind == "b" and blob:  # a byte anywhere
            blob[at % len(blob)] = value % 256
        elif kind == "t":  # cut off
            del blob[at % (len(blob) + 1) :]
        elif kind == "a":  # longer
            blob += bytes([value % 256]) * (at % 5000)
        elif kind == "x":  # a stretch removed
            del blob[at % (len(blob) + 1) :][: value % 100]
    path.write_bytes(blob)
    if windows := accepted(open_dataset, work, 32, VOCAB):
        shard = next(shard for split in windows for p, shard in zip(split.paths, split.shards) if p == path)
        assert blob[:8] == original[:8] and len(shard) == struct.unpack("<i", blob[8:12])[0]
        assert len(blob) == 1024 + 2 * len(shard)
        assert all(sample.max() < VOCAB for split in windows for sample in split.samples())


@fuzz(
    st.recursive(st.none() | numbers | words, lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["vocab_size", "tokenizer"]) | words, inner)),
    st.lists(st.tuples(st.integers(0, 500), st.binary(max_size=3)), max_size=2),
    st.integers(0, 2000),
)
def test_meta(folder, value, mutations, depth):
    blob = bytearray(json.dumps(value, ensure_ascii=False).encode("utf-8", errors="surrogatepass"))
    for at, inserted in mutations:
        blob[at % (len(blob) + 1) : at % (len(blob) + 1) + 1] = inserted
    work = folder.with_name("meta")
    work.mkdir(exist_ok=True)
    (work / "meta.json").write_bytes(blob if depth < 1990 else b"[" * 100 * depth)
    meta = accepted(read_meta, work)
    assert meta is None or type(meta["vocab_size"]) is int and type(meta["tokenizer"]) is str
