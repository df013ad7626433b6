"""tools/: from the command line, on a run that the test has trained."""

import importlib.util
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from data.prepare import prepare
from tests.conftest import ROOT, tiny_arguments
from tools.sweep import lr_sensitivity, read_sweep

has_matplotlib = importlib.util.find_spec("matplotlib") is not None


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    from tests.conftest import run_command

    folder = tmp_path_factory.mktemp("run")
    documents = [f"the number {i} comes before the number {i + 1}.\n" * 5 for i in range(400)]
    prepare(documents, folder / "data", str(ROOT / "data/stdlib/vocabulary.tiktoken"), source="test", val_fraction=0.1)
    done = run_command(tiny_arguments(folder / "data", folder / "out", vocab_size=4096, max_steps=8))
    assert done.returncode == 0, done.stderr
    return folder / "out"


def tool(name, *arguments):
    command = [sys.executable, "-m", f"tools.{name}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_sample_continues_a_prompt(run_folder):
    options = ["--prompt", "the number 12", "--tokens", 20]
    first, again, other = (tool("sample", run_folder, *options, "--seed", seed) for seed in (1, 1, 2))
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("the number 12") and len(first.stdout) > len("the number 12\n")
    assert first.stdout == again.stdout != other.stdout
    checkpoint = sorted(run_folder.glob("ckpt_*.pt"))[-1]
    assert tool("sample", checkpoint, *options, "--seed", 1).stdout == first.stdout


def test_sample_refuses_what_is_no_model(run_folder, tmp_path):
    damaged = tmp_path / "ckpt_0000008.pt"
    damaged.write_bytes((run_folder / "ckpt_0000008.pt").read_bytes()[:-100])
    alien = tmp_path / "alien.pt"
    torch.save({"weights": torch.zeros(3)}, alien)
    for arguments in ([tmp_path / "none"], [damaged], [alien], [run_folder, "--tokens", "-1"], [run_folder.parent]):
        done = tool("sample", *arguments)
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert done.stderr.startswith("nanoOEC: ")


# --- sweep


def test_lr_sensitivity_by_hand():
    assert lr_sensitivity([3.0, 3.0, 3.0], 10.0) == 0
    assert lr_sensitivity([3.0, 4.0, 5.0], 10.0) == 1.5
    assert lr_sensitivity([3.0, 30.0], 10.0) == lr_sensitivity([3.0, float("nan")], 10.0) == lr_sensitivity([3.0, float("inf")], 10.0) == 7
    with pytest.raises(ValueError):
        lr_sensitivity([3.0], 10.0)


def test_lr_sensitivity_of_the_published_runs(shared):
    """The paper's own figures at 16M, from its measurements."""
    rows = [row for row in read_sweep(shared / "published/lr_sweep_16m_29m.csv") if row["size"] == "16M"]
    expected = {("baseline", ""): 0.306, ("zloss", "1e-04"): 0.054, ("muloss", "1e-04"): 0.031, ("mucentering", ""): 0.028}
    for key, value in expected.items():
        losses = [float(row["test_loss"]) for row in rows if (row["method"], row["lambda"]) == key]
        assert lr_sensitivity(losses, math.log(50257)) == pytest.approx(value, abs=6e-4)


def sweep_command(folder, out, *options):
    names = ("data_dir", "min_learning_rate", "eval_interval", "vocab_size", "block_size", "n_layer", "n_head", "n_embd", "batch_size", "micro_batch_size", "compile", "device", "dtype")
    words = [w for w in tiny_arguments(folder, "", eval_interval=4) if w[2:].split("=")[0] in names]
    extra = ["--min_learning_rate=1e-5", "--warmup_steps=2", "--max_steps=8", "--log_interval=2", "--out", str(out), *options]
    return [sys.executable, "-m", "tools.sweep", *words, *extra]


def test_a_sweep_is_killed_and_goes_on(data, tmp_path):
    """Two cells, one of them diverging: killed in the middle, gone on with, and nothing finished is run again."""
    out = tmp_path / "sweep"
    command = sweep_command(data, out, "--methods", "baseline,mu_centering", "--learning_rates", "1e-2,1e30", "--max_bad_steps=2", "--grad_clip=0")
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (out / "sweep.csv").exists() and first.poll() is None:
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGINT)
    output, _ = first.communicate(timeout=60)
    assert first.returncode == 2 and "goes on from here" in output, output
    before = (out / "sweep.csv").read_text().splitlines()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stdout + again.stderr
    rows = read_sweep(out / "sweep.csv")
    assert set(before) <= set((out / "sweep.csv").read_text().splitlines())
    assert [(row["method"], row["learning_rate"]) for row in rows] == [(m, r) for m in ("baseline", "mu_centering") for r in ("0.01", "1e+30")]
    for row in rows:
        assert row["status"] == ("diverged" if row["learning_rate"] == "1e+30" else "done")
        assert float(row["test_loss"]) == pytest.approx(math.log(300)) or row["status"] == "done"
    assert "| baseline |" in (out / "summary.md").read_text() and "1 of 2" in again.stdout
    third = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "4 of 4 cells are there, 0 to run" in third.stdout
    other = subprocess.run([*command, "--n_layer=3"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert other.returncode == 2 and "n_layer was 2, is 3" in other.stderr
    if has_matplotlib:
        done = tool("plot", out / "sweep.csv", "--out", tmp_path / "figure")
        assert done.returncode == 0 and (tmp_path / "figure.png").stat().st_size > 10_000, done.stderr


@pytest.mark.parametrize(
    "options, says",
    (
        (["--methods", "adam"], "adam"),
        (["--learning_rates", "1e-3,fast"], "fast"),
        (["--learning_rates", "-1"], "-1"),
        (["--seeds", "one"], "--seeds"),
        (["--jobs", "99"], "--jobs"),
        (["--n_layers=3"], "n_layer"),
    ),
)
def test_sweep_refuses_bad_input(data, tmp_path, options, says):
    done = subprocess.run(sweep_command(data, tmp_path / "out", *options), cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_things_is_no_sweep(data, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    done = subprocess.run(sweep_command(data, tmp_path / "mine"), cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "holds no sweep" in done.stderr


# --- plot


@pytest.mark.parametrize(
    "text, says",
    (
        ("method,learning_rate,test_loss\nbaseline,,3\n", "line 2: learning_rate is missing"),
        ("method,learning_rate,test_loss\nbaseline,0.1,three\n", "test_loss='three' is no number"),
        ("method,learning_rate,test_loss\n", "no row"),
        ("\0", ""),
    ),
)
def test_bad_tables_are_one_line(tmp_path, text, says):
    (tmp_path / "bad.csv").write_text(text)
    done = tool("plot", tmp_path / "bad.csv")
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.skipif(not has_matplotlib, reason="figures need: pip install matplotlib")
def test_curves_and_geometry_are_drawn(run_folder, tmp_path):
    for arguments in ([run_folder], ["--geometry", run_folder]):
        done = tool("plot", *arguments, "--out", tmp_path / "figure")
        assert done.returncode == 0 and (tmp_path / "figure.svg").stat().st_size > 10_000, done.stderr
    assert "mu_ratio" in done.stdout


@pytest.mark.parametrize("name", ("sample", "sweep", "plot", "bench"))
def test_help(name):
    done = tool(name, "--help")
    assert done.returncode == 0 and "--" in done.stdout
