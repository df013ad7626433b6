"""tools/memory.py against processes: the memory that a training step of the trainer takes."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from tests.conftest import PATIENCE, ROOT, fails_in_one_line, tiny_arguments
from tools import memory
from train import load_config

MEASURE = """
import json, sys
from dataclasses import replace
from itertools import accumulate
import torch
from data.shards import Loader, samples_of_process
from model import GPT
from tools.bench import resident
from runtime.machine import start_machine
from train import Trainer, load_config, make_optimizers

config = load_config(json.loads(sys.argv[1]))
machine = start_machine(config)
tiny = GPT(replace(config, n_layer=1, n_head=1, n_embd=16, vocab_size=128, block_size=8))
with machine.autocast():
    tiny(*torch.zeros(2, 1, 8, dtype=torch.int64))[0].backward()
[optimizer.step() for optimizer in make_optimizers(tiny, config)]
before = resident()["VmRSS:"]

trainer = Trainer(config, machine)
samples = samples_of_process(0, 10, config.batch_size, config.micro_batch_size, 0, 1)
batches = iter(Loader(trainer.train_data, samples, 0, machine.device))
trainer.update(batches)
if config.compile:  # compiling leaves its own behind in the process: PyTorch's record of the tensors instead
    with torch.profiler.profile(profile_memory=True) as profiler:
        trainer.update(batches)
    sizes = [e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    print(12 * trainer.model.num_parameters() + max(accumulate(sizes)))
    raise SystemExit
open("/proc/self/clear_refs", "w").write("5")  # peak resident memory starts again from here
trainer.update(batches)
print(resident()["VmHWM:"] - before)
"""


def measured(words: list[str]) -> int:
    """Peak resident bytes of a step, beyond what the imports and the step of a tiny model took; compiled: of its tensors.

    What is freed goes back to the system at once, so that resident is what is in use.
    """
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    process = [sys.executable, "-c", MEASURE, json.dumps(words)]
    done = subprocess.run(process, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


# What dominates each.
ACTIVATIONS = {"n_layer": 6, "n_head": 4, "n_embd": 192, "vocab_size": 1024, "block_size": 256}
VOCABULARY = {"n_layer": 1, "n_head": 4, "n_embd": 192, "vocab_size": 50257, "block_size": 64}
PARAMETERS = {"n_layer": 8, "n_head": 8, "n_embd": 384, "vocab_size": 1024, "block_size": 16}


@pytest.mark.slow
@pytest.mark.parametrize("shape", (ACTIVATIONS, VOCABULARY, PARAMETERS), ids=("activations", "vocabulary", "parameters"))
@pytest.mark.parametrize(
    "changes",
    ({}, {"dtype": "bfloat16"}, {"activation_checkpointing": True}, {"oec": "mu_centering"}, {"batch_size": 8}, {"compile": True}),
    ids=str,
)
def test_the_prediction_is_within_a_tenth(data, tmp_path, shape, changes):
    settings = shape | {"oec": "none", "micro_batch_size": 4, "batch_size": 4, "eval_sequences": 1} | changes
    words = tiny_arguments(data, tmp_path / "out", **settings)
    config = load_config(words)
    predicted, found = memory.step_bytes(config, "cpu", 2 if config.dtype == "bfloat16" else 4), measured(words)
    print(f"predicted {predicted / 1e6:.0f} MB, measured {found / 1e6:.0f} MB, {predicted / found - 1:+.1%}")
    assert predicted == pytest.approx(found, rel=0.1)


def test_the_largest_micro_batch_is_the_last_that_fits():
    for capacity in (1e9, 24e9):
        config = load_config(["config/paper_16m.py"])
        most = memory.largest_micro_batch(config, capacity, "cuda", 2)
        needs = [memory.step_bytes(replace(config, micro_batch_size=n, batch_size=2 * n), "cuda", 2) for n in (most, most + 1)]
        assert most >= 1 and needs[0] <= capacity < needs[1]
    assert memory.largest_micro_batch(config, 1e8, "cuda", 2) == 0  # 16 bytes a parameter are more


def test_a_table_of_the_configs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["memory", "config/gpt2_124m.py", "config/paper_16m.py", "--n_layer=3"])
    memory.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows[2:]] == ["| gpt2_124m"] * 2 + ["| paper_16m"] * 2 and [row[1] for row in rows[2:4]] == ["off", "on"]
    monkeypatch.setattr(sys, "argv", ["memory", "config/gpt2_124m.py", "--processes=7"])  # its micro-batch does not divide over them
    memory.main()
    capsys.readouterr()
    unfused = (["config/gpt2_124m.py", "--fused_unembedding=False"], "fused_unembedding")
    for words, says in (unfused, (["--n_layer=3"], "at least one"), (["none.py"], "none.py"), (["config/gpt2_124m.py", "--n_layr=3"], "n_layer")):
        monkeypatch.setattr(sys, "argv", ["memory", *words])
        assert says in fails_in_one_line(capsys, memory.main)


def test_a_sharded_model_needs_its_part(monkeypatch):
    """16 bytes a parameter over the processes, and what is gathered: as tests/test_sharding.py measures."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    words = ["--n_embd=1024", "--n_head=16", "--n_layer=24", "--micro_batch_size=1", "--batch_size=4", "--block_size=8", "--vocab_size=4096"]
    copied, sharded = (memory.step_bytes(load_config([*words, f"--shard={shard}"]), "cuda", 2, 4) for shard in (False, True))
    parameters, _ = memory.parameter_counts(vocab_size=4096, n_layer=24, n_head=16, n_embd=1024, tie_weights=False)
    assert copied > 16 * parameters and 4 * parameters < sharded < 0.35 * copied
