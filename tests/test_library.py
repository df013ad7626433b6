"""oec.py in other people's trainers: what the README shows, and weights sharded over processes."""

import pytest
import torch

from tests.conftest import ROOT, run_command

# Two processes hold a weight together. `rows` that two do not divide are shared unevenly; padding rows are on one or both.
SHARDED = """
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

import oec

FUNCTIONS = (oec.mean_embedding, oec.center, oec.mu_loss)


def sharded(rows):
    layer = nn.Linear(4, rows, bias=False)
    whole = (torch.randn(rows, 4) + 2).requires_grad_()
    with torch.no_grad():
        layer.weight.copy_(whole)
    return fully_shard(layer).weight, whole


def agree(a, b):
    torch.testing.assert_close(a.full_tensor() if hasattr(a, "full_tensor") else a, b, rtol=1e-12, atol=1e-12)


def check(rows, vocab_size):
    W, whole = sharded(rows)
    for function in FUNCTIONS:
        got, expected = function(W, vocab_size), function(whole, vocab_size)
        agree(got, expected)
        W.grad = whole.grad = None
        for result in (got, expected):
            (result**3).sum().backward()
        assert W.grad.placements == (Shard(0),)
        agree(W.grad, whole.grad)
    assert not hasattr(oec.mean_embedding(W, vocab_size), "full_tensor")
    assert not hasattr(oec.mu_loss(W, vocab_size), "full_tensor")
    with torch.no_grad():
        before = whole.clone()
        assert oec.center_(W, vocab_size) is W and W.placements == (Shard(0),)
        agree(W, oec.center_(whole, vocab_size))
        agree(oec.mean_embedding(W, vocab_size), torch.zeros(4))
        agree(W.full_tensor()[vocab_size or rows :], before[vocab_size or rows :])
    for wrong in (0, rows + 1):
        try:
            oec.center_(W, wrong)
            raise SystemExit(f"vocab_size={wrong} was let through")
        except ValueError as error:
            assert f"vocab_size={wrong} must lie in" in str(error)


def train(parallel, mu_loss_first):
    # Both remedies at once, on all data in one process or on half of it in each of two.
    torch.manual_seed(1)
    model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 11, bias=False))
    if parallel:
        fully_shard(model[1])
        fully_shard(model)
    W, optimizer = model[1].weight, torch.optim.AdamW(model.parameters(), 0.1)
    tokens = torch.randint(0, 9, (6, 2, 8), generator=torch.Generator().manual_seed(2))
    for batch in tokens:
        batch = batch[:, distributed.get_rank() :: 2] if parallel else batch
        mu_loss = 10 * oec.mu_loss(W, 9)
        if mu_loss_first:
            mu_loss.backward()
        loss = nn.functional.cross_entropy(model(batch[0])[:, :9], batch[1])
        loss.backward() if mu_loss_first else (loss + mu_loss).backward()
        optimizer.step()
        if not mu_loss_first:
            oec.center_(W, 9)
        optimizer.zero_grad()
    return model


distributed.init_process_group("gloo")
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
for rows, vocab_size in ((8, None), (9, None), (8, 5), (8, 4), (7, 6), (9, 3)):
    check(rows, vocab_size)
for mu_loss_first in (False, True):
    for a, b in zip(train(True, mu_loss_first).parameters(), train(False, mu_loss_first).parameters()):
        agree(a, b)
print("all agree", flush=True)
distributed.destroy_process_group()
"""


def test_a_weight_sharded_over_two_processes(tmp_path):
    """By FSDP2: μ, its loss, their gradients and centring are those of the whole weight, and so is training with them."""
    script = tmp_path / "sharded.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{SHARDED}")
    done = run_command([], processes=2, script=script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all agree") == 2
