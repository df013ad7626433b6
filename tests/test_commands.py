"""Whole command lines, as people type them: piped into `head`, interrupted, on a poor terminal, into a folder that is read-only."""

import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import runtime.errors
from runtime.folder import read_metrics
from tests.conftest import PATIENCE, ROOT, tiny_arguments, tiny_folder, train_on_text
from tools.sweep import read_sweep

TOOLS = ("sample", "sweep", "plot", "bench", "memory", "why", "drift", "export_hf", "import_hf")
SCRIPTS = ("train.py", *(f"data/{name}/prepare.py" for name in ("text", "openwebtext", "fineweb", "stdlib")))


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


def assert_clean(run: subprocess.Popen, statuses: tuple[int, ...]):
    _, error = run.communicate(timeout=PATIENCE)
    assert run.returncode in statuses and "Traceback" not in error and "Exception ignored" not in error, (run.returncode, error)


@pytest.mark.slow
@pytest.mark.parametrize("name", (*TOOLS, *SCRIPTS))
def test_help_into_a_closed_pipe_without_unicode(name):
    reading, writing = os.pipe()
    os.close(reading)
    assert_clean(start(name, "--help", stdout=writing, env=os.environ | {"PYTHONIOENCODING": "ascii"}), (0, 141))
    os.close(writing)


@pytest.mark.slow
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


@pytest.mark.slow
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
        _, error = run.communicate(timeout=PATIENCE)
        if run.returncode:
            assert run.returncode == 2 and "another process is running a sweep in" in error and error.count("\n") == 1, error
            assert subprocess.run(command("sweep", *words, method), cwd=ROOT, capture_output=True).returncode == 0
    assert {row["method"] for row in read_sweep(tmp_path / "out/sweep.csv")} == {"baseline", "mu_loss", "softcap", "z_loss"}


@pytest.mark.slow
def test_two_preparations_of_one_folder_write_it_once(tmp_path):
    """Of two at the same moment one is refused, or finds the folder done."""
    text = tmp_path / "text.txt"
    text.write_text("one document of a few words\n\n" * 200_000)
    words = [text, "--tokenizer", ROOT / "data/stdlib/vocabulary.tiktoken", "--out"]
    assert start("data/text/prepare.py", *words, tmp_path / "alone").wait(PATIENCE) == 0
    runs = [start("data/text/prepare.py", *words, tmp_path / "both") for _ in range(2)]
    statuses = []
    for run in runs:
        _, error = run.communicate(timeout=PATIENCE)
        refusals = [line for line in error.replace("\r", "\n").splitlines() if line.startswith("nanoOEC: ")]
        assert run.returncode in (0, 2) and "Traceback" not in error and len(refusals) == (run.returncode == 2), error
        statuses.append(run.returncode)
    assert 0 in statuses
    alone, both = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.is_file()} for name in ("alone", "both"))
    assert alone == both


@pytest.mark.slow
def test_a_run_is_read_while_it_trains(tmp_path):
    """Sampling and drawing beside a run that writes and deletes a checkpoint every few milliseconds."""
    out = train_on_text(tmp_path, max_steps=8, oec="none")
    settings = [word for word in tiny_arguments(tmp_path / "data", out, vocab_size=4096, oec="none") if not word.startswith("--max_steps")]
    run = start("train.py", *settings, "--max_steps=100000", "--eval_interval=1", "--eval_sequences=1", stdout=subprocess.DEVNULL)
    try:
        while not any(line["step"] > 8 for line in read_metrics(out)):
            assert run.poll() is None, run.communicate()
        for name, words in (("sample", [out, "--tokens", 5]), ("drift", [out, "--mean_logit", 9, "--out", tmp_path / "d.pt"]), ("plot", [out, "--out", tmp_path / "figure"])):
            if name != "plot" or importlib.util.find_spec("matplotlib"):
                done = subprocess.run(command(name, *words), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
                assert done.returncode == 0, done.stderr
        assert run.poll() is None
    finally:
        run.terminate()
        run.communicate(timeout=PATIENCE)
    assert run.returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="figures need: pip install matplotlib")
def test_a_sweep_is_drawn_while_it_runs(tmp_path):
    data, out = tiny_folder(tmp_path / "data"), tmp_path / "out"
    run = start("sweep", *SWEEP, f"--data_dir={data}", "--methods", "baseline,z_loss,softcap", "--learning_rates", "1e-2", "--out", out)
    while not (out / "sweep.csv").exists():
        assert run.poll() is None, run.communicate()
        time.sleep(0.01)
    done = subprocess.run(command("plot", out / "sweep.csv", "--out", tmp_path / "figure"), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0 and (tmp_path / "figure.svg").is_file(), done.stderr
    assert_clean(run, (0,))
    assert len(read_sweep(out / "sweep.csv")) == 3


def has_loaded(pid: int, library: str) -> bool:
    return library in Path(f"/proc/{pid}/maps").read_text()


def test_process_0_says_a_mistake_before_the_others(monkeypatch, capsys):
    """torchrun ends all processes when the first one fails: the same line is not printed eight times."""
    waits = []
    monkeypatch.setattr(runtime.errors.time, "sleep", waits.append)
    for rank, expected in (("0", []), ("7", [3])):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit, match="2"):
            runtime.errors.fail("wrong")
        assert waits == expected and capsys.readouterr().err == "nanoOEC: wrong\n"


def test_ctrl_c_in_an_import_is_not_lost_where_c_code_drops_it(tmp_path):
    (tmp_path / "swallows.py").write_text("import signal\ntry:\n    signal.raise_signal(signal.SIGINT)\nexcept BaseException:\n    pass\n")
    program = "import runtime.errors; runtime.errors.end_cleanly(); import swallows; print('continues with half a module')"
    run = subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (130, "", "nanoOEC: stopped\n")


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
        while run.poll() is None and not has_loaded(run.pid, "_multiarray_umath" if name.startswith("data/") else "libtorch_cpu"):
            time.sleep(0.01)
        time.sleep(dice.uniform(0, 4))
        run.send_signal(signal.SIGINT)
        _, error = run.communicate(timeout=PATIENCE)
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
    done = subprocess.run(command(name, *words), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert sum(line.startswith("nanoOEC: ") for line in done.stderr.splitlines()) == 1, done.stderr
