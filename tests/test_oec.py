"""oec.py: the paper's two facts, and the unembedding loss against a plain reference."""

import itertools
from pathlib import Path

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
    z_loss = (log_z**2).mean()
    loss = cross_entropy + z_loss_weight * z_loss
    return loss, cross_entropy, z_loss, log_z.mean(), logits.mean(), logits.std(correction=0), logits.abs().max()


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


OPTIONS = list(itertools.product((0.0, 5.0), (0.0, 0.1), (0, 1, 7, N, N + 5)))


@pytest.mark.parametrize("cap, z_weight, rows", OPTIONS)
@pytest.mark.parametrize("vocab_size", (V, None))
def test_unembedding_loss_equals_the_reference(cap, z_weight, rows, vocab_size):
    hidden, W, targets = problem()
    options = {"z_loss_weight": z_weight, "soft_cap": cap}
    expected = reference(hidden, W, targets, vocab_size or PADDED, **options)
    got = oec.unembedding_loss(hidden, W, targets, vocab_size=vocab_size, chunk_rows=rows, **options)
    for name, a, b in zip(got._fields, got, expected):
        torch.testing.assert_close(a.double(), b.detach().double() if name != "loss" else b, rtol=1e-10, atol=1e-10)
        assert a.requires_grad == (name == "loss")
    for a, b in zip(gradients(got.loss, hidden, W), gradients(expected[0], hidden, W)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_compiled_equals_eager(dtype):
    hidden, W, targets = problem(torch.float32)

    def run(function):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            parts = function(hidden, W, targets, vocab_size=V, z_loss_weight=0.1, soft_cap=5.0, chunk_rows=10)
        return *parts, *gradients(parts.loss * 1024, hidden, W)

    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for a, b in zip(run(oec.unembedding_loss), run(torch.compile(oec.unembedding_loss, fullgraph=True))):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * a.abs().max().item())


@pytest.mark.parametrize("compiled", (False, True))
def test_a_chunk_of_logits_is_the_largest_thing_ever_held(monkeypatch, compiled):
    """Three products a chunk, none computed twice, none of more rows than the chunk has."""
    hidden, W, targets = problem()
    function = torch.compile(oec.unembedding_loss) if compiled else oec.unembedding_loss
    function(hidden, W, targets, vocab_size=V, chunk_rows=5)
    shapes = []
    for owner, name in ((torch, "mm"), (torch.Tensor, "addmm_")):

        def recorded(*inputs, original=getattr(owner, name), **options):
            result = original(*inputs, **options)
            shapes.append(tuple(result.shape))
            return result

        monkeypatch.setattr(owner, name, recorded)
    function(hidden, W, targets, vocab_size=V, chunk_rows=5)
    rows = [5] * (N // 5) + [N % 5]
    assert sorted(shapes) == sorted([(r, PADDED) for r in rows] + [(r, D) for r in rows] + [(PADDED, D)] * len(rows))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads a process's peak memory from Linux's /proc")
@pytest.mark.parametrize("compiled", (False, True))
def test_the_logits_are_never_in_memory_together(compiled):
    """Compiled too, where a compiler that fuses chunks would hold them all: 256 MiB here."""
    hidden, W = torch.randn(4096, 8).requires_grad_(), torch.randn(16384, 8).requires_grad_()
    targets = torch.randint(0, 16384, (4096,))
    function = torch.compile(oec.unembedding_loss) if compiled else oec.unembedding_loss

    def peak_above_resident() -> float:
        Path("/proc/self/clear_refs").write_text("5")
        fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        resident = int(fields["VmRSS"].split()[0])
        gradients(function(hidden, W, targets, chunk_rows=64).loss, hidden, W)
        fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        return (int(fields["VmHWM"].split()[0]) - resident) / 2**10

    peak_above_resident()
    assert peak_above_resident() < 64


@pytest.mark.parametrize("shift", (0.0, 4.0))  # drifted rows are where half precision hurts
def test_bfloat16_gradients_are_as_close_to_the_truth_as_the_plain_path(shift):
    ours_worse = []
    for seed in range(8):
        hidden, W, targets = problem(torch.float32, seed, shift=shift)
        low = [x.detach().bfloat16().double().requires_grad_() for x in (hidden, W)]
        truth = gradients(reference(*low, targets)[0], *low)
        with torch.autocast("cpu", torch.bfloat16):
            ours = gradients(oec.unembedding_loss(hidden, W, targets, vocab_size=V, chunk_rows=8).loss, hidden, W)
            logits = hidden[targets != -1] @ W[:V].T
            plain = gradients(torch.nn.functional.cross_entropy(logits.float(), targets[targets != -1]), hidden, W)
        errors = [[(g.double() - t).norm() / t.norm() for g, t in zip(path, truth)] for path in (ours, plain)]
        ours_worse.append([(a / b).item() for a, b in zip(*errors)])
    assert (torch.tensor(ours_worse).median(dim=0).values <= 1.02).all(), ours_worse


def test_float16_gradients_do_not_underflow():
    """1/N times a small probability is below float16's smallest number: it must not be formed there."""
    tokens, vocab = 4096, 2048
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(tokens, D, generator=generator) * 0.1).requires_grad_()
    W = torch.randn(vocab, D, generator=generator).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    with torch.autocast("cpu", torch.float16):
        low = gradients(oec.unembedding_loss(hidden, W, targets).loss, hidden, W)
    true = gradients(oec.unembedding_loss(hidden, W, targets).loss, hidden, W)
    for a, b in zip(low, true):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 5e-3 * b.norm()
        assert (a[b.abs() > 1e-2 * b.abs().median()] != 0).all()  # smaller ones may cancel to 0 in float16's sum


