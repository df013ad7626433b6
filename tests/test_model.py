"""model.py: the architecture, the method inside it, sampling."""

import dataclasses
import math

import pytest
import torch

import oec
import runtime.unembedding
from model import GPT, GPTConfig, rotary_angles, rotate

SMALL = GPTConfig(vocab_size=300, block_size=16, n_layer=2, n_head=2, n_embd=32)


def make(seed=0, **changes) -> GPT:
    torch.manual_seed(seed)
    return GPT(dataclasses.replace(SMALL, **changes))


def batch(seed=0, rows=4):
    tokens = torch.randint(0, 300, (rows, 17), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


def test_initialisation_is_the_papers():
    model = make(vocab_size=5000, n_embd=256, n_head=4, n_layer=4)
    d, block = 256, model.blocks[0]
    expected = {
        model.embedding.weight: 1 / math.sqrt(d),
        model.unembedding.weight: math.sqrt(2 / (d + 5120)),
        block.attention.query_key_value.weight: math.sqrt(2 / (4 * d)),
        block.attention.projection.weight: 0.02 / math.sqrt(8),
        block.mlp.gate.weight: math.sqrt(2 / (d + model.config.mlp_hidden_size)),
        block.mlp.down.weight: math.sqrt(2 / (d + model.config.mlp_hidden_size)),
    }
    for weight, std in expected.items():
        assert weight.std().item() == pytest.approx(std, rel=0.02)
        assert abs(weight.mean().item()) < 0.02 * std
    assert model.config.mlp_hidden_size == 768
    assert not any("bias" in name for name, _ in model.named_parameters())
    tied = make(tie_weights=True)
    assert tied.unembedding.weight is tied.embedding.weight
    assert tied.embedding.weight.std().item() == pytest.approx(1 / math.sqrt(32), rel=0.02)


@pytest.mark.parametrize("millions, layers, heads, width", ((16, 6, 4, 224), (29, 9, 4, 320), (57, 12, 4, 480), (109, 15, 4, 640), (221, 21, 4, 832)))
def test_the_papers_scales_are_named_by_their_parameters(millions, layers, heads, width):
    """In millions, one of the two embedding matrices counted."""
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=layers, n_head=heads, n_embd=width))
    assert (model.num_parameters() - model.embedding.weight.numel()) / 1e6 == pytest.approx(millions, abs=0.6)


