"""Whole command lines, as people type them: piped into `head`, interrupted, on a poor terminal, into a folder that is read-only."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, tiny_folder, train_on_text
from tools.sweep import read_sweep

TOOLS = ("sample", "sweep", "plot", "bench", "memory", "why", "drift", "export_hf", "import_hf")
SCRIPTS = ("train.py", *(f"data/{name}/prepare.py" for name in ("text", "openwebtext", "fineweb")))


def command(name: str, *words) -> list[str]:
    program = [name] if name.endswith(".py") else ["-m", f"tools.{name}"]
    return [sys.executable, *program, *map(str, words)]


def start(name: str, *words, **options) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    return subprocess.Popen(command(name, *words), **pipes | options)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return train_on_text(tmp_path_factory.mktemp("run"), max_steps=8, oec="none")


SWEEP = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--vocab_size=300", "--block_size=16", "--batch_size=2", "--micro_batch_size=2",
         "--max_steps=3", "--warmup_steps=1", "--eval_interval=3", "--eval_sequences=2", "--compile=False", "--device=cpu", "--min_learning_rate=0"]  # fmt: skip


def assert_clean(run: subprocess.Popen, statuses: tuple[int, ...], seconds: float = 120):
    _, error = run.communicate(timeout=seconds)
    assert run.returncode in statuses and "Traceback" not in error and "Exception ignored" not in error, (run.returncode, error)


@pytest.mark.slow
@pytest.mark.parametrize("name", (*TOOLS, *SCRIPTS))
def test_help_into_a_closed_pipe_without_unicode(name):
    reading, writing = os.pipe()
    os.close(reading)
    assert_clean(start(name, "--help", stdout=writing, env=os.environ | {"PYTHONIOENCODING": "ascii"}), (0, 141))
    os.close(writing)


def test_a_sample_of_characters_that_the_terminal_does_not_have(run_folder):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command("sample", run_folder, "--prompt", "日本", "--tokens", 3), cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout.startswith("\\u65e5\\u672c"), done.stderr


@pytest.mark.parametrize("name, words", (("sample", ["RUN", "--tokens", 400]), ("memory", ["config/quick.py"]), ("bench", [*SWEEP, "--parts", "loader", "--rounds", 1])))
def test_head_takes_the_first_line(run_folder, name, words):
    run = start(name, *(run_folder if word == "RUN" else word for word in words))
    assert run.stdout.readline()
    run.stdout.close()
    run.stdout = None
    assert_clean(run, (0, 141))


def test_a_sweep_is_done_whoever_listens(tmp_path):
    data = tiny_folder(tmp_path / "data")
    run = start("sweep", *SWEEP, f"--data_dir={data}", "--methods", "baseline,z_loss", "--learning_rates", "1e-2", "--out", tmp_path / "out")
    assert "0 of 2 cells" in run.stdout.readline()
    run.stdout.close()
    run.stdout = None
    assert_clean(run, (0,))
    assert len(read_sweep(tmp_path / "out/sweep.csv")) == 2


@pytest.mark.slow
def test_two_sweeps_into_one_folder_lose_no_row(tmp_path):
    """The second waits for the first, or is refused; the same command then finds the rows and adds its own."""
    data = tiny_folder(tmp_path / "data")
    words = [*SWEEP, f"--data_dir={data}", "--learning_rates", "1e-2", "--out", tmp_path / "out", "--methods"]
    runs = [start("sweep", *words, method) for method in ("baseline,mu_loss", "softcap,z_loss")]
    for run, method in zip(runs, ("baseline,mu_loss", "softcap,z_loss")):
        _, error = run.communicate(timeout=120)
        if run.returncode:
            assert run.returncode == 2 and "another process is running a sweep in" in error and error.count("\n") == 1, error
            assert subprocess.run(command("sweep", *words, method), cwd=ROOT, capture_output=True).returncode == 0
    assert {row["method"] for row in read_sweep(tmp_path / "out/sweep.csv")} == {"baseline", "mu_loss", "softcap", "z_loss"}


def has_torch(pid: int) -> bool:
    return "libtorch_cpu" in Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks at what a process has loaded in Linux's /proc")
@pytest.mark.parametrize(
    "name, words",
    (("sample", ["RUN", "--tokens", 10**6]), ("memory", ["config/quick.py"]), ("plot", ["RUN"]), ("drift", ["RUN", "--mean_logit", 9, "--out", "OUT/d.pt"]),
     ("export_hf", ["RUN", "OUT/exported"]), ("import_hf", ["RUN", "OUT/i.pt"]), ("bench", [*SWEEP, "--parts", "step"]),
     ("why", ["rescue", "RUN", "--mean_logits", 9, "--compile", "False", "--out", "OUT/why"]), ("data/text/prepare.py", [ROOT, "--out", "OUT/text"])),
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_ctrl_c_at_any_moment_is_one_line(run_folder, tmp_path, name, words):
    dice = random.Random(name)
    for attempt in range(2):
        run = start(name, *(str(word).replace("RUN", str(run_folder)).replace("OUT", str(tmp_path / str(attempt))) for word in words))
        while run.poll() is None and not has_torch(run.pid):
            time.sleep(0.01)
        time.sleep(dice.uniform(0, 4))
        run.send_signal(signal.SIGINT)
        _, error = run.communicate(timeout=120)
        assert run.returncode in (130, 2, 0, -signal.SIGINT) and "Traceback" not in error, (run.returncode, error)
        assert sum(line.startswith("nanoOEC: ") for line in error.splitlines()) <= 1, error


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, words",
    (("sweep", [*SWEEP, "--data_dir=RUN/../data", "--vocab_size=4096", "--learning_rates", "1e-2", "--out", "OUT"]), ("plot", ["RUN", "--out", "OUT"]),
     ("drift", ["RUN", "--mean_logit", 9, "--out", "OUT"]), ("export_hf", ["RUN", "OUT"]), ("import_hf", ["RUN", "OUT"]),
     ("bench", [*SWEEP, "--parts", "loader", "--rounds", 1, "--json", "OUT"]), ("why", ["rescue", "RUN", "--mean_logits", 9, "--out", "OUT"]),
     ("why", ["natural", *SWEEP, "--out", "OUT"]), ("train.py", [*SWEEP, "--data_dir=RUN/../data", "--vocab_size=4096", "--out_dir=OUT"]),
     ("data/text/prepare.py", ["README.md", "--out", "OUT"])),
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_folder_that_cannot_be_written_is_one_line(run_folder, name, words):
    """/proc takes no files, of root either."""
    words = [str(word).replace("RUN", str(run_folder)).replace("OUT", "/proc/nanoOEC/out") for word in words]
    done = subprocess.run(command(name, *words), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert sum(line.startswith("nanoOEC: ") for line in done.stderr.splitlines()) == 1, done.stderr
