"""tools/: from the command line, on a run that the test has trained."""

import csv
import fcntl
import importlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import runtime.unembedding
from tests.conftest import PATIENCE, ROOT, fails_in_one_line, metrics_of, run_command, tiny_arguments, train_on_text
from tools import bench, sweep
from tools.sweep import lr_sensitivity, read_sweep
from train import load_config

has_matplotlib = importlib.util.find_spec("matplotlib") is not None


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return train_on_text(tmp_path_factory.mktemp("run"), max_steps=8)


def tool(name, *arguments):
    command = [sys.executable, "-m", f"tools.{name}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE)


@pytest.fixture
def refusal(capsys, monkeypatch):
    """The one line with which a tool, run in this process, ends with exit status 2."""

    def run(name, *arguments) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        return fails_in_one_line(capsys, importlib.import_module(f"tools.{name}").main)

    return run


def test_sample_continues_a_prompt(run_folder, capsys, monkeypatch):
    options = ["--prompt", "the number 12", "--tokens", 20]

    def sampled_here(checkpoint, seed: int) -> str:
        monkeypatch.setattr(sys, "argv", ["sample", *map(str, [checkpoint, *options, "--seed", seed])])
        importlib.import_module("tools.sample").main()
        return capsys.readouterr().out

    first = tool("sample", run_folder, *options, "--seed", 1)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("the number 12") and len(first.stdout) > len("the number 12\n")
    newest = sorted(run_folder.glob("ckpt_*.pt"))[-1]
    assert first.stdout == sampled_here(run_folder, 1) == sampled_here(newest, 1) != sampled_here(run_folder, 2)
    options[1] *= 20  # longer than the context
    assert sampled_here(run_folder, 1).startswith(options[1])


def test_sample_refuses_what_is_no_model(run_folder, tmp_path, refusal):
    damaged = tmp_path / "ckpt_0000008.pt"
    damaged.write_bytes((run_folder / "ckpt_0000008.pt").read_bytes()[:-100])
    alien = tmp_path / "alien.pt"
    torch.save({"weights": torch.zeros(3)}, alien)
    wrong_numbers = (["--tokens", -1], ["--top_k", -1], ["--temperature", "nan"], ["--temperature", 1e-40], ["--seed", 2**70])
    for arguments in ([tmp_path / "none"], [damaged], [alien], [run_folder.parent], *([run_folder, *words] for words in wrong_numbers)):
        refusal("sample", *arguments)


def test_a_diverged_model_is_not_sampled_from(run_folder, tmp_path, refusal):
    state = torch.load(run_folder / "ckpt_0000008.pt", weights_only=True)
    state["model"]["unembedding.weight"][5] = math.nan
    torch.save(state, tmp_path / "ckpt_0000008.pt")
    assert "are not finite: the run has diverged" in refusal("sample", tmp_path / "ckpt_0000008.pt")


def test_sample_asks_for_the_tokenizer_that_the_data_does_not_name(tmp_path, refusal, capsys, monkeypatch):
    """nanoGPT's shakespeare_char has no meta.json: GPT-2's words would be ones that the model never saw."""
    folder, out = tmp_path / "characters", tmp_path / "out"
    folder.mkdir()
    for name in ("train.bin", "val.bin"):
        (folder / name).write_bytes((np.arange(2_000) % 90 + 33).astype(np.uint16).tobytes())
    assert run_command(tiny_arguments(folder, out, vocab_size=257, max_steps=2, warmup_steps=1)).returncode == 0
    assert "--tokenizer" in refusal("sample", out)
    assert "does not name its tokenizer" in refusal("sample", out, "--prompt", "a")
    assert "4096 tokens, the model 257" in refusal("sample", out, "--tokenizer", str(ROOT / "data/stdlib/vocabulary.tiktoken"))
    monkeypatch.setattr(sys, "argv", ["sample", str(out), "--tokenizer", "bytes", "--prompt", "abc", "--tokens", "4"])
    importlib.import_module("tools.sample").main()
    assert capsys.readouterr().out.startswith("abc")


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


@pytest.mark.slow
def test_a_sweep_over_the_weights_of_a_method(data, tmp_path):
    options = ("--methods", "mu_loss,softcap", "--learning_rates", "1e-2", "--mu_loss_weights", "1e-4,1e2", "--softcaps", "5")
    done = subprocess.run(sweep_command(data, tmp_path / "sweep", *options), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_sweep(tmp_path / "sweep/sweep.csv")
    assert [(row["method"], float(row["lambda"])) for row in rows] == [("mu_loss", 1e-4), ("mu_loss", 1e2), ("softcap", 5)]
    assert float(rows[2]["logit_absmax"]) < 5
    assert float(rows[1]["mu_norm"]) < 0.5 * float(rows[0]["mu_norm"])  # a large λ holds μ near zero


@pytest.mark.slow
def test_a_sweep_is_killed_and_goes_on(data, tmp_path):
    """Two cells, one of them diverging: killed in the middle, gone on with, and nothing finished is run again."""
    out = tmp_path / "sweep"
    command = sweep_command(data, out, "--methods", "baseline,mu_centering", "--learning_rates", "1e-2,1e30", "--max_bad_steps=2", "--grad_clip=0")
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (out / "sweep.csv").exists() and first.poll() is None:
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGINT)
    output, _ = first.communicate(timeout=PATIENCE)
    assert first.returncode == 2 and "run the same command again" in output, output
    before = (out / "sweep.csv").read_text().splitlines()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert again.returncode == 0, again.stdout + again.stderr
    rows = read_sweep(out / "sweep.csv")
    assert set(before) <= set((out / "sweep.csv").read_text().splitlines())
    assert [(row["method"], row["learning_rate"]) for row in rows] == [(m, r) for m in ("baseline", "mu_centering") for r in ("0.01", "1e+30")]
    for row in rows:
        assert row["status"] == ("diverged" if row["learning_rate"] == "1e+30" else "done")
        assert float(row["test_loss"]) == pytest.approx(math.log(300)) or row["status"] == "done"
    assert "| baseline |" in (out / "summary.md").read_text() and "1 of 2" in again.stdout
    third = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert "4 of 4 cells are there, 0 to run" in third.stdout
    other = subprocess.run([*command, "--n_layer=3"], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
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
        (["--learning_rates", "1e-2,1e-9", "--min_learning_rate=1e-5"], "min_learning_rate=1e-05 is above learning_rate=1e-09"),
        (["--n_layers=3"], "n_layer"),
        (["--learning_rate=1e-3"], "--learning_rates"),
        (["--seed=3"], "--seeds"),
        (["--mu_loss_weight=1e-2"], "--mu_loss_weights"),
        (["--logit_softcap=30"], "--softcaps"),
        (["config/oec.py"], "--methods"),
        (["config/z_loss.py"], "--z_loss_weights"),
    ),
)
def test_sweep_refuses_bad_input(data, tmp_path, refusal, options, says):
    assert says in refusal("sweep", *sweep_command(data, tmp_path / "out", *options)[3:])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("visible, expected", (("2,5", ["2", "5", "2"]), (None, ["0", "1", "0"])))
