"""oec.py: the paper's two facts, the plain loss against the textbook, and what rounding costs."""

import itertools
import math

import pytest
import torch

import oec

V, PADDED, D, N = 50, 64, 16, 37


def problem(dtype=torch.float64, seed=0, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64) * scale
    W = torch.randn(PADDED, D, generator=generator, dtype=torch.float64) * 3 + shift
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[::5] = -1
    return hidden.to(dtype).requires_grad_(), W.to(dtype).requires_grad_(), targets


def reference(hidden, W, targets, vocab_size=V, z_loss_weight=0.0, soft_cap=0.0):
    """The textbook: all logits at once, autograd for the gradients."""
    counted = targets != -1
    logits = hidden[counted] @ W[:vocab_size].T
    if soft_cap:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    log_z = torch.logsumexp(logits, dim=1)
    cross_entropy = torch.nn.functional.cross_entropy(logits, targets[counted])
    z_loss = oec.z_loss(logits)
    loss = cross_entropy + z_loss_weight * z_loss
    return loss, cross_entropy, z_loss, log_z.mean(), logits.mean(), logits.std(correction=0), logits.abs().max()


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


PLAIN = list(itertools.product((0.0, 5.0), (0.0, 0.1)))


@pytest.mark.parametrize("cap, z_weight", PLAIN)
@pytest.mark.parametrize("vocab_size", (V, None))
def test_unembedding_loss_equals_the_reference(cap, z_weight, vocab_size):
    """Every entry, and every entry's gradient."""
    hidden, W, targets = problem()
    options = {"z_loss_weight": z_weight, "soft_cap": cap}
    expected = reference(hidden, W, targets, vocab_size or PADDED, **options)
    got = oec.unembedding_loss(hidden, W, targets, vocab_size=vocab_size, **options)
    for name, a, b in zip(got._fields, got, expected):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=name)
        for x, y in zip(torch.autograd.grad(a, (hidden, W), retain_graph=True), torch.autograd.grad(b, (hidden, W), retain_graph=True)):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10, msg=name)
    assert not got.rounding_nats.requires_grad


@pytest.mark.parametrize("cap, z_weight", PLAIN)
def test_derivatives_of_any_order(cap, z_weight):
    """Forward mode, second derivatives and a gradient penalty, of every entry that has them."""
    hidden, W, targets = (x[:6] if x.shape[0] == N else x[:8, :] for x in problem())
    targets = torch.where(targets < 8, targets, 3)
    hidden, W = hidden[:, :3].detach().requires_grad_(), W[:, :3].detach().requires_grad_()
    options = {"z_loss_weight": z_weight, "soft_cap": cap, "vocab_size": 7}
    for name in ("loss", "cross_entropy", "z_loss", "log_z", "logit_mean", "logit_std"):
        f = lambda h, w: getattr(oec.unembedding_loss(h, w, targets % 7, **options), name)
        assert torch.autograd.gradcheck(f, (hidden, W), check_forward_ad=True), name
        assert torch.autograd.gradgradcheck(f, (hidden, W)), name


def test_public_transforms_see_the_plain_loss():
    torch.manual_seed(0)
    h, W, t = torch.randn(4, 3).double(), torch.randn(5, 3).double(), torch.arange(4)
    f = lambda h: oec.unembedding_loss(h, W, t).loss
    assert torch.autograd.functional.hvp(f, h, torch.ones_like(h))[1].norm().item() == pytest.approx(0.5698, abs=1e-4)
    assert torch.func.jvp(f, (h,), (torch.ones_like(h),))[1].item() == pytest.approx(-0.3292, abs=1e-4)
    leaf = h.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(f)(h), torch.autograd.grad(f(leaf), leaf)[0])


def test_the_spread_has_a_finite_gradient_where_there_is_none():
    hidden, W = torch.ones(3, 2, requires_grad=True), torch.ones(5, 2, requires_grad=True)
    parts = oec.unembedding_loss(hidden, W, torch.zeros(3, dtype=torch.int64))
    assert parts.logit_std == 0
    assert all(g.isfinite().all() for g in gradients(parts.logit_std, hidden, W))


def test_no_counted_token_gives_zero_not_nan():
    hidden, W, targets = problem()
    for h, t in ((hidden, torch.full_like(targets, -1)), (hidden[:0], targets[:0])):
        parts = oec.unembedding_loss(h, W, t, vocab_size=V)
        assert all(value == 0 for value in parts)
        assert all((g == 0).all() for g in gradients(parts.loss, hidden, W))


