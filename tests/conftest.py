"""What the test files share: a tiny dataset, tiny runs in this process and in others, and the shared real data."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from data.prepare import prepare
from data.shards import shard_header

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("OEC_SHARED", ROOT.parent / "shared"))
# A shell starts programs in the background with Ctrl-C ignored, and the programs of the tests would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
PATIENCE = 1200  # seconds after which a program counts as hung, on however slow or busy a machine
VOCAB = 300  # not a multiple of 128: padding rows exist


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU here"))


@pytest.fixture(autouse=True)
def compiled_afresh():
    """PyTorch compiles a function a few times and then runs it as it is: a test of compiled code would test that instead."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


@pytest.fixture(scope="session")
def shared():
    if not SHARED.is_dir():
        pytest.skip(f"needs the shared real data at {SHARED} ($OEC_SHARED)")
    os.environ["TIKTOKEN_CACHE_DIR"] = str(SHARED / "tiktoken")
    return SHARED


def write_shard(path: Path, tokens: np.ndarray, vocab_size: int = VOCAB):
    header, token_type = shard_header(len(tokens), vocab_size)
    path.write_bytes(header.tobytes() + tokens.astype(token_type).tobytes())


def tiny_folder(folder: Path) -> Path:
    """Two train shards of uneven length and a val shard; each token mostly follows from the one before."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for name, size in {"train_000000": 20_011, "train_000001": 13_007, "val_000000": 4_003}.items():
        steps = np.where(generator.random(size) < 0.8, 7, generator.integers(0, VOCAB, size))
        write_shard(folder / f"{name}.bin", np.cumsum(steps) % VOCAB)
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    return tiny_folder(tmp_path / "tiny")


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own, of 8 MB: room for some of the tiny model's checkpoints, or for a few small shards."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(out: Path):
    with open(out / "ballast", "wb", buffering=0) as ballast, suppress(OSError):
        while True:
            ballast.write(bytes(4096))


def tiny_arguments(data: Path, out: Path, **changes) -> list[str]:
    settings = {
        "data_dir": data, "out_dir": out, "vocab_size": VOCAB, "block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 32,
        "batch_size": 8, "micro_batch_size": 4, "max_steps": 12, "warmup_steps": 2, "learning_rate": 1e-2,
        "min_learning_rate": 1e-3, "log_interval": 1, "eval_interval": 4, "eval_sequences": 10, "device": "cpu",
        "dtype": "float32", "compile": False, "oec": "mu_centering",
    }  # fmt: skip
    return [f"--{key}={value}" for key, value in (settings | changes).items()]


@pytest.fixture
def train_here():
    """Trains in this process and gives back the Trainer."""
    from runtime.machine import start_machine
    from train import Trainer, load_config

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()

    def train(arguments):
        torch._dynamo.reset()  # each run of a test as in a process of its own
        config = load_config(arguments)
        trainer = Trainer(config, start_machine(config))
        trainer.run()
        return trainer

    yield train
    torch.set_num_threads(threads)
    signal.set_wakeup_fd(-1)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def command(arguments, processes: int = 1, launcher: bool = False, script: Path = ROOT / "train.py", **torchrun) -> list[str]:
    options = [f"--{key}={value}" for key, value in torchrun.items()]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *options]
    return [sys.executable, *(launch if launcher or processes > 1 else []), str(script), *map(str, arguments)]


def run_command(arguments, processes: int = 1, cwd=ROOT, **torchrun) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(arguments, processes, **torchrun), cwd=cwd, timeout=PATIENCE, capture_output=True, text=True
    )


def train_on_text(folder: Path, **changes) -> Path:
    """The folder of a run on text of the built-in vocabulary, so that it can be sampled from."""
    documents = [f"the number {i} comes before the number {i + 1}.\n" * 5 for i in range(400)]
    prepare(documents, folder / "data", str(ROOT / "data/stdlib/vocabulary.tiktoken"), source="test", val_fraction=0.1)
    done = run_command(tiny_arguments(folder / "data", folder / "out", vocab_size=4096, **changes))
    assert done.returncode == 0, done.stderr
    return folder / "out"


def metrics_of(out: Path, timings: bool = False) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return lines if timings else [{k: v for k, v in x.items() if k not in ("tokens_per_second", "mfu")} for x in lines]


def assert_same_bits(a, b, where: str = ""):
    """Two trees of dicts, lists, tensors and plain values, equal to the last bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same_bits(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, pair in enumerate(zip(a, b)):
            assert_same_bits(*pair, f"{where}/{index}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def fails_in_one_line(capsys, function, *arguments) -> str:
    """The single line on standard error of a program that ends with exit status 2."""
    with pytest.raises(SystemExit) as end:
        function(*arguments)
    assert end.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("nanoOEC: "), lines
    return lines[0]