def test_the_runs_of_a_sweep_share_out_the_gpus_that_are_visible(data, tmp_path, monkeypatch, visible, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    started = []
    monkeypatch.setattr(sweep.subprocess, "Popen", lambda *command, env, **options: started.append(env["CUDA_VISIBLE_DEVICES"]))
    cell = sweep.Cell(tiny_arguments(data, tmp_path), "baseline", "", "1e-2", "1", tmp_path)
    for slot in range(3):
        cell.start(slot, jobs=3)
    assert started == expected


def test_a_folder_of_other_things_is_no_sweep(data, tmp_path, refusal):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    assert "holds no sweep" in refusal("sweep", *sweep_command(data, tmp_path / "mine")[3:])


@pytest.mark.slow
def test_a_sweep_that_another_process_begins_is_no_folder_of_other_things(data, tmp_path, refusal):
    """The other one holds the lock and has not written sweep.json yet."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/sweep.json.tmp").touch()
    with open(tmp_path / "out/.lock", "a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        done = tool("sweep", *sweep_command(data, tmp_path / "out")[3:])  # POSIX locks are between processes
        assert done.returncode == 2 and "another process is running a sweep in" in done.stderr
    (tmp_path / "out/notes").write_text("mine")
    assert "holds no sweep" in refusal("sweep", *sweep_command(data, tmp_path / "out")[3:])


# --- what the paper leaves open


@pytest.mark.slow
def test_row_sums_are_recorded(data, tmp_path):
    """The rows of the gradient cancel; SGD keeps that, and μ where it was, and Adam does not (paper, §2)."""
    shares, moved = {}, {}
    for variant in ("row_sums", "sgd_row_sums"):
        done = tool("why", variant, *tiny_arguments(data, tmp_path / variant, oec="none"))
        assert done.returncode == 0, done.stderr
        lines = [x for x in metrics_of(tmp_path / variant) if x["split"] == "train"]
        assert all(x["gradient_row_sum"] < 1e-6 for x in lines)
        shares[variant] = max(x["update_row_sum"] for x in lines)
        moved[variant] = abs(lines[-1]["mu_norm"] - lines[0]["mu_norm"])
    assert shares["sgd_row_sums"] < 1e-3 < 0.05 < shares["row_sums"]
    assert moved["sgd_row_sums"] < 1e-6 < 1e-2 < moved["row_sums"]


def test_the_head_alone_in_float32():
    lean, why = runtime.unembedding, importlib.import_module("tools.why")
    hidden, W, targets = torch.randn(8, 16), torch.randn(50, 16), torch.arange(8)
    exact = lean.unembedding_loss(hidden, W, targets).loss
    with torch.autocast("cpu", torch.bfloat16):
        assert lean.unembedding_loss(hidden, W, targets).loss != exact
        with why.unembedding_in_float32():
            assert lean.unembedding_loss(hidden, W, targets).loss == exact
        assert lean.unembedding_loss(hidden, W, targets).loss != exact


@pytest.mark.slow
def test_a_second_command_adds_its_runs_to_natural_csv(data, tmp_path):
    settings = [word for word in tiny_arguments(data, tmp_path / "unused") if not word.startswith("--out_dir")]
    natural = ["why", "natural", *settings, "--out", tmp_path / "natural"]
    for arms in ("mu_centering", "baseline"):
        done = tool(*natural, "--arms", arms)
        assert done.returncode == 0, done.stderr

    command = [sys.executable, "-m", "tools.why", *map(str, natural[1:]), "--arms", "z_loss", "--max_steps=100000"]
    stopped = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "natural/z_loss-seed1/metrics.jsonl").exists():
        assert stopped.poll() is None, stopped.communicate()
        time.sleep(0.01)
    for child in Path(f"/proc/{stopped.pid}/task/{stopped.pid}/children").read_text().split():
        os.kill(int(child), signal.SIGTERM)
    _, error = stopped.communicate(timeout=PATIENCE)
    assert stopped.returncode == 2 and error.endswith("was stopped: the same command continues from here\n"), error

    rows = list(csv.DictReader(open(tmp_path / "natural/natural.csv")))
    assert {(row["arm"], row["seed"]) for row in rows} == {("baseline", "1"), ("mu_centering", "1")}


def test_why_refuses_what_it_does_not_know(refusal):
    assert "float32_head" in refusal("why", "precision")
    assert "float32_head" in refusal("why")


# --- plot


@pytest.mark.parametrize(
    "text, says",
    (
        ("method,learning_rate,test_loss\nbaseline,,3\n", "line 2: learning_rate is missing"),
        ("method,learning_rate,test_loss\nbaseline,0.1,three\n", "test_loss='three' is not a number"),
        ("method,learning_rate,test_loss\n", "no row"),
        ("\0", ""),
    ),
)
def test_bad_tables_are_one_line(tmp_path, refusal, text, says):
    (tmp_path / "bad.csv").write_text(text)
    assert says in refusal("plot", tmp_path / "bad.csv")


def test_a_table_need_not_have_every_lambda(tmp_path):
    rows = ["mu_loss,0.1,3,1e-4", "mu_loss,0.3,4,", "baseline,0.1,3,", "baseline,0.3,3,"]
    (tmp_path / "sweep.csv").write_text("method,learning_rate,test_loss,lambda\n" + "\n".join(rows))
    (tmp_path / "published.csv").write_text("method,learning_rate,test_loss,size\nbaseline,0.1,3,16M\nbaseline,0.3,3,16M\n")
    done = tool("plot", tmp_path / "sweep.csv", "--published", tmp_path / "published.csv", "--out", tmp_path / "figure")
    assert done.returncode == 0 if has_matplotlib else "matplotlib" in done.stderr, done.stderr


@pytest.mark.parametrize(
    "arguments, says",
    ((["--parts", "speed"], "speed"), (["--methods", "adam"], "adam"), (["--rounds", "0"], "--rounds"), (["--n_head=5"], "divisible")),
)
def test_bench_refuses_bad_input(refusal, arguments, says):
    assert says in refusal("bench", *arguments)


@pytest.mark.slow
def test_bench_measures_and_writes_json(tmp_path):
    words = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--vocab_size=300", "--block_size=32", "--batch_size=2", "--micro_batch_size=2"]
    options = ["--rounds", 2, "--seconds", 0.05, "--parts", "step,head,loader,checkpoint", "--methods", "baseline,mu_centering"]
    done = tool("bench", *words, *options, "--json", tmp_path / "bench.json")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "bench.json").read_text())
    assert [row["name"] for row in results["step"]] == ["baseline", "mu_centering"] and results["head"][0]["name"] == "three products"
    assert all(seconds > 0 for part in ("step", "head", "loader", "checkpoint") for row in results[part] for seconds in row["seconds"])


@pytest.mark.slow
def test_at_most_two_contenders_hold_a_gpu(tmp_path, monkeypatch):
    """As the bench would compare them where there is a GPU; the contenders themselves run on a CPU."""
    words = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--vocab_size=300", "--block_size=32", "--batch_size=2", "--micro_batch_size=2", "--device=cpu"]
    bench.write_data(tmp_path, load_config(words))
    running, most = [], []

    def make(name: str):
        running[:] = [contender for contender in running if contender.process.poll() is None]
        running.append(bench.Contender(name, words, tmp_path, 0.01, kind="head"))
        most.append(len(running))
        return running[-1]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    rows = bench.compare("head", [lambda name=name: make(name) for name in ("three products", "plain", "baseline")], 2)
    assert [row["name"] for row in rows] == ["three products", "plain", "baseline"] and max(most) == 2 and len(most) == 3
    assert all(row["ratio"] > 0 for row in rows)


@pytest.mark.skipif(not has_matplotlib, reason="figures need: pip install matplotlib")
def test_curves_and_geometry_are_drawn(run_folder, tmp_path, refusal):
    for arguments in ([run_folder], [run_folder, "--curves", "stored_mu_norm,loss"], ["--geometry", run_folder]):
        done = tool("plot", *arguments, "--out", tmp_path / "figure")
        assert done.returncode == 0 and (tmp_path / "figure.svg").stat().st_size > 10_000, done.stderr
    assert "mu_ratio" in done.stdout and "logit_mean" in done.stdout
    assert "no run has 'loose'" in refusal("plot", run_folder, "--curves", "loose")


@pytest.mark.skipif(not has_matplotlib, reason="figures need: pip install matplotlib")
def test_scaling_is_drawn(tmp_path, refusal):
    rows = [{"sweep": s, "size": n, "seconds": [1.0, 1.1], "tokens_per_second": 1000 / n} for s in ("vocab_size", "processes") for n in (1, 2, 4)]
    rows = [row | ({"bytes": 2**20} if row["sweep"] == "vocab_size" else {}) for row in rows]
    (tmp_path / "scaling.json").write_text(json.dumps({"scaling": rows}))
    done = tool("plot", tmp_path / "scaling.json", "--out", tmp_path / "figure")
    assert done.returncode == 0 and (tmp_path / "figure.svg").stat().st_size > 10_000, done.stderr
    (tmp_path / "other.json").write_text("{}")
    assert "other.json" in refusal("plot", tmp_path / "other.json")


@pytest.mark.parametrize("name", ("sample", "sweep", "plot", "bench", "memory", "why", "drift", "export_hf", "import_hf"))
def test_help(capsys, monkeypatch, name):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"tools.{name}").main()
    assert end.value.code == 0 and "--" in capsys.readouterr().out


# --- rescue


@pytest.mark.slow
def test_a_rescue_is_resumed_and_mends_a_drift(tmp_path_factory, tmp_path):
    """Two arms from a drift; the second call finds them there and adds a third."""
    out = train_on_text(tmp_path_factory.mktemp("rescue"), max_steps=24, eval_interval=24, oec="none")
    command = ["rescue", out, "--mean_logits", "588", "--steps", "6", "--compile", "False", "--out", tmp_path / "rescue"]
    for arms, says in (("baseline,mu_centering", "0 of 2"), ("baseline,mu_centering,float32_head", "2 of 3")):
        done = tool("why", *command, "--arms", arms)
        assert done.returncode == 0 and says in done.stdout, done.stdout + done.stderr
    rows = list(csv.DictReader(open(tmp_path / "rescue/rescue.csv")))
    last = {row["arm"]: float(row["loss"]) for row in rows if row["step"] == "6"}
    assert last["baseline"] > last["mu_centering"] + 0.1 and last["float32_head"] == pytest.approx(last["mu_centering"], abs=0.05)
    for words, says in ((["--arms", "adam"], "adam"), (["--learning_rates", "fast"], "fast"), (["--weights", "1"], "--weights")):
        done = tool("why", *command, *words)
        assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1
    before = (tmp_path / "rescue/rescue.csv").read_bytes()
    other = train_on_text(tmp_path_factory.mktemp("other"), max_steps=3, eval_interval=3, oec="none")
    for words in ((*command, "--steps", "7"), (*command[:1], other, *command[2:])):
        done = tool("why", *words, "--arms", "baseline")
        assert done.returncode == 2 and "another checkpoint or another number of steps" in done.stderr, done.stderr
    assert before == (tmp_path / "rescue/rescue.csv").read_bytes()
    (tmp_path / "bad.csv").write_text("mean_logit,step\n1,2\n")
    assert tool("plot", "--why", tmp_path / "bad.csv", tmp_path / "rescue/rescue.csv").returncode == 2
