"""tools/drift.py: a transplanted drift changes nothing but the rounding, and rounding_nats says what that costs."""

import csv
import importlib.util
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

import oec
from data.prepare import prepare
from model import GPT, GPTConfig
from runtime.checkpoint import read_checkpoint, save_weights
from tests.conftest import ROOT, fails_in_one_line, metrics_of, run_command, tiny_arguments, write_shard
from tools import drift
from tools.sample import load_model
from train import mu_metrics

TEXTS = [f"the number {i} comes before the number {i + 1}.\n" * 5 for i in range(400)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that has learned something, and not too much: its hidden states share a direction, and it is unsure of the next
    token. (Independent errors of variance v cost v/2 · (1 − Σp²): the rule is for text, where Σp² is small.)"""
    folder = tmp_path_factory.mktemp("trained")
    prepare(TEXTS, folder / "data", str(ROOT / "data/stdlib/vocabulary.tiktoken"), source="test", val_fraction=0.1)
    done = run_command(tiny_arguments(folder / "data", folder / "out", vocab_size=4096, max_steps=24, eval_interval=24, log_interval=24))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def refused(capsys, monkeypatch):
    def run(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["drift", *map(str, arguments)])
        return fails_in_one_line(capsys, drift.main)

    return run


def test_a_transplanted_drift_is_the_same_function(trained):
    """In float64: the losses, and every probability."""
    model, config = load_model(trained / "out")
    hidden, targets = drift.hidden_of_run(model, config)
    hidden, W, V = hidden.double(), model.unembedding.weight.detach().double(), 4096
    drifted = drift.transplant(W, hidden, 588.0, V)
    assert oec.diagnose(hidden, drifted, V)["logit_mean"] == pytest.approx(588, abs=1e-6)
    assert torch.equal(drifted[V:], W[V:])
    probabilities = [torch.softmax(hidden[:200] @ w[:V].T, dim=1) for w in (W, drifted)]
    torch.testing.assert_close(*probabilities, rtol=1e-9, atol=1e-15)
    losses = [oec.unembedding_loss(hidden, w, targets, vocab_size=V).loss for w in (W, drifted)]
    torch.testing.assert_close(*losses, rtol=1e-11, atol=0)


@pytest.mark.parametrize("mean_logit", (92.0, 200.0, 300.0, 550.0))
def test_rounding_nats_is_within_half_of_what_is_measured(trained, mean_logit):
    model, config = load_model(trained / "out")
    hidden, targets = drift.hidden_of_run(model, config)
    W, V = model.unembedding.weight.detach(), 4096
    drifted = drift.transplant(W, hidden, mean_logit, V)
    exact, low = (drift.loss_of(arm, hidden, drifted, targets, V) for arm in ("float32", "logits in bfloat16"))
    model.unembedding.weight.data, model.config.oec = drifted, "none"
    with torch.autocast("cpu", torch.bfloat16):
        said = drift.unembedding_loss(hidden, drifted, targets, vocab_size=V).rounding_nats.item()
    said += mu_metrics(model, torch.bfloat16)["cast_nats"]  # as train.py logs it
    assert 0.008 < low - exact < 0.8
    assert 1 / 1.5 < said / (low - exact) < 1.5
    assert drift.loss_of("centred, logits in bfloat16", hidden, drifted, targets, V) == pytest.approx(exact, abs=2e-3)


@pytest.mark.slow
def test_a_drifted_checkpoint_starts_a_run(trained, tmp_path):
    """By the command line; its first losses show what rounding costs, and the metric says so."""
    out = tmp_path / "drifted.pt"
    tool = [sys.executable, "-m", "tools.drift", str(trained / "out"), "--mean_logit", "588", "--out", str(out)]
    done = subprocess.run(tool, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "mean logit 588.0 ±" in done.stdout, done.stdout + done.stderr
    state = read_checkpoint(out)
    assert state["step"] == 0 and state["optimizers"] == []
    lines = {}
    for dtype, method in (("float32", "none"), ("bfloat16", "none"), ("bfloat16", "mu_centering")):
        options = {"vocab_size": 4096, "init_from": out, "dtype": dtype, "oec": method, "learning_rate": 1e-9, "min_learning_rate": 0.0}
        run = tmp_path / f"{dtype}-{method}"
        done = run_command(tiny_arguments(trained / "data", run, max_steps=2, warmup_steps=0, eval_interval=0, eval_sequences=64, **options))
        assert done.returncode == 0, done.stderr
        lines[dtype, method] = metrics_of(run)[-1]
        assert ("rounding costs" in done.stdout) == ("resume with --oec=mu_centering --out_dir=" in done.stdout) == ((dtype, method) == ("bfloat16", "none"))
    exact, low, centred = (line["cross_entropy"] for line in lines.values())
    assert low - exact > 0.1 and abs(centred - exact) < 5e-3
    assert lines["bfloat16", "none"]["logit_mean"] == pytest.approx(588, rel=0.02)
    assert 1 / 2.5 < lines["bfloat16", "none"]["rounding_nats"] / (low - exact) < 2.5  # beyond half a nat it overstates
    assert lines["bfloat16", "mu_centering"]["rounding_nats"] < 1e-3
    again = subprocess.run(tool, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 2 and "there already" in again.stderr


def test_float32_logits_are_no_all_clear(trained, tmp_path):
    """Their own rounding costs nothing; that of W does, and the metric says it, from the last norm's gain: to a factor."""
    out = tmp_path / "drifted.pt"
    model, config = load_model(trained / "out")
    hidden, targets = drift.hidden_of_run(model, config)
    model.unembedding.weight.data = drift.transplant(model.unembedding.weight.detach(), hidden, 588.0, 4096)
    save_weights(out, model, config)
    W = model.unembedding.weight.detach()
    arms = ("float32", "bfloat16 products, float32 logits")
    exact, low = (drift.loss_of(arm, hidden, W, targets, 4096) for arm in arms)
    options = {"vocab_size": 4096, "init_from": out, "dtype": "bfloat16", "oec": "none", "logits_dtype": "float32", "learning_rate": 1e-9}
    done = run_command(tiny_arguments(trained / "data", tmp_path / "run", max_steps=2, warmup_steps=0, eval_interval=0, min_learning_rate=0.0, **options))
    assert done.returncode == 0, done.stderr
    said = metrics_of(tmp_path / "run")[-1]["rounding_nats"]
    assert low - exact > 0.005 and 1 / 5 < said / (low - exact) < 2


def test_the_published_runs(shared):
    """The first-order rule where the loss is small, the simulation where it is not. Below 0.01 nats seeds decide, not rounding."""
    rows = drift.published_rows(shared / "published/lr_sweep_16m_29m.csv")
    assert len(rows) == 8
    for row in rows:
        excess = row["published_excess"]
        if row["rule"] < 0.5:
            assert excess / 2 <= row["rule"] <= 2 * excess or abs(excess - row["rule"]) < 0.005, row
        if excess > 0.2:
            assert row["simulated"] == pytest.approx(excess, rel=0.25), row
    assert sum(row["published_excess"] > 0.2 for row in rows) == 4


def test_the_curve_is_written(trained, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="figures need: pip install matplotlib")
    monkeypatch.setattr(drift, "MEAN_LOGITS", (0, 300))
    monkeypatch.setattr(sys, "argv", ["drift", str(trained / "out"), "--curve", "--out", str(tmp_path / "figures/curve")])
    drift.main()
    rows = list(csv.DictReader(open(tmp_path / "figures/curve.csv")))
    excess = {(row["mean_logit"], row["arm"]): float(row["excess"]) for row in rows}
    assert len(rows) == 2 * len(drift.ARMS) and (tmp_path / "figures/curve.svg").stat().st_size > 10_000
    assert excess["300", "logits in bfloat16"] > 0.05 and abs(excess["300", "centred, logits in bfloat16"]) < 0.005
    assert excess["300", "float32"] == pytest.approx(0, abs=1e-4)


# --- bad input


def model_of(tmp_path, data, **changes):
    torch.manual_seed(0)
    config = {"vocab_size": 4096, "block_size": 32, "n_layer": 1, "n_head": 2, "n_embd": 32} | changes
    model = GPT(GPTConfig(**config))
    save_weights(tmp_path / "model.pt", model, config | {"dataset": "", "data_dir": str(data)})
    return tmp_path / "model.pt"


@pytest.mark.parametrize("changes, says", (({"tie_weights": True}, "tied"), ({"logit_softcap": 30.0}, "caps"), ({}, "is the model trained?")))
def test_models_that_cannot_drift(tmp_path, refused, changes, says):
    """The last one is untrained, on tokens of all kinds: its hidden states point everywhere."""
    (tmp_path / "data").mkdir()
    for split in ("train", "val"):
        write_shard(tmp_path / f"data/{split}_000000.bin", np.random.default_rng(0).integers(0, 4096, 20_000), 4096)
    path = model_of(tmp_path, tmp_path / "data", **changes)
    assert says in refused(path, "--mean_logit", 588, "--out", tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


def test_bad_input_is_one_line(trained, tmp_path, refused):
    run, out = trained / "out", tmp_path / "out.pt"
    alien, empty = tmp_path / "alien.pt", tmp_path / "empty"
    torch.save({"weights": torch.zeros(3)}, alien)
    empty.mkdir()
    (tmp_path / "text").write_text("some text")
    assert "overflows" in refused(run, "--mean_logit", 1e39, "--out", out)
    assert "finite" in refused(run, "--mean_logit", "nan", "--out", out)
    assert "--out" in refused(run, "--mean_logit", 588)
    assert "name of a run's checkpoint" in refused(run, "--mean_logit", 588, "--out", tmp_path / "ckpt_0000001.pt")
    assert "not a whole checkpoint" in refused(alien, "--mean_logit", 588, "--out", out)
    assert "does not exist" in refused(tmp_path / "none")
    assert "--published" in refused()
    assert "--text" in refused(empty)
    assert "not a run of ours" in refused(empty, "--curve", "--out", out)
    refused(empty, "--text", tmp_path / "text")
    (tmp_path / "bad.csv").write_text("method,learning_rate,test_loss\nbaseline,0.1,3\n")
    assert "no column" in refused("--published", tmp_path / "bad.csv")
    assert not out.exists()


@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="needs: pip install transformers")
def test_a_hugging_face_folder(trained, tmp_path, refused, monkeypatch, capsys):
    """Exported by tools.export_hf: diagnosed, and centred without a change of its function."""
    import transformers
    from transformers import AutoModelForCausalLM

    from tools.export_hf import export

    drifted, folder, centred = tmp_path / "drifted.pt", tmp_path / "folder", tmp_path / "centred"
    model, config = load_model(trained / "out")
    config["oec"] = model.config.oec = "none"
    hidden, _ = drift.hidden_of_run(model, config)
    model.unembedding.weight.data = drift.transplant(model.unembedding.weight.detach(), hidden, 100.0, 4096)
    save_weights(drifted, model, config)
    export(drifted, folder)
    (tmp_path / "text").write_text("".join(TEXTS[:20]))
    monkeypatch.setattr(sys, "argv", ["drift", str(folder), "--text", str(tmp_path / "text"), "--center", str(centred)])
    capsys.readouterr()
    drift.main()
    said = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines() if line.startswith("  ") and len(line.split()) == 2)
    assert float(said["logit_mean"]) == pytest.approx(100, rel=0.3) and float(said["rounding_nats_bfloat16"]) > 3e-3
    a, b = (AutoModelForCausalLM.from_pretrained(x) for x in (folder, centred))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = torch.arange(100, 120)[None]
    torch.testing.assert_close(*(torch.log_softmax(m(tokens).logits, -1) for m in (a, b)), rtol=1e-3, atol=1e-3)
    assert b.get_output_embeddings().weight.mean(dim=0).abs().max() < 1e-5
    assert "there already" in refused(folder, "--text", tmp_path / "text", "--center", centred)
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    assert "cannot be read" in refused(folder, "--text", tmp_path / "binary")
    (tmp_path / "nothing").write_text("")
    assert "fewer than two tokens" in refused(folder, "--text", tmp_path / "nothing")
    assert math.isfinite(float(said["cosine"]))
    short = transformers.GPT2Config(vocab_size=4096, n_positions=16, n_embd=8, n_layer=1, n_head=2, tie_word_embeddings=False)
    scaled = transformers.GraniteConfig(
        vocab_size=4096, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        tie_word_embeddings=False, logits_scaling=8.0,
    )  # fmt: skip
    for config in (short, scaled):
        tokenizer.save_pretrained(tmp_path / config.model_type)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / config.model_type)
    monkeypatch.setattr(sys, "argv", ["drift", str(tmp_path / "gpt2"), "--text", str(tmp_path / "text")])  # longer than 16 tokens
    drift.main()
    assert "loss in float32" in capsys.readouterr().out
    assert "a scale or a bias" in refused(tmp_path / "granite", "--text", tmp_path / "text")
