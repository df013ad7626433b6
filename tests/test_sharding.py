"""runtime/sharding.py: a sharded run is the run that it would be on one process, in a part of the memory."""

import json
import shutil
import subprocess

import pytest
import torch

from runtime.checkpoint import read_checkpoint
from tests.conftest import PATIENCE, ROOT, assert_same_bits, command, fails_in_one_line, metrics_of, run_command, tiny_arguments
from tools.sample import load_model
from train import load_config

# Trains one config after another in one group of processes.
RUNS = f"""
import json, os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
import torch.distributed as dist
from runtime.machine import start_machine
from train import Trainer, load_config

for number, words in enumerate(json.loads(sys.argv[1])):
    torch._dynamo.reset()
    config = load_config(words)
    if number == 0:
        machine = start_machine(config)
    machine.dtype = getattr(torch, config.dtype)
    trainer = Trainer(config, machine)
    held = lambda tensor: getattr(tensor, "_local_tensor", tensor).numel() * tensor.element_size()
    trainer.run()
    states = [x for optimizer in trainer.optimizers for state in optimizer.state.values() for x in state.values()]
    tokens = torch.zeros(config.micro_batch_size, config.block_size, dtype=torch.long)
    with machine.autocast():
        loss, _ = trainer.parallel(tokens, tokens)
    loss.backward()
    kept = [*trainer.model.parameters(), *(p.grad for p in trainer.model.parameters() if p.grad is not None), *states]
    (trainer.out_dir / f"held{{machine.rank}}").write_text(str(sum(map(held, kept))))
if dist.is_initialized():
    dist.destroy_process_group()
"""


@pytest.fixture
def train_all(tmp_path):
    """Runs of the given settings, one after another, in one group of so many processes."""
    script = tmp_path / "runs.py"
    script.write_text(RUNS)

    def train(processes: int, runs: list[list[str]]) -> None:
        words = command([json.dumps(runs)], processes, script=script)
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr[-3000:]

    return train


METHODS = (
    {"oec": "none"}, {"oec": "mu_loss", "mu_loss_weight": 1e-2}, {"oec": "mu_centering"}, {"oec": "mu_centering_step"},
    {"oec": "none", "z_loss_weight": 1e-2}, {"oec": "mu_centering", "logit_softcap": 3.0},
)  # fmt: skip


def assert_same_losses(a, b, tolerance: float):
    for x, y in zip(metrics_of(a), metrics_of(b), strict=True):
        for name in ("loss", "grad_norm", "mu_norm", "stored_mu_norm", "logit_std", "cast_nats"):
            if name in x or name in y:  # an evaluation has no gradient
                assert x[name] == pytest.approx(y[name], abs=tolerance, rel=tolerance), (a.name, x["split"], x["step"], name)


@pytest.mark.slow  # up to eighteen runs
@pytest.mark.parametrize("tied", (False, True))
@pytest.mark.parametrize("processes", (2, 4))
def test_a_sharded_run_is_the_unsharded_run(data, tmp_path, train_all, processes, tied):
    """Over 20 steps in float32, for every method: on one process, on several, sharded, and sharded in two copies."""
    changes = {"max_steps": 20, "eval_interval": 10, "eval_sequences": 11, "batch_size": 16, "micro_batch_size": 2, "tie_weights": tied}
    arguments = lambda name, number, **more: tiny_arguments(data, tmp_path / f"{name}{number}", **changes | METHODS[number] | more)
    numbers = range(len(METHODS))
    train_all(1, [arguments("one", number) for number in numbers])
    train_all(processes, [arguments("sharded", number, shard=True) for number in numbers])
    others = [arguments("copied", number) for number in numbers] if processes == 2 else []
    others += [arguments("hybrid", number, shard=True, shard_size=2) for number in numbers] if processes == 4 else []
    train_all(processes, others)
    for number in numbers:
        for name in ("sharded", "copied" if processes == 2 else "hybrid"):
            assert_same_losses(tmp_path / f"one{number}", tmp_path / f"{name}{number}", 1e-5)
    assert load_model(tmp_path / "sharded0")[0].num_parameters() == load_model(tmp_path / "one0")[0].num_parameters()


@pytest.mark.slow
def test_a_sharded_run_is_the_copied_run(data, tmp_path, train_all):
    train_all(2, [tiny_arguments(data, tmp_path / name, shard=name == "sharded") for name in ("copied", "sharded")])
    assert_same_losses(tmp_path / "copied", tmp_path / "sharded", 1e-5)


@pytest.mark.slow  # compiles each
@pytest.mark.parametrize("tied", (False, True))
@pytest.mark.parametrize("processes", (2, 4))
def test_compiled(data, tmp_path, train_all, processes, tied):
    """Every method over 20 steps, and one with activation checkpointing too."""
    changes = {"max_steps": 20, "eval_interval": 10, "batch_size": 16, "micro_batch_size": 4, "tie_weights": tied}
    runs = [*METHODS, {"oec": "mu_centering", "activation_checkpointing": True}]
    train_all(1, [tiny_arguments(data, tmp_path / f"one{number}", **changes | run) for number, run in enumerate(runs)])
    compiled = changes | {"compile": True, "shard": True}
    train_all(processes, [tiny_arguments(data, tmp_path / f"sharded{number}", **compiled | run) for number, run in enumerate(runs)])
    for number in range(len(runs)):
        assert_same_losses(tmp_path / f"one{number}", tmp_path / f"sharded{number}", 1e-5)