@pytest.mark.parametrize("ignored", (-100, V, 10**6))
def test_any_number_can_mark_ignored_targets(ignored):
    hidden, W, targets = problem()
    marked = torch.where(targets == -1, ignored, targets)
    for rows in (0, 7):
        a = oec.unembedding_loss(hidden, W, targets, vocab_size=V, chunk_rows=rows)
        b = oec.unembedding_loss(hidden, W, marked, vocab_size=V, chunk_rows=rows, ignore_index=ignored)
        assert all(torch.equal(x, y) for x, y in zip(a, b))
        assert all(torch.equal(x, y) for x, y in zip(gradients(a.loss, hidden, W), gradients(b.loss, hidden, W)))


def test_a_scaled_loss_has_scaled_gradients_and_parts_add_up():
    """Gradient scaling and accumulation: linear in the loss, as autograd is."""
    hidden, W, targets = problem()
    whole = gradients(oec.unembedding_loss(hidden, W, targets, vocab_size=V).loss * 65536, hidden, W)
    halves = [slice(0, 15), slice(15, N)]
    weights = [(targets[half] != -1).sum() / (targets != -1).sum() for half in halves]
    loss = sum(
        w.double() * oec.unembedding_loss(hidden[h], W, targets[h], vocab_size=V).loss for w, h in zip(weights, halves)
    )
    for a, b in zip(whole, gradients(loss * 65536, hidden, W)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_no_counted_token_gives_zero_not_nan():
    hidden, W, targets = problem()
    parts = oec.unembedding_loss(hidden, W, torch.full_like(targets, -1), vocab_size=V)
    assert parts.loss == 0
    assert all((g == 0).all() for g in gradients(parts.loss, hidden, W))


def test_statistics_survive_a_drift():
    """Logits near 100,000 with a spread of 1: the spread is not lost to cancellation in float32."""
    hidden = torch.ones(64, 2)
    W = torch.stack((torch.full((512,), 1e5), torch.randn(512, generator=torch.Generator().manual_seed(0))), dim=1)
    logits = hidden.double() @ W.double().T
    parts = oec.unembedding_loss(hidden, W, torch.zeros(64, dtype=torch.int64))
    assert parts.logit_std.item() == pytest.approx(logits.std(correction=0).item(), rel=0.01)
    assert parts.logit_mean.item() == pytest.approx(logits.mean().item(), rel=1e-6)


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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)))
@pytest.mark.parametrize("cap, z_weight, rows", ((0.0, 0.0, 0), (5.0, 0.1, 7), (0.0, 0.1, N + 5)))
@pytest.mark.parametrize("compiled", (False, True))
def test_on_a_gpu(dtype, tolerance, cap, z_weight, rows, compiled):
    """Every number and both gradients beside the float64 reference, the loss scaled as a GradScaler does."""
    hidden, W, targets = (x.detach().cuda() for x in problem(torch.float32))
    hidden, W = (x.to(dtype).float().requires_grad_() for x in (hidden, W))
    options = {"z_loss_weight": z_weight, "soft_cap": cap}
    expected = reference(hidden.double(), W.double(), targets, **options)
    function = torch.compile(oec.unembedding_loss) if compiled else oec.unembedding_loss
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        parts = function(hidden, W, targets, vocab_size=V, chunk_rows=rows, **options)
    for name, a, b in zip(parts._fields, parts, expected):
        assert a.item() == pytest.approx(b.item(), rel=tolerance, abs=tolerance), name
    for a, b in zip(gradients(parts.loss * 1024, hidden, W), gradients(expected[0] * 1024, hidden, W)):
        assert (a - b).norm() < tolerance * b.norm()
