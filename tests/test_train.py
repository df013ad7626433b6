"""train.py: configuration, the step, one run on any number of processes, exact resume."""

import copy
import math
import os
import re
import subprocess
import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

import runtime.folder
import train
from data.shards import Loader, open_dataset, samples_of_process
from model import GPT, METHODS, METRICS, WEIGHTS, GPTConfig
from runtime.checkpoint import checkpoints, read_checkpoint, save_weights
from runtime.folder import run_name
from runtime.settings import read_config_file
from runtime.machine import Machine, multiply_bfloat16_in_float32, peak_flops, start_machine
from tests.conftest import (
    ROOT, VOCAB, assert_same_bits, fails_in_one_line, metrics_of, run_command, tiny_arguments, tiny_folder,
)  # fmt: skip
from train import TrainConfig, load_config

# --- configuration


def test_words_are_read_left_to_right_and_the_last_one_wins(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import math\n_base = 2\nn_layer = _base * 4\nlearning_rate = 1\ncompile = False\n")
    config = load_config(["--n_layer=3", str(file), "--learning_rate=0.5", "--seed=7", "--learning_rate=3e-2"])
    assert (config.n_layer, config.learning_rate, config.seed, config.compile) == (8, 0.03, 7, False)
    assert load_config([str(file)]).learning_rate == 1.0 and isinstance(load_config([str(file)]).learning_rate, float)
    assert load_config([]) == TrainConfig()


def test_the_shipped_configs_say_what_they_are():
    main_job = load_config(["config/oec.py"])
    assert main_job.oec == "mu_centering" and main_job == load_config(["config/gpt2_124m.py", "config/oec.py"])
    sizes = {"16m": (6, 4, 224), "29m": (9, 4, 320), "57m": (12, 4, 480), "109m": (15, 4, 640), "221m": (21, 4, 832)}
    for name, size in sizes.items():
        config = load_config([f"config/paper_{name}.py"])
        assert (config.n_layer, config.n_head, config.n_embd) == size
        assert (config.block_size, config.batch_size, config.max_steps, config.warmup_steps) == (2048, 64, 100_000, 5_000)
        assert (config.beta1, config.beta2, config.adam_epsilon, config.weight_decay) == (0.9, 0.95, 1e-8, 0.0)
        assert (config.grad_clip, config.min_learning_rate, config.vocab_size) == (1.0, 1e-5, 50257)
        assert config.padded_vocab_size == 50304
    methods = {
        "baseline": ("none", 0.0, 0.0), "mu_loss": ("mu_loss", 0.0, 0.0), "oec": ("mu_centering", 0.0, 0.0),
        "z_loss": ("none", 1e-4, 0.0), "softcap": ("none", 0.0, 30.0),
    }  # fmt: skip
    for name, expected in methods.items():
        config = load_config(["config/paper_16m.py", f"config/{name}.py"])
        assert (config.oec, config.z_loss_weight, config.logit_softcap) == expected


def test_every_knob_has_a_comment_and_help_shows_it(capsys):
    with pytest.raises(SystemExit) as end:
        load_config(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for name in TrainConfig.__dataclass_fields__:
        is_said = rf"^    {name}: \w+(\[.+\])? = .+  # \w"  # or the words of its type say it
        assert re.search(is_said, text, re.MULTILINE) or f"    {name}: Literal" in text, name


@pytest.mark.parametrize(
    "words, says",
    (
        (["--learning_rat=3"], "learning_rate"),
        (["--n_layer=2.5"], "n_layer"),
        (["--n_layer=two"], "int"),
        (["--compile=yes"], "True or False"),
        (["--learning_rate=nan"], "learning_rate"),
        (["--learning_rate=inf"], "learning_rate"),
        (["--learning_rate"], "--key=value"),
        (["learning_rate=3"], "--key=value"),
        (["config/none.py"], "config/none.py"),
        (["--n_embd=100", "--n_head=3"], "divisible"),
        (["--batch_size=10", "--micro_batch_size=4"], "divisible"),
        (["--oec=centering"], "mu_centering"),
        (["--dtype=float8"], "float16"),
        (["--device=tpu"], "cuda"),
        (["--optimizer=sgd"], "adamw, muon"),
        (["--schedule=linear"], "cosine, wsd"),
        (["--logits_dtype=bfloat16"], "auto, float32"),
        (["--decay_fraction=0"], "decay_fraction"),
        (["--schedule=wsd", "--max_steps=100", "--warmup_steps=90"], "overlap"),
        (["--resume=a.pt", "--init_from=b.pt"], "remove one"),
        (["--gradient_accumulation_steps=4"], "micro_batch_size"),
        (["--max_iters=4"], "max_steps"),
        (["--dropout=0.1"], "no dropout"),
        (["--min_lr=1e-5"], "min_learning_rate"),
        (["--zzz=1"], "--help lists all"),
        (["--dataset=../shared"], "--data_dir"),
        (["--dataset=/etc"], "--data_dir"),
        (["--dataset="], "--data_dir"),
        (["--dataset=.."], "--data_dir"),
        (["--max_steps=10", "--warmup_steps=10"], "warmup_steps"),
        (["--eval_interval=100", "--checkpoint_interval=150"], "multiple"),
        (["--beta2=1"], "beta2"),
        (["--seed=-1"], "seed"),
        (["--max_steps=" + "9" * 30], "max_steps"),
        (["--out_dir=a\0b"], "out_dir"),
        (["--=3"], "unknown"),
        ([""], "neither"),
    ),
)
def test_bad_settings_are_one_line(capsys, words, says):
    assert says in fails_in_one_line(capsys, load_config, words)


@pytest.mark.parametrize(
    "content, says",
    (
        ("n_layers = 2", "n_layer"),
        ("n_layer = True", "must be int"),
        ("n_layer = 2.0", "must be int"),
        ("learning_rate = '3'", "must be float"),
        ("compile = 1", "must be bool"),
        ("n_layer = ", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
        ("exit(0)", "SystemExit"),
        ("learning_rate = 10**400", "learning_rate"),
    ),
)
def test_bad_config_files_are_one_line(tmp_path, capsys, content, says):
    file = tmp_path / "bad.py"
    file.write_text(content)
    line = fails_in_one_line(capsys, load_config, [str(file)])
    assert says in line and "bad.py" in line


def test_functions_classes_and_modules_of_a_config_file_are_its_own(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import os\nfrom pathlib import Path\ndef half(x): return x // 2\nn_layer = half(8)\n")
    assert load_config([str(file)]) == TrainConfig(n_layer=4)


def test_config_files_are_the_table_of_methods():
    files = {"baseline": "baseline", "z_loss": "z_loss", "softcap": "softcap", "mu_loss": "mu_loss", "mu_centering": "oec"}
    for method, file in files.items():
        assert read_config_file(TrainConfig, f"config/{file}.py") == METHODS[method], file


def test_names_of_runs_say_what_switches_a_remedy_on():
    names = {method: run_name(TrainConfig(**settings), METHODS, WEIGHTS).split("-")[2] for method, settings in METHODS.items()}
    assert names == {
        "baseline": "baseline", "mu_loss": "mu_loss0.0001", "mu_centering": "mu_centering",
        "mu_centering_step": "mu_centering_step", "z_loss": "z_loss0.0001", "softcap": "softcap30",
    }  # fmt: skip
    for method, weight in WEIGHTS.items():  # a weight of 0 switches off what it belongs to
        assert "-baseline-" in run_name(TrainConfig(**METHODS[method] | {weight: 0.0}), METHODS, WEIGHTS)
    both = TrainConfig(oec="mu_centering", z_loss_weight=0.5, tie_weights=True)
    assert "-mu_centering+z_loss0.5+tied-" in run_name(both, METHODS, WEIGHTS)


def test_a_batch_must_divide_over_the_processes(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "3 processes" in fails_in_one_line(capsys, load_config, ["--batch_size=8", "--micro_batch_size=4"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU whose absence is tested")
def test_a_missing_gpu_is_one_line(data, tmp_path, capsys, train_here):
    arguments = tiny_arguments(data, tmp_path / "out", device="cuda")
    assert "finds 0 GPUs" in fails_in_one_line(capsys, train_here, arguments)
    assert not (tmp_path / "out").exists()


def test_unusable_folders_are_one_line_and_touch_nothing(data, tmp_path, capsys, train_here):
    file = tmp_path / "file"
    file.write_text("mine")
    assert "out_dir" in fails_in_one_line(capsys, train_here, tiny_arguments(data, file / "out"))
    assert "out_dir" in fails_in_one_line(capsys, train_here, tiny_arguments(data, file))
    assert file.read_text() == "mine"
    before = sorted(data.iterdir())
    for changes in ({"data_dir": tmp_path / "none"}, {"block_size": 5000}, {"vocab_size": 200}):
        fails_in_one_line(capsys, train_here, tiny_arguments(data, tmp_path / "out", **changes))
    assert sorted(data.iterdir()) == before and not list((tmp_path / "out").glob("*"))


# --- the parts of a step


def test_learning_rate_warms_up_and_falls_along_a_cosine():
    config = TrainConfig(max_steps=100, warmup_steps=10, learning_rate=1.0, min_learning_rate=0.1)
    rates = [train.learning_rate(config, step) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0 and rates[99] == pytest.approx(0.1)
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[54] + rates[55] == pytest.approx(1.1)  # half way down at half time
    assert train.learning_rate(TrainConfig(max_steps=1, warmup_steps=0), 0) == 6e-4


def test_wsd_is_constant_and_then_falls_along_a_line():
    config = TrainConfig(max_steps=100, warmup_steps=10, learning_rate=1.0, min_learning_rate=0.1, schedule="wsd", decay_fraction=0.2)
    rates = [train.learning_rate(config, step) for step in range(100)]
    assert rates[9:80] == [1.0] * 71 and rates[99] == pytest.approx(0.1)
    assert np.diff(rates[80:]) == pytest.approx([-0.9 / 20] * 19)


@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
def test_optimizer_groups_hold_each_parameter_once(optimizer):
    config = TrainConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=300, weight_decay=0.3, tie_weights=True, optimizer=optimizer)
    model = train.GPT(config)
    *before, adamw = train.make_optimizers(model, config)
    decayed, others = adamw.param_groups
    assert decayed["weight_decay"] == 0.3 and others["weight_decay"] == 0
    groups = [group for x in (*before, adamw) for group in x.param_groups]
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(map(id, model.parameters()))
    assert all(p.ndim == 2 for p in decayed["params"]) and all(p.ndim == 1 for p in others["params"])
    if optimizer == "muon":
        assert len(before[0].param_groups[0]["params"]) == 2 * 5 and [id(p) for p in decayed["params"]] == [id(model.embedding.weight)]


def test_averages_are_those_of_one_pass_over_all_tokens():
    config = TrainConfig(n_layer=1, n_head=2, n_embd=32, vocab_size=300, block_size=16)
    model = train.GPT(config).double()
    tokens = torch.randint(0, 300, (6, 17), generator=torch.Generator().manual_seed(0))
    whole = model(tokens[:, :-1], tokens[:, 1:])[1]
    parts = [(len(part), model(part[:, :-1], part[:, 1:])[1]) for part in tokens.split((1, 2, 3))]
    averaged = train.average(parts, METRICS, Machine(0, 1, torch.device("cpu"), torch.float32))
    for name, value in whole.items():
        torch.testing.assert_close(averaged[name], value, msg=name)


def test_a_metric_that_nobody_says_how_to_average_is_refused(capsys):
    machine = Machine(0, 1, torch.device("cpu"), torch.float32)
    passes = [(1, {"loss": torch.tensor(1.0), "surprise": torch.tensor(2.0)})]
    assert "'surprise'" in fails_in_one_line(capsys, train.average, passes, METRICS, machine)
    del passes[0][1]["surprise"]  # what train.py reports must be there
    assert "'cross_entropy'" in fails_in_one_line(capsys, train.average, passes, METRICS, machine)


def test_evaluation_does_not_depend_on_the_micro_batch(data, tmp_path, train_here):
    losses = []
    for micro in (1, 4, 8):
        train_here(tiny_arguments(data, tmp_path / str(micro), micro_batch_size=micro, max_steps=3))
        losses.append(metrics_of(tmp_path / str(micro))[-1]["cross_entropy"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_dropout_acts_in_training_and_not_in_evaluation(data, tmp_path, train_here, monkeypatch):
    """A change that people make. The last evaluation is that of the stored weights without dropout."""
    initialize = GPT.initialize

    def with_dropout(model):
        initialize(model)
        for block in model.blocks:
            block.mlp = torch.nn.Sequential(block.mlp, torch.nn.Dropout(0.5))

    monkeypatch.setattr(GPT, "initialize", with_dropout)
    trainer = train_here(tiny_arguments(data, tmp_path / "out", max_steps=3, log_interval=1))
    batch = torch.arange(64).reshape(2, 32)
    trainer.model.train()
    assert trainer.model(batch, batch)[0] != trainer.model(batch, batch)[0]
    again = [train.evaluate(trainer.model, trainer.val_data, trainer.config, trainer.machine, trainer.stop) for _ in range(2)]
    assert again[0] == again[1] and again[0]["cross_entropy"] == metrics_of(tmp_path / "out")[-1]["cross_entropy"]
    modes, forward = [], GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda model, *inputs: modes.append(model.training) or forward(model, *inputs))
    train_here(tiny_arguments(data, tmp_path / "modes", max_steps=2, warmup_steps=1, eval_interval=1, eval_sequences=4))
    assert modes == [True, True, False] * 2


# --- runs


def test_a_run_leaves_what_the_design_says(data, tmp_path, train_here):
    train_here(tiny_arguments(data, tmp_path / "out"))
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names[-2:] == ["config.json", "metrics.jsonl"] and "ckpt_0000012.pt" in names
    lines = metrics_of(tmp_path / "out", timings=True)
    assert [x["step"] for x in lines if x["split"] == "train"] == list(range(1, 13))
    assert [x["step"] for x in lines if x["split"] == "val"] == [4, 8, 12]
    fields = "step tokens loss cross_entropy lr grad_norm tokens_per_second mfu log_z logit_mean logit_std logit_absmax mu_norm mu_ratio"
    assert set(fields.split()) <= lines[0].keys()
    assert lines[0]["tokens"] == 8 * 32 and lines[-1]["loss"] < lines[0]["loss"] - 1
    state = read_checkpoint(tmp_path / "out" / "ckpt_0000012.pt")
    assert not any(name.startswith(("module.", "_orig_mod.")) for name in state["model"])


def test_the_last_two_checkpoints_and_the_best_are_kept(data, tmp_path, train_here, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 4.0, 5.0])
    real = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *a: real(*a) | {"cross_entropy": next(losses)})
    train_here(tiny_arguments(data, tmp_path / "out", max_steps=10, eval_interval=2))
    assert [p.name for p in sorted((tmp_path / "out").glob("ckpt*"))] == [f"ckpt_{s:07d}.pt" for s in (4, 8, 10)]


def test_a_checkpoint_that_could_not_be_written_is_not_the_best(data, tmp_path, train_here, monkeypatch):
    losses, save = iter([2.0, 1.0, 3.0, 4.0, 5.0]), runtime.folder.save_checkpoint
    real = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *a: real(*a) | {"cross_entropy": next(losses)})

    def refused_once(out_dir, state):
        if state["step"] == 4:
            raise OSError(28, "No space left on device")
        save(out_dir, state)

    monkeypatch.setattr(runtime.folder, "save_checkpoint", refused_once)
    trainer = train_here(tiny_arguments(data, tmp_path / "out", max_steps=10, eval_interval=2))
    assert [p.name for p in sorted((tmp_path / "out").glob("ckpt*"))] == [f"ckpt_{s:07d}.pt" for s in (2, 8, 10)]
    assert (trainer.best_step, trainer.best_loss) == (2, 2.0)


def test_bfloat16_products_without_units_for_them():
    """Each is the float32 product of the bfloat16 numbers, rounded once; those of other types stay what they were."""
    a, b = torch.randn(33, 65), torch.randn(65, 17)
    low_a, low_b = a.bfloat16(), b.bfloat16()
    expected, in_float32, in_float64 = (low_a.float() @ low_b.float()).bfloat16(), a @ b, a.double() @ b.double()
    library = multiply_bfloat16_in_float32.__wrapped__()  # one of this test's own
    try:
        assert torch.equal(low_a @ low_b, expected)
        assert torch.equal(torch.mm(low_a, low_b, out=torch.empty_like(expected)), expected)
        square = (low_b.float() @ low_b.T.float()).bfloat16()
        both = torch.addmm(square, low_b, low_b.T, beta=0.5, alpha=2.0)  # as Muon's iteration does
        assert torch.equal(both, torch.addmm(square.float(), low_b.float(), low_b.T.float(), beta=0.5, alpha=2.0).bfloat16())
        torch.testing.assert_close(torch.addmm(a[:, :17], a, b, beta=0.5), 0.5 * a[:, :17] + a @ b)
        assert torch.equal(a @ b, in_float32) and torch.equal(a.double() @ b.double(), in_float64)
        weight = low_b.clone().requires_grad_()
        (low_a @ weight).sum().backward()
        assert torch.equal(weight.grad, low_a.float().T.sum(dim=1, keepdim=True).expand(65, 17).bfloat16())
    finally:
        library._destroy()


def plain_sgd(model, config):
    """A hacker's: neither fused nor AdamW, with a rate of its own for each group."""
    matrices, vectors = ([p for p in model.parameters() if (p.ndim >= 2) == is_matrix] for is_matrix in (True, False))
    groups = [{"params": matrices}, {"params": vectors, "lr": 0.02}]
    return [torch.optim.SGD(groups, 0.1, momentum=0.9, foreach=False)]


@pytest.mark.parametrize(
    "settings",
    ({}, {"oec": "mu_centering_step"}, {"oec": "mu_loss"}, pytest.param({"dtype": "bfloat16", "compile": True}, marks=pytest.mark.slow), {"optimizer": "muon"},
     {"optimizer": "muon", "schedule": "wsd", "dtype": "float16"}, {"optimizer": "plain_sgd"}, {"fused_unembedding": False}),
    ids=str,
)  # fmt: skip
def test_stopped_and_resumed_is_never_stopped(data, tmp_path, train_here, monkeypatch, settings):
    """Bit for bit: parameters, optimizer state, metrics; the learning rate's schedule is that of the whole run."""
    options = settings | {"eval_interval": 3, "log_interval": 2}
    if options.get("optimizer") == "plain_sgd":
        del options["optimizer"]
        monkeypatch.setattr(train, "make_optimizers", plain_sgd)
    compiled, evaluate = [], train.evaluate
    count = lambda: compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    monkeypatch.setattr(train, "evaluate", lambda *arguments: count() or evaluate(*arguments))
    train_here(tiny_arguments(data, tmp_path / "whole", **options))
    count()
    assert len(set(compiled)) == 1, "evaluation compiled a graph of its own"

    class Stop(Exception):
        pass

    original, seen = train.Trainer.update, []

    def update(self, batches):
        if self.step == 8 and not seen:
            seen.append(1)
            raise Stop
        return original(self, batches)

    train.Trainer.update = update
    try:
        with pytest.raises(Stop):
            train_here(tiny_arguments(data, tmp_path / "parts", **options))
    finally:
        train.Trainer.update = original
    assert metrics_of(tmp_path / "parts")[-1]["step"] == 8  # beyond the checkpoint of step 6
    train_here(tiny_arguments(data, tmp_path / "parts", **options))
    whole, parts = (read_checkpoint(tmp_path / name / "ckpt_0000012.pt") for name in ("whole", "parts"))
    for state in (whole, parts):
        del state["config"]["out_dir"]
    assert_same_bits(whole, parts)
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "parts")


def test_one_process_and_two_are_one_run(data, tmp_path):
    losses = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        options = {"max_steps": 20, "eval_interval": 10, "batch_size": 16, "mu_loss_weight": 1e-2, "oec": "mu_loss"}
        done = run_command(tiny_arguments(data, out, **options), processes)
        assert done.returncode == 0, done.stderr
        losses.append(np.array([x["loss"] for x in metrics_of(out)]))
    assert len(losses[0]) == 22
    assert np.abs(losses[0] - losses[1]).max() <= 1e-5


@pytest.mark.parametrize("stopped_at", (4, 12))
def test_a_stop_during_an_evaluation_does_not_wait_for_its_end(data, tmp_path, train_here, monkeypatch, stopped_at):
    """The step is saved, no part of the evaluation is reported, and the resumed run makes up for it: bit for bit the same run."""
    train_here(tiny_arguments(data, tmp_path / "whole"))
    original = train.evaluate

    def evaluate(model, val, config, machine, stop):
        stop.is_received = len(metrics_of(tmp_path / "out")) == stopped_at + stopped_at // 4 - 1
        passes.clear()
        return original(model, val, config, machine, stop)

    passes, average = [], train.average
    monkeypatch.setattr(train, "average", lambda *arguments: passes.append(1) or average(*arguments))
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", evaluate)
        assert train_here(tiny_arguments(data, tmp_path / "out")).step == stopped_at and not passes
    assert metrics_of(tmp_path / "out")[-1]["split"] == "train" and metrics_of(tmp_path / "out")[-1]["step"] == stopped_at
    train_here(tiny_arguments(data, tmp_path / "out"))
    assert metrics_of(tmp_path / "out") == metrics_of(tmp_path / "whole")
    states = [read_checkpoint(tmp_path / name / "ckpt_0000012.pt") for name in ("whole", "out")]
    for state in states:
        del state["config"]["out_dir"]
        for group in state["optimizers"][0]["param_groups"]:
            del group["lr"]  # set anew in each step, and no step was made
    assert_same_bits(*states)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    train_here(tiny_arguments(data, tmp_path / "out"))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before  # nothing to do, nothing touched


@pytest.mark.slow  # four processes, and compiling; test_model.py has the same on one
@pytest.mark.parametrize("compiled", (False, True))
def test_two_processes_that_checkpoint_activations_learn_the_same(data, tmp_path, compiled):
    """With two passes a step, so that gradients are averaged in the last one alone."""
    losses = []
    for is_on in (False, True):
        out = tmp_path / str(is_on)
        options = {"max_steps": 6, "activation_checkpointing": is_on, "compile": compiled, "batch_size": 16}
        done = run_command(tiny_arguments(data, out, **options), processes=2)
        assert done.returncode == 0, done.stderr
        losses.append([x["loss"] for x in metrics_of(out)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) if compiled else losses[0] == losses[1]


@pytest.mark.parametrize("settings", ({}, {"optimizer": "muon", "dtype": "float16"}, {"optimizer": "plain_sgd"}), ids=str)
def test_a_non_finite_step_is_left_out(data, tmp_path, train_here, monkeypatch, settings):
    """Neither parameters nor moments nor an optimizer's count of steps see it; it is counted. With float16's scaler too."""
    original, seen, options = train.Trainer.update, [], dict(settings)
    if options.get("optimizer") == "plain_sgd":
        del options["optimizer"]
        monkeypatch.setattr(train, "make_optimizers", plain_sgd)

    def state(trainer):
        return copy.deepcopy((trainer.model.state_dict(), [x.state_dict()["state"] for x in trainer.optimizers]))

    def update(self, batches):
        if self.step != 5:
            return original(self, batches)
        poison = lambda gradient: gradient.index_fill(0, torch.tensor([1]), math.nan)
        hook = self.model.blocks[0].mlp.up.weight.register_hook(poison)
        before = state(self)
        metrics = original(self, batches)
        hook.remove()
        assert_same_bits(dict(enumerate(before)), dict(enumerate(state(self))))
        seen.append(self.step)
        return metrics

    monkeypatch.setattr(train.Trainer, "update", update)
    trainer = train_here(tiny_arguments(data, tmp_path / "out", **options))
    assert seen == [6] and metrics_of(tmp_path / "out")[-2]["bad_steps"] == 1
    if not settings:
        assert {int(s["step"]) for s in trainer.optimizers[0].state.values()} == {11}
    if "dtype" in settings:
        assert trainer.scaler.get_scale() == 2**15  # halved once


def test_a_checkpoint_of_version_1_is_resumed(data, tmp_path, train_here):
    """It has one optimizer's state under another name, and knows nothing of younger settings."""
    train_here(tiny_arguments(data, tmp_path / "new"))
    train_here(tiny_arguments(data, tmp_path / "old", max_steps=8, min_learning_rate=1e-2, warmup_steps=0))
    state = torch.load(tmp_path / "new/ckpt_0000008.pt", weights_only=True)
    (adamw,) = state.pop("optimizers")
    assert adamw.pop("kind") == "AdamW"
    state["optimizer"] = adamw
    for name in ("optimizer", "schedule", "decay_fraction", "fused_unembedding", "logits_dtype", "final_norm_gain"):
        del state["config"][name]
    for path in (tmp_path / "old").glob("*"):
        path.unlink()
    torch.save(state, tmp_path / "old/ckpt_0000008.pt")
    train_here(tiny_arguments(data, tmp_path / "old"))
    new, old = (read_checkpoint(tmp_path / name / "ckpt_0000012.pt") for name in ("new", "old"))
    assert_same_bits(new["model"], old["model"])
    assert_same_bits(new["optimizers"], old["optimizers"])


def test_another_optimizer_is_refused(data, tmp_path, train_here, capsys):
    train_here(tiny_arguments(data, tmp_path / "out"))
    capsys.readouterr()
    line = fails_in_one_line(capsys, train_here, tiny_arguments(data, tmp_path / "out", max_steps=16, optimizer="muon"))
    assert "its optimizers are AdamW, the run's Muon, AdamW" in line


@pytest.mark.parametrize(
    "name, flops",
    (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12), ("NVIDIA H200", 989e12),
     ("NVIDIA H200 NVL", 835e12), ("NVIDIA GH200 480GB", 989e12), ("NVIDIA H20", 148e12), ("NVIDIA A100-SXM4-40GB", 312e12),
     ("NVIDIA A100-PCIE-40GB", 312e12), ("NVIDIA A100 80GB PCIe", 312e12), ("NVIDIA L40S", 362e12), ("NVIDIA L4", 121e12),
     ("NVIDIA GeForce RTX 4090", 165e12), ("NVIDIA B200", 2250e12), ("Tesla V100-SXM2-16GB", 125e12),
     ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", math.nan), ("NVIDIA GeForce RTX 4090 Laptop GPU", math.nan), ("NVIDIA GeForce GTX 1080", math.nan)),
)  # fmt: skip
def test_peak_rates_by_the_names_of_gpus(name, flops):
    assert peak_flops(name) == pytest.approx(flops, nan_ok=True)


BREAKS = {"learning_rate": 1e30, "min_learning_rate": 0.0, "max_steps": 40, "grad_clip": 0.0, "warmup_steps": 0}


def test_too_many_bad_steps_in_a_row_end_the_run_with_3(data, tmp_path, train_here, capsys):
    """Started again, too; and the steps that are left out write no checkpoint over an earlier one."""
    arguments = tiny_arguments(data, tmp_path / "out", **BREAKS, max_bad_steps=6, eval_interval=1)
    for attempt in range(2):
        with pytest.raises(SystemExit) as end:
            train_here(arguments)
        assert end.value.code == 3
        last = capsys.readouterr().out.strip().splitlines()[-1]
        assert last.startswith("diverged: 6 steps in a row") and "The first was step" in last and "--learning_rate" in last
    first_bad = int(re.search(r"The first was step (\d+)", last)[1])
    assert [read_checkpoint(path)["step"] for path in checkpoints(tmp_path / "out")] == list(range(1, first_bad))[-2:]


def test_centring_is_not_advised_where_the_loss_is_above_that_of_guessing(data, tmp_path, train_here, capsys):
    train_here(tiny_arguments(data, tmp_path / "out", oec="none", dtype="bfloat16", learning_rate=30.0, grad_clip=0.0, warmup_steps=0))
    lines = [line for line in capsys.readouterr().out.splitlines() if "rounding costs" in line]
    assert lines and not any("resume with --oec" in line for line in lines)


def test_centring_is_not_advised_where_logits_are_large_without_a_drift(data, tmp_path, train_here, capsys, monkeypatch):
    monkeypatch.setattr("runtime.unembedding.rounding_nats", lambda size, dtype: torch.ones_like(size))
    train_here(tiny_arguments(data, tmp_path / "out", oec="none"))
    lines = [line for line in capsys.readouterr().out.splitlines() if "rounding costs 1.0" in line]
    trained = [x for x in metrics_of(tmp_path / "out") if x["split"] == "train"]
    assert lines and not any("resume with --oec" in line for line in lines)
    assert any(x["cross_entropy"] < math.log(VOCAB) and abs(x["logit_mean"]) < x["logit_std"] for x in trained)


def test_a_run_whose_last_validation_loss_is_not_finite_ends_with_3(data, tmp_path, train_here, capsys):
    with pytest.raises(SystemExit) as end:
        train_here(tiny_arguments(data, tmp_path / "out", **BREAKS | {"max_steps": 8}, max_bad_steps=20, eval_interval=0))
    assert end.value.code == 3 and not checkpoints(tmp_path / "out")
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("diverged: the last validation loss is not finite. Start in another --out_dir, with a lower --learning_rate")


def test_the_loader_is_far_faster_than_the_demo_trains(tmp_path):
    """20 times the tokens per second of the demo's forward and backward passes, eager here to spare the compiling."""
    config = load_config(["config/quick.py"])
    machine = start_machine(config)
    windows, _ = open_dataset(tiny_folder(tmp_path / "tiny"), config.block_size, VOCAB)
    samples = samples_of_process(0, 2000, config.batch_size, config.micro_batch_size, 0, 1)
    batches, model = iter(Loader(windows, samples, 1, machine.device)), GPT(config)
    times = {"loading": [], "training": []}
    for _ in range(20):  # in turn, and the best of each: other work on the machine slows now the one, now the other
        began = time.perf_counter()
        for _ in range(100):
            tokens, targets = next(batches)
        loaded = time.perf_counter()
        with machine.autocast():
            model(tokens, targets)[0].backward()
        times["loading"].append((loaded - began) / 100)
        times["training"].append(time.perf_counter() - loaded)
    assert 20 * min(times["loading"]) < min(times["training"])


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this system has no large pages for any program")
def test_large_tensors_are_in_large_pages_on_a_cpu(tmp_path):
    """PyTorch reads the environment variable once, at its first tensor: a run must have set it before."""
    program = """
import re, sys
from pathlib import Path
import torch
from runtime.machine import start_machine
from train import Trainer, load_config

config = load_config(sys.argv[1:])
trainer = Trainer(config, start_machine(config))
large = torch.zeros(2**24)  # 64 MiB
for line in Path("/proc/self/smaps").read_text().splitlines():
    if addresses := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
        first, last = (int(address, 16) for address in addresses.groups())
    elif line.startswith("VmFlags:") and first <= large.data_ptr() + 2**22 < last:
        print(line)
"""
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    command = [sys.executable, "-c", program, *tiny_arguments(tiny_folder(tmp_path / "tiny"), tmp_path / "out"), "--device=cpu"]
    for value, is_large in (({}, True), ({"THP_MEM_ALLOC_ENABLE": "0"}, False)):
        done = subprocess.run(command, cwd=ROOT, env=environment | value, capture_output=True, text=True, check=True)
        flags = done.stdout.strip().splitlines()[-1].split()
        assert flags[0] == "VmFlags:" and ("hg" in flags) == is_large  # hg: the program asked Linux for large pages here


@pytest.mark.gpu
def test_resume_on_a_gpu_is_exact_when_deterministic(data, tmp_path, train_here):
    options = {"device": "cuda", "dtype": "bfloat16", "deterministic": True, "compile": True, "eval_interval": 6}
    train_here(tiny_arguments(data, tmp_path / "whole", **options))
    train_here(tiny_arguments(data, tmp_path / "parts", **options))
    (tmp_path / "parts" / "ckpt_0000012.pt").unlink()
    train_here(tiny_arguments(data, tmp_path / "parts", **options))
    whole, parts = (read_checkpoint(tmp_path / name / "ckpt_0000012.pt") for name in ("whole", "parts"))
    for part in ("model", "optimizers", "bad_steps", "step", "best_loss"):
        assert_same_bits(whole[part], parts[part], part)
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "parts")


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", (False, True))
def test_a_step_waits_for_the_gpu_once(data, tmp_path, train_here, monkeypatch, compiled):
    """CUDA's own check: an operation that synchronises warns."""
    original, waits = train.Trainer.update, []

    def update(self, batches):
        if self.step < 3:  # state is made in the first steps
            return original(self, batches)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True, action="always") as caught:
                return original(self, batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            waits.append(sum("synchroniz" in str(warning.message) for warning in caught))

    monkeypatch.setattr(train.Trainer, "update", update)
    options = {"max_steps": 20, "log_interval": 20, "eval_interval": 20, "compile": compiled}
    train_here(tiny_arguments(data, tmp_path / "out", device="cuda", dtype="bfloat16", **options))
    assert set(waits) == {1}


@pytest.mark.gpu
def test_both_ways_of_centring_are_one_run_on_a_gpu(data, tmp_path, train_here):
    """In bfloat16 over 200 steps they differ less than two seeds do."""
    losses = {}
    for name, changes in {"forward": {}, "step": {"oec": "mu_centering_step"}, "seed": {"seed": 2}}.items():
        options = {"device": "cuda", "dtype": "bfloat16", "compile": True, "max_steps": 200, "eval_interval": 200}
        train_here(tiny_arguments(data, tmp_path / name, **options | changes))
        losses[name] = np.array([x["loss"] for x in metrics_of(tmp_path / name) if x["split"] == "train"])[100:].mean()
    assert abs(losses["forward"] - losses["step"]) < max(0.02, abs(losses["forward"] - losses["seed"]))


@pytest.mark.parametrize("device", ("cpu", pytest.param("cuda", marks=pytest.mark.gpu)))
def test_a_process_group_of_one_is_the_plain_model(device, tmp_path):
    """NCCL and DDP on the one GPU there is, or gloo on a CPU: the gradients of two passes, averaged once, are the model's own."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=VOCAB, block_size=32, n_layer=2, n_head=2, n_embd=32, oec="mu_centering")).to(device)
    tokens = torch.randint(0, VOCAB, (2, 4, 33)).to(device)

    def gradients_through(wrapped, no_sync):
        model.zero_grad()
        with no_sync():
            wrapped(tokens[0, :, :-1], tokens[0, :, 1:])[0].backward()
        wrapped(tokens[1, :, :-1], tokens[1, :, 1:])[0].backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients_through(model, nullcontext)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        ones = torch.ones(1, device=device)
        torch.distributed.all_reduce(ones)
        assert ones.item() == 1
        compiled = torch.compile(model) if device == "cuda" else model
        parallel = torch.nn.parallel.DistributedDataParallel(compiled, broadcast_buffers=False)
        torch.testing.assert_close(gradients_through(parallel, parallel.no_sync), expected, rtol=1e-4, atol=1e-6)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.gpu
def test_every_attention_backend_gives_the_same_loss():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch.manual_seed(0)
    model = train.GPT(TrainConfig(n_layer=2, n_head=2, n_embd=128, vocab_size=300, block_size=128)).cuda()
    tokens = torch.randint(0, 300, (4, 129), device="cuda")
    losses = {}
    for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        try:
            with sdpa_kernel(backend), torch.autocast("cuda", torch.bfloat16):
                losses[backend] = model(tokens[:, :-1], tokens[:, 1:])[0].item()
        except RuntimeError:  # not offered by this card
            pass
    print(losses)
    assert len(losses) > 1 and max(losses.values()) - min(losses.values()) < 5e-3


# --- init_from


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(5)
    model = GPT(GPTConfig(vocab_size=VOCAB, block_size=64, n_layer=2, n_head=2, n_embd=32))
    save_weights(tmp_path / "weights.pt", model, asdict(model.config))
    return model, tmp_path / "weights.pt"


def test_a_run_begins_with_the_weights_and_goes_on_from_its_own(weights, data, tmp_path, train_here, capsys):
    model, path = weights
    arguments = tiny_arguments(data, tmp_path / "run", init_from=path)
    trainer = train.Trainer(config := load_config(arguments), start_machine(config))
    assert_same_bits(dict(trainer.model.state_dict()), dict(model.state_dict()))
    assert trainer.step == 0 and not trainer.optimizers[0].state
    trainer.run()
    path.unlink()  # no longer needed
    capsys.readouterr()
    assert train_here([*arguments, "--max_steps=16"]).step == 16
    assert "at step 12" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, says",
    (
        ({"vocab_size": VOCAB + 1}, f"vocab_size={VOCAB}"), ({"n_layer": 3}, "n_layer=2"), ({"n_embd": 64}, "n_embd=32"),
        ({"n_head": 1}, "n_head=2"), ({"tie_weights": True}, "tie_weights=False"), ({"init_from": "none.pt"}, "none.pt"),
    ),
)  # fmt: skip
def test_weights_of_another_model_are_refused(weights, data, tmp_path, train_here, capsys, change, says):
    arguments = tiny_arguments(data, tmp_path / "run", **{"init_from": weights[1]} | change)
    assert says in fails_in_one_line(capsys, train_here, arguments)
    assert not (tmp_path / "run/config.json").exists()


def test_weights_alone_are_no_run_to_resume(weights, data, tmp_path, train_here, capsys):
    fails_in_one_line(capsys, train_here, tiny_arguments(data, tmp_path / "run", resume=weights[1]))