@pytest.mark.parametrize("tie", (False, True))
def test_loss_starts_at_ln_v_and_falls(tie):
    model = make(tie_weights=tie)
    tokens, targets = batch()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    first = model(tokens, targets)[0].item()
    assert first == pytest.approx(math.log(300), abs=1.5)
    for _ in range(30):
        loss, _ = model(tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < first - 2


def test_attention_is_causal_and_positions_are_relative():
    model = make().double()
    tokens, _ = batch()
    logits = [model(tokens[:, :t]) for t in range(1, 17)]
    changed = tokens.clone()
    changed[:, 9:] = 5
    for t in range(1, 10):
        torch.testing.assert_close(model(changed[:, :t]), logits[t - 1])
    assert not torch.allclose(model(changed[:, :11]), logits[10])
    cos, sin = rotary_angles(32, 16)
    query, key = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    turned = [rotate(x.expand(1, 32, 1, 16), cos, sin)[0, :, 0] for x in (query, key)]
    scores = turned[0] @ turned[1].T
    for offset in (0, 3, 10):
        torch.testing.assert_close(scores.diagonal(offset), scores[0, offset].expand(32 - offset), rtol=1e-4, atol=1e-5)
    assert torch.equal(turned[0][:, 8:], query[0, 0, :, 8:].expand(32, 8))  # half of each head is not rotated


@pytest.mark.parametrize("fused_unembedding", (True, False))
@pytest.mark.parametrize("method", ("none", "mu_loss", "mu_centering", "mu_centering_step"))
@pytest.mark.parametrize("z_loss_weight, logit_softcap", ((0.0, 0.0), (1e-2, 0.0), (0.0, 5.0), (1e-2, 5.0)))
def test_methods_combine(method, z_loss_weight, logit_softcap, fused_unembedding):
    options = {"z_loss_weight": z_loss_weight, "logit_softcap": logit_softcap, "fused_unembedding": fused_unembedding}
    model = make(oec=method, mu_loss_weight=0.5, **options).double()
    with torch.no_grad():
        model.unembedding.weight.add_(0.7)  # a drifted μ
    loss, metrics = model(*batch())
    W = model.unembedding.weight
    expected = metrics["cross_entropy"] + z_loss_weight * metrics["z_loss"]
    expected = expected + (0.5 * oec.mu_loss(W, 300) if method == "mu_loss" else 0)
    torch.testing.assert_close(loss, expected)
    assert metrics["loss"] == loss and not any(value.requires_grad for value in metrics.values())
    if method == "mu_centering" and not logit_softcap:
        assert metrics["logit_mean"].abs() < 1e-12
    before = W.detach().clone()
    model.after_step()
    assert torch.equal(W, oec.center_(before.clone(), 300)) == (method == "mu_centering_step")


def test_centring_with_tied_weights_changes_neither_loss_nor_trunk():
    results = []
    for method in ("none", "mu_centering"):
        model = make(oec=method, tie_weights=True).double()
        with torch.no_grad():
            model.embedding.weight.add_(0.3)
        loss, _ = model(*batch())
        loss.backward()
        trunk = {name: p.grad for name, p in model.named_parameters() if name != "embedding.weight"}
        results.append((loss, trunk))
    (loss, trunk), (centered_loss, centered_trunk) = results
    torch.testing.assert_close(loss, centered_loss, rtol=1e-12, atol=0)
    for name in trunk:
        torch.testing.assert_close(trunk[name], centered_trunk[name], rtol=1e-9, atol=1e-12)


def test_centring_in_the_forward_pass_and_after_the_step_are_one_trajectory():
    """Fact 2's consequence, over 50 Adam steps in float64 with untied weights."""
    models = [make(oec=method).double() for method in ("mu_centering", "mu_centering_step")]
    for model in models:
        oec.center_(model.unembedding.weight, 300)
    optimizers = [torch.optim.AdamW(model.parameters(), 1e-2, (0.9, 0.95), weight_decay=0.0) for model in models]
    for step in range(50):
        losses = []
        for model, optimizer in zip(models, optimizers):
            loss, _ = model(*batch(step))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            model.after_step()
            losses.append(loss)
        torch.testing.assert_close(*losses, rtol=1e-9, atol=0)
    a, b = models
    assert oec.mean_embedding(a.unembedding.weight, 300).norm() > 1e-3  # the stored one does drift
    torch.testing.assert_close(a.output_embedding()[:300], b.output_embedding()[:300], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(a.blocks[0].mlp.up.weight, b.blocks[0].mlp.up.weight, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("compiled", (False, pytest.param(True, marks=pytest.mark.slow)))
def test_activation_checkpointing_changes_no_result(dtype, compiled):
    """Eager: bit for bit. Compiled: other operations are fused, so up to the rounding of the dtype. Less is kept."""
    results = []
    for is_on in (False, True):
        torch._dynamo.reset()
        model = make(oec="mu_centering", activation_checkpointing=is_on)
        kept = []
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
                loss, _ = (torch.compile(model) if compiled else model)(*batch())
        loss.backward()
        results.append((loss.detach(), sum(kept), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (loss, kept, gradient), (loss_again, kept_again, gradient_again) = results
    if not compiled:
        assert torch.equal(loss, loss_again) and torch.equal(gradient, gradient_again) and kept_again < kept
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(loss, loss_again, rtol=4 * rounding, atol=0)
    assert (gradient - gradient_again).norm() <= 4 * rounding * gradient.norm()


def test_activation_checkpointing_repeats_what_dropout_drew():
    gradients = []
    for is_on in (False, True):
        model = make(activation_checkpointing=is_on)
        for block in model.blocks:
            block.mlp = torch.nn.Sequential(block.mlp, torch.nn.Dropout(0.5))
        torch.manual_seed(1)
        model(*batch())[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*gradients)


def test_padding_rows_never_count():
    for method in ("none", "mu_loss", "mu_centering", "mu_centering_step"):
        results = []
        for value in (0.0, 1e4):
            model = make(oec=method, z_loss_weight=1e-2)
            with torch.no_grad():
                model.unembedding.weight[300:] = value
            loss, metrics = model(*batch())
            loss.backward()
            model.after_step()
            drawn = model.generate(batch()[0], 20)
            assert model(batch()[0]).shape == (4, 300) and drawn.max() < 300
            results.append((loss, *metrics.values(), model.unembedding.weight.grad, drawn))
        for a, b in zip(*results):
            assert torch.equal(a, b)


@pytest.mark.parametrize("logits_dtype", ("auto", "float32"))
@pytest.mark.parametrize("method", ("none", "mu_centering", "mu_loss"))
def test_the_lean_loss_and_the_plain_one_train_alike(logits_dtype, method):
    results = []
    for fused in (True, False):
        model = make(oec=method, logits_dtype=logits_dtype, fused_unembedding=fused, z_loss_weight=0.01)
        with torch.autocast("cpu", torch.bfloat16):
            loss, metrics = model(*batch())
        loss.backward()
        results.append((metrics, torch.cat([p.grad.flatten() for p in model.parameters()])))
    (metrics, gradient), (plain_metrics, plain_gradient) = results
    assert metrics.keys() == plain_metrics.keys()
    for name in metrics:
        torch.testing.assert_close(metrics[name], plain_metrics[name], rtol=1e-2, atol=1e-3, msg=name)
    assert (gradient - plain_gradient).norm() < 0.01 * plain_gradient.norm()


def test_a_statistic_in_the_loss_has_its_gradient_or_raises():
    for fused in (False, True):
        model = make(fused_unembedding=fused)
        parts = []
        module, name = (runtime.unembedding, "unembedding_loss") if fused else (oec, "unembedding_loss")
        original = getattr(module, name)
        try:
            setattr(module, name, lambda *a, **k: parts.append(original(*a, **k)) or parts[-1])
            model(*batch())
        finally:
            setattr(module, name, original)
        loss = parts[0].loss + 0.1 * parts[0].logit_mean ** 2
        if fused:
            with pytest.raises(RuntimeError, match="--fused_unembedding=False"):
                loss.backward()
        else:
            loss.backward()
            pulled = model.unembedding.weight.grad[:300].sum(dim=0).norm()
            assert pulled > 1e-6  # the gradient of cross-entropy alone sums to zero over the rows


def test_the_final_gain_can_be_kept_at_1():
    model = make(final_norm_gain=False)
    model(*batch())[0].backward()
    assert model.final_norm.weight.grad is None and (model.final_norm.weight == 1).all()
    assert make().final_norm.weight.requires_grad


def test_generate():
    model = make()
    prompt = batch()[0][:, :5]
    first = model.generate(prompt, 30, seed=3)
    assert first.shape == (4, 35) and torch.equal(first[:, :5], prompt)
    assert torch.equal(first, model.generate(prompt, 30, seed=3))
    assert not torch.equal(first, model.generate(prompt, 30, seed=4))
    greedy = model.generate(prompt, 8, temperature=0)
    assert torch.equal(greedy, model.generate(prompt, 8, top_k=1, seed=9))
    assert torch.equal(greedy[:, 5], model(prompt).argmax(dim=-1))
    top = model(prompt).topk(3).indices
    for seed in range(20):
        assert (model.generate(prompt, 1, temperature=5.0, top_k=3, seed=seed)[:, -1:] == top).any(dim=1).all()
    with pytest.raises(ValueError):
        model.generate(prompt[:, :0], 3)


def test_flops_per_token_counts_every_matrix_product():
    """Against PyTorch's own counter, forward and backward, attention's causal half not discounted there either."""
    from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

    @register_flop_formula(torch.ops.nanooec.unembedding)  # the counter does not look inside: three products
    def unembedding_flops(hidden, W, *_, **__):
        return 3 * 2 * hidden[0] * hidden[1] * W[0]

    model = make(vocab_size=384)
    tokens, targets = batch()
    with FlopCounterMode(display=False) as counter:
        model(tokens, targets)[0].backward()
    # The counter's attention backward pays a fifth product, recomputing the scores.
    weights = model.flops_per_token() - 12 * 2 * 32 * 16
    assert weights * tokens.numel() <= counter.get_total_flops() <= 1.1 * model.flops_per_token() * tokens.numel()


@pytest.mark.parametrize(
    "changes",
    ({"n_head": 3}, {"n_layer": 0}, {"vocab_size": -1}, {"oec": "mu"}, {"z_loss_weight": -1.0}, {"n_head": 16},
     {"mu_loss_weight": math.nan}),
)  # fmt: skip
def test_impossible_models_are_refused_in_one_line(changes):
    with pytest.raises(ValueError) as error:
        make(**changes)
    assert "\n" not in str(error.value) and next(iter(changes)) in str(error.value)


def test_too_long_a_text_is_refused():
    with pytest.raises(ValueError, match="block_size"):
        make()(torch.zeros(1, 17, dtype=torch.int64))


def test_a_model_made_on_the_meta_device_is_the_same_once_it_has_memory():
    config = GPTConfig(vocab_size=300, block_size=16, n_layer=2, n_head=2, n_embd=32)
    usual = GPT(config)
    with torch.device("meta"):
        model = GPT(config)
    tokens = torch.zeros(2, 16, dtype=torch.long, device="meta")
    assert model(tokens, tokens)[0].shape == () and model.num_parameters() == usual.num_parameters()
    model.to_empty(device="cpu")
    for made in (usual, model):
        torch.manual_seed(0)
        made.initialize()
    tokens = torch.arange(16)[None]
    assert torch.equal(model(tokens), usual(tokens))