@pytest.mark.slow
def test_low_precision(data, tmp_path, train_all):
    """bfloat16, and float16 with its scaler, differ from a copied run by rounding alone."""
    for dtype in ("bfloat16", "float16"):
        for name, shard in (("copied", False), ("sharded", True)):
            train_all(2, [tiny_arguments(data, tmp_path / f"{name}_{dtype}", dtype=dtype, shard=shard)])
        assert_same_losses(tmp_path / f"copied_{dtype}", tmp_path / f"sharded_{dtype}", 3e-2)


@pytest.mark.slow
def test_a_drift_is_removed_before_w_is_cast(data, tmp_path, train_all):
    """With every embedding moved by 1,000, bfloat16 loses nats without centring and nothing with it, sharded or not."""
    base = tiny_arguments(data, tmp_path / "base", oec="none", dtype="float32")
    assert run_command(base).returncode == 0
    state = torch.load(tmp_path / "base/ckpt_0000012.pt", weights_only=True)
    state["model"]["unembedding.weight"][:300] += 1000.0
    torch.save(state | {"step": 0, "evaluated_step": 0}, tmp_path / "drifted.pt")
    runs = [tiny_arguments(data, tmp_path / oec, oec=oec, dtype="bfloat16", shard=True, init_from=tmp_path / "drifted.pt", max_steps=1, warmup_steps=0, learning_rate=1e-9, min_learning_rate=0)
            for oec in ("none", "mu_centering")]  # fmt: skip
    train_all(2, runs)
    before = metrics_of(tmp_path / "base")[-1]["loss"]
    after = {oec: metrics_of(tmp_path / oec)[-1]["loss"] for oec in ("none", "mu_centering")}
    assert after["mu_centering"] == pytest.approx(before, abs=0.02) and after["none"] > before + 0.5


@pytest.mark.slow
@pytest.mark.parametrize("processes", (2, 4))
def test_stopped_and_resumed_on_any_number_of_processes(data, tmp_path, train_all, processes):
    """Bit for bit on as many; up to rounding on another number, sharded or not."""
    changes = {"eval_interval": 3, "batch_size": 16, "micro_batch_size": 2}
    words = lambda out, **more: tiny_arguments(data, tmp_path / out, **changes | more)
    train_all(processes, [words("whole", shard=True)])
    for out in ("same", "one", "two", "copied"):  # as if each had been stopped after step 9
        (tmp_path / out).mkdir()
        for name in ("ckpt_0000009.pt", "config.json", "metrics.jsonl"):
            shutil.copy(tmp_path / "whole" / name, tmp_path / out)
    train_all(processes, [words("same", shard=True)])
    train_all(1, [words("one")])
    train_all(2, [words("two", shard=True), words("copied")])
    states = [read_checkpoint(tmp_path / out / "ckpt_0000012.pt") for out in ("whole", "same", "one", "two", "copied")]
    for state in states:
        for name in ("out_dir", "shard"):
            del state["config"][name]
    assert_same_bits(states[0], states[1])
    for state in states[2:]:
        for name, weight in states[0]["model"].items():
            torch.testing.assert_close(state["model"][name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("processes, most", ((2, 0.55), (4, 0.3)))
def test_each_process_holds_its_part(data, tmp_path, train_all, processes, most):
    """Weights, gradients and moments, of a model of 100 MB."""
    changes = {"n_embd": 768, "n_head": 12, "n_layer": 4, "batch_size": 4, "micro_batch_size": 1, "max_steps": 1, "warmup_steps": 0, "eval_interval": 0, "eval_sequences": 4}
    for name in ("copied", "sharded"):
        train_all(processes, [tiny_arguments(data, tmp_path / name, shard=name == "sharded", **changes)])
    copied, sharded = (max(int(path.read_text()) for path in (tmp_path / name).glob("held*")) for name in ("copied", "sharded"))
    assert copied > 4 * 100e6 and sharded <= most * copied


@pytest.mark.parametrize(
    "words, processes, says",
    (
        (["--shard=True"], 1, "processes=1"),
        (["--shard=True", "--shard_size=3"], 4, "shard_size=3"),
        (["--shard=True", "--shard_size=1"], 4, "shard_size=1"),
        (["--shard_size=2"], 4, "needs shard=True"),
        (["--shard=True", "--optimizer=muon"], 4, "optimizer=muon"),
    ),
)
def test_what_cannot_be_sharded_is_one_line(monkeypatch, capsys, words, processes, says):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    assert says in fails_in_one_line(capsys, load_config, words)


@pytest.mark.slow
def test_another_models_checkpoint_is_one_line(data, tmp_path):
    assert run_command(tiny_arguments(data, tmp_path / "out", max_steps=4)).returncode == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    done = run_command([*tiny_arguments(data, tmp_path / "out", shard=True), "--n_embd=64"], 2)
    ours = {line for line in done.stderr.splitlines() if "nanoOEC: " in line}  # each process says the same
    assert done.returncode != 0 and len(ours) == 1 and "n_embd was 32, is 64" in ours.pop()
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
