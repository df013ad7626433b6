"""oec.py in other people's trainers: the lines of docs/your_own_trainer.md, run as they stand, and weights sharded over processes."""

import copy
import re

import pytest
import torch
from torch import nn

from oec import mean_embedding
from tests.conftest import ROOT, run_command

V, D, T = 30, 8, 6


def run_lines_of_docs(which: str, **names) -> dict:
    """Runs one of the three pieces of code there; all names it leaves."""
    section = (ROOT / "docs/your_own_trainer.md").read_text()
    plain, hugging_face, lightning = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    code = {"plain": plain, "Hugging Face": hugging_face, "Lightning": lightning}[which]
    exec(compile(code, "docs/your_own_trainer.md", "exec"), names)
    return names


def tokens_of(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(seed))


def shifted_head() -> nn.Linear:
    """An unembedding whose μ is far from zero: 1e-4 μᵀμ is about 0.07."""
    head = nn.Linear(D, V, bias=False)
    nn.init.normal_(head.weight, mean=10)
    return head


def cross_entropy(hidden, W, targets):
    return nn.functional.cross_entropy((hidden @ W.T).flatten(0, 1), targets.flatten())


def weighted_mu_loss(W):
    return 1e-4 * W.mean(dim=0).square().sum()


def test_a_plain_loop():
    torch.manual_seed(0)
    model, head = nn.Sequential(nn.Embedding(V, D), nn.LayerNorm(D)), shifted_head()
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], 0.1)
    before = copy.deepcopy((model, head.weight))
    batch = tokens_of(1, 4, T), tokens_of(2, 4, T)
    loss = run_lines_of_docs("plain", model=model, head=head, optimizer=optimizer, batches=[batch])["loss"]
    expected = cross_entropy(before[0](batch[0]), before[1], batch[1]) + weighted_mu_loss(before[1])
    torch.testing.assert_close(loss, expected)
    assert (head.weight - before[1]).abs().max() > 1
    assert mean_embedding(head.weight).abs().max() < 1e-6


@pytest.fixture
def hugging_face(tmp_path):
    """The classes there, and what makes a fresh tiny GPT-2, the same each time, and settings to train it with."""
    reason = "the lines of docs/your_own_trainer.md for Hugging Face need: pip install transformers accelerate"
    pytest.importorskip("accelerate", reason=reason)
    transformers = pytest.importorskip("transformers", reason=reason)

    def fresh_model():
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=V, n_positions=T, n_embd=D, n_layer=1, n_head=2, tie_word_embeddings=False,
            resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config)
        nn.init.normal_(model.lm_head.weight, mean=10)
        return model

    def arguments(**changes):
        settings = {
            "output_dir": tmp_path, "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.1, "use_cpu": True,
            "report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
        }  # fmt: skip
        return transformers.TrainingArguments(**settings | changes)

    dataset = [{"input_ids": row, "labels": row} for row in tokens_of(3, 8, T)]
    names = run_lines_of_docs("Hugging Face", model=fresh_model(), arguments=arguments(), dataset=dataset)
    return names, fresh_model, arguments


def test_hugging_face_centring(hugging_face):
    names, fresh_model, arguments = hugging_face
    means = []

    class Watch(names["TrainerCallback"]):
        def on_step_end(self, arguments, state, control, model, **others):
            means.append(mean_embedding(model.lm_head.weight).abs().max().item())

    for callbacks in ([names["MuCentering"](), Watch()], [Watch()]):
        names["Trainer"](fresh_model(), arguments(), train_dataset=names["dataset"], callbacks=callbacks).train()
    assert len(means) == 4 and max(means[:2]) < 1e-5 and min(means[2:]) > 1
    assert mean_embedding(names["model"].lm_head.weight).abs().max() < 1e-5  # its own two runs, the second centred


def test_hugging_face_mu_loss(hugging_face):
    """The loss of a step is the plain one and the μ-loss once, however many passes the step has; not so in evaluation."""
    names, fresh_model, arguments = hugging_face
    extra = weighted_mu_loss(fresh_model().lm_head.weight).item()
    for passes, is_summed in ((1, True), (2, True), (2, False)):
        settings = arguments(max_steps=1, per_device_train_batch_size=4 // passes, gradient_accumulation_steps=passes)
        losses = {}
        for name in ("Trainer", "MuLossTrainer"):
            trainer = names[name](fresh_model(), settings, train_dataset=names["dataset"], eval_dataset=names["dataset"])
            assert trainer.model_accepts_loss_kwargs
            trainer.model_accepts_loss_kwargs = is_summed  # for some models it is False, and Trainer averages over the passes
            evaluated = trainer.evaluate()["eval_loss"]
            trainer.train()
            losses[name] = trainer.state.log_history[0]["loss"], evaluated
        (plain, plain_eval), (with_mu, with_mu_eval) = losses.values()
        assert extra > 0.05 and with_mu - plain == pytest.approx(extra, abs=1e-4) and plain_eval == with_mu_eval


def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning", reason="the lines of docs/your_own_trainer.md for Lightning need: pip install lightning")
    torch.manual_seed(0)

    class YourModule(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.trunk, self.head = nn.Embedding(V, D), shifted_head()

        def training_step(self, batch, index):
            return cross_entropy(self.trunk(batch[0]), self.head.weight, batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 0.1)

    class Watch(lightning.Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            W = module.head.weight
            self.expected = (cross_entropy(module.trunk(batch[0]), W, batch[1]) + weighted_mu_loss(W)).item()
            self.before = W.detach().clone()

        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            seen.append((outputs["loss"].item(), self.expected))
            assert (module.head.weight - self.before).abs().max() > 0.05

    seen, module = [], run_lines_of_docs("Lightning", YourModule=YourModule)["Centered"]()
    batches = [(tokens_of(seed, 4, T), tokens_of(seed + 10, 4, T)) for seed in range(3)]
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, default_root_dir=tmp_path, callbacks=[Watch()], **options
    )
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    assert len(seen) == 3
    for loss, expected in seen:
        assert loss == pytest.approx(expected, rel=1e-5)
    assert mean_embedding(module.head.weight).abs().max() < 1e-5


# --- sharded over processes

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


@pytest.mark.slow
def test_a_weight_sharded_over_two_processes(tmp_path):
    """By FSDP2: μ, its loss, their gradients and centring are those of the whole weight, and so is training with them."""
    script = tmp_path / "sharded.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{SHARDED}")
    done = run_command([], processes=2, script=script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all agree") == 2