@pytest.mark.parametrize("cap", (30.0, 1024.0, 1e6, 1e8))
def test_large_soft_caps_change_nothing(cap):
    parts = oec.unembedding_loss(torch.ones(1, 1), torch.tensor([[1.0], [0.0]]), torch.tensor([0]), soft_cap=cap)
    assert parts.loss.item() == pytest.approx(0.313262, abs=1e-4 if cap < 100 else 1e-6)


@pytest.mark.parametrize("shift", (1.0, -40.0))
def test_invariance(shift):
    """Fact 1: subtracting any vector from all rows changes neither the loss nor the hidden states' gradient."""
    hidden, W, targets = problem()
    vector = shift * torch.randn(D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for other in (W - vector, oec.center(W, V)):
        a, b = (oec.unembedding_loss(hidden, w, targets, vocab_size=V).loss for w in (W, other))
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(*(gradients(x, hidden)[0] for x in (a, b)), rtol=1e-10, atol=1e-12)


def test_zero_sum_gradient():
    """Fact 2: with cross-entropy alone the rows of ∂L/∂W sum to zero; z-loss breaks that; padding rows have none."""
    hidden, W, targets = problem()
    plain, with_z = (
        gradients(oec.unembedding_loss(hidden, W, targets, vocab_size=V, z_loss_weight=z).loss, W)[0] for z in (0.0, 0.1)
    )
    assert plain.sum(dim=0).abs().max() < 1e-13
    assert with_z.sum(dim=0).abs().max() > 1e-3
    assert (plain[V:] == 0).all() and (with_z[V:] == 0).all()


def test_centring():
    _, W, _ = problem()
    centered = oec.center(W, V)
    torch.testing.assert_close(oec.mean_embedding(W, V), W[:V].mean(dim=0))
    assert oec.mean_embedding(centered, V).abs().max() < 1e-15
    assert torch.equal(centered[V:], W[V:])
    assert torch.autograd.gradcheck(lambda w: oec.center(w, V), W)
    in_place = W.detach().clone()
    assert oec.center_(in_place, V) is in_place
    assert torch.equal(in_place, centered)
    assert oec.mean_embedding(W.bfloat16()).dtype == torch.float32 and oec.center(W.bfloat16(), V).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_mu_loss_is_not_formed_in_half_precision(dtype):
    W = torch.full((4, 100), 40.0)  # ‖μ‖ is 400, and its square beyond float16
    with torch.autocast("cpu", dtype):
        assert oec.mu_loss(W).item() == pytest.approx(160_000, rel=1e-6)
    assert oec.mu_loss(W.to(dtype)).item() == pytest.approx(160_000, rel=1e-6)


def test_centring_with_the_mean_detached():
    """The same matrix; and the same gradient where the loss does not see the shift."""
    hidden, W, targets = problem()
    exact, detached = oec.center(W, V), oec.center(W, V, detach_mean=True)
    assert torch.equal(exact, detached)
    for w in (exact, detached):
        w.retain_grad()
    grads = [gradients(oec.unembedding_loss(hidden, w, targets, vocab_size=V).loss, W)[0] for w in (exact, detached)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-13)
    seen = [gradients(oec.unembedding_loss(hidden, w, targets, vocab_size=V, z_loss_weight=0.1).loss, W)[0] for w in (oec.center(W, V), oec.center(W, V, detach_mean=True))]
    assert (seen[0] - seen[1]).abs().max() > 1e-3


def test_rounding_nats_is_the_spacing_squared_over_24():
    sizes = torch.tensor([1.0, 92.0, 255.0, 256.0, 588.0, 1152.0, 0.0])
    for dtype, bits in ((torch.bfloat16, 8), (torch.float16, 11), (torch.float32, 24)):
        expected = [(2.0 ** (math.floor(math.log2(s)) + 1 - bits)) ** 2 / 24 for s in sizes[:-1].tolist()]
        got = oec.rounding_nats(sizes, dtype)
        assert got[:-1].tolist() == pytest.approx(expected, rel=1e-6) and got[-1] < 1e-9
        for size, nats in zip(sizes[:-1].to(dtype), got):  # neighbouring numbers are that far apart
            upwards = torch.nextafter(size, torch.tensor(torch.inf, dtype=dtype)).double() - size.double()
            assert upwards.item() ** 2 / 24 == pytest.approx(nats.item(), rel=1e-6)
    assert oec.rounding_nats(torch.tensor(1e5), torch.float16).isnan()
    assert oec.rounding_nats(torch.tensor([[3.0]]).requires_grad_()).shape == (1, 1)


def test_rounding_nats_is_what_rounding_costs():
    """Calibrated logits, moved by a shift that the softmax does not see, and rounded."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2000, 1000, generator=generator, dtype=torch.float64)
    targets = torch.distributions.Categorical(logits=logits).sample()
    exact = torch.nn.functional.cross_entropy(logits, targets)
    for shift in (100.0, 200.0, 400.0):
        rounded = (logits + shift).bfloat16().double()
        cost = (torch.nn.functional.cross_entropy(rounded, targets) - exact).item()
        assert cost == pytest.approx(oec.rounding_nats(torch.tensor(shift)).item(), rel=0.35)


def test_diagnose_is_the_textbook():
    hidden, W, _ = problem(shift=4.0)
    hidden = hidden + 0.5
    logits = (hidden @ W[:V].T).detach()
    mu, rms = W[:V].mean(dim=0), logits.square().mean(dim=1).sqrt()
    expected = {
        "logit_mean": logits.mean(), "token_mean_std": logits.mean(dim=1).std(correction=0), "logit_std": logits.std(correction=0),
        "logit_absmax": logits.abs().max(), "mu_norm": mu.norm(), "mu_ratio": mu.norm() / W[:V].norm(dim=1).mean(),
        "cosine": torch.cosine_similarity(mu, hidden.mean(dim=0), dim=0),
        "rounding_nats_bfloat16": oec.rounding_nats(rms).mean(), "rounding_nats_float16": oec.rounding_nats(rms, torch.float16).mean(),
    }  # fmt: skip
    got = oec.diagnose(hidden.view(1, N, D), W, V)
    assert got == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-9)
    assert oec.diagnose(hidden.float(), W.float(), V) == pytest.approx(got, rel=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert oec.diagnose(hidden.float(), W.float(), V) == pytest.approx(got, rel=1e-4)
    for wrong in (hidden[:0], hidden[:, 1:]):
        with pytest.raises(ValueError, match="diagnose takes"):
            oec.diagnose(wrong, W, V)


def test_mu_loss_pulls_every_row_alike():
    _, W, _ = problem()
    (gradient,) = gradients(oec.mu_loss(W, V), W)
    mu = W[:V].mean(dim=0)
    torch.testing.assert_close(oec.mu_loss(W, V), mu @ mu)
    torch.testing.assert_close(gradient[:V], (2 * mu / V).expand(V, D))
    assert (gradient[V:] == 0).all()


def test_soft_cap():
    logits = torch.linspace(-100, 100, 201)
    assert torch.equal(oec.soft_cap(logits, 0), logits)
    capped = oec.soft_cap(logits, 30.0)
    assert capped.abs().max() <= 30
    torch.testing.assert_close(capped, 30 * torch.tanh(logits / 30))


def test_geometry():
    isotropic = torch.cat((torch.eye(8), -torch.eye(8)))
    values = oec.geometry(isotropic)
    assert values["mu_norm"] == 0 and values["mean_norm"] == values["max_norm"] == 1
    assert values["isotropy"] == pytest.approx(1)
    drifted = oec.geometry(isotropic + 100)
    assert drifted["mu_ratio"] == pytest.approx(1, abs=0.01) and drifted["mean_cosine"] == pytest.approx(1, abs=0.01)
    assert drifted["mu_norm"] == pytest.approx(100 * 8**0.5)
    assert 0 <= drifted["isotropy"] < 1e-6
    assert oec.geometry(torch.cat((isotropic, torch.full((4, 8), 1e9))), vocab_size=16) == values
    assert all(isinstance(value, float) for value in values.values())


@pytest.mark.parametrize(
    "call",
    (
        lambda h, W, t: oec.unembedding_loss(h, W[:, 1:], t),
        lambda h, W, t: oec.unembedding_loss(h, W, t[1:]),
        lambda h, W, t: oec.unembedding_loss(h, W, t, vocab_size=PADDED + 1),
        lambda h, W, t: oec.unembedding_loss(h, W, t, z_loss_weight=-1.0),
        lambda h, W, t: oec.mean_embedding(W, 0),
        lambda h, W, t: oec.mean_embedding(h[0]),
    ),
)
def test_shapes_that_do_not_fit_are_refused(call):
    with pytest.raises(ValueError) as error:
        call(*problem())
    assert "\n" not in str(error.value)
