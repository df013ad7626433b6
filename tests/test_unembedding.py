"""runtime/unembedding.py: the lean loss equals the plain one, in little memory, and refuses what it cannot differentiate."""

import itertools
from pathlib import Path

import pytest
import torch

import oec
from model import GPT, GPTConfig
from runtime.unembedding import unembedding_loss
from tests.test_oec import D, N, PADDED, V, gradients, problem, reference

@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()  # past eight variants of one function it would run eager code, and say nothing


GRID = list(itertools.product((0.0, 5.0), (0.0, 0.1), (0, 1, 7, N, N + 5)))


@pytest.mark.parametrize("cap, z_weight, rows", GRID)
@pytest.mark.parametrize("vocab_size", (V, None))
@pytest.mark.parametrize("ignored", ("none", "some", "all"))
def test_equals_the_plain_loss(cap, z_weight, rows, vocab_size, ignored):
    hidden, W, targets = problem()
    targets = {"none": targets.clamp(min=0), "some": targets, "all": torch.full_like(targets, -1)}[ignored]
    options = {"z_loss_weight": z_weight, "soft_cap": cap, "vocab_size": vocab_size}
    expected = oec.unembedding_loss(hidden, W, targets, **options)
    got = unembedding_loss(hidden, W, targets, chunk_rows=rows, **options)
    for name, a, b in zip(got._fields, got, expected):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, equal_nan=bool(cap), msg=name)
    for a, b in zip(gradients(got.loss, hidden, W), gradients(expected.loss, hidden, W)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("logits_dtype", (None, torch.float32))
def test_equals_the_plain_loss_in_low_precision(dtype, logits_dtype):
    """The same roundings: of hidden, W and, unless they stay in float32, of the logits."""
    hidden, W, targets = problem(torch.float32, shift=8.0)
    with torch.autocast("cpu", dtype):
        got = unembedding_loss(hidden, W, targets, vocab_size=V, chunk_rows=7, logits_dtype=logits_dtype)
        rounded = [x.detach().to(dtype).float().requires_grad_() for x in (hidden, W)]
        if logits_dtype is None:
            expected = oec.unembedding_loss(hidden, W, targets, vocab_size=V)
        else:
            with torch.autocast("cpu", enabled=False):
                expected = oec.unembedding_loss(*rounded, targets, vocab_size=V)
    for name, a, b in zip(got._fields, got, expected):
        torch.testing.assert_close(a, b, rtol=2e-3 if logits_dtype is None else 1e-5, atol=1e-5, msg=name)
    assert (got.rounding_nats > 1e-6) == (logits_dtype is None)


def test_logits_in_float32_lose_no_drift():
    """Rows that share a component of 1,000: bfloat16 logits lose the loss to rounding, float32 ones do not."""
    hidden, W, targets = problem(torch.float32, scale=0.1)
    W = W.detach().bfloat16().float() + 0
    hidden = torch.cat((hidden.detach()[:, 1:], torch.ones(N, 1)), dim=1).bfloat16().float()
    W[:, -1] = 1024.0
    exact = reference(hidden.double(), W.double(), targets)[0].item()
    with torch.autocast("cpu", torch.bfloat16):
        low, wide = (unembedding_loss(hidden, W, targets, vocab_size=V, logits_dtype=x).loss.item() for x in (None, torch.float32))
    assert wide == pytest.approx(exact, abs=1e-3) and abs(low - exact) > 0.05


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_compiled_equals_eager(dtype):
    hidden, W, targets = problem(torch.float32)

    def run(function):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            parts = function(hidden, W, targets, vocab_size=V, z_loss_weight=0.1, soft_cap=5.0, chunk_rows=10)
        return *parts, *gradients(parts.loss * 1024, hidden, W)

    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for a, b in zip(run(unembedding_loss), run(torch.compile(unembedding_loss, fullgraph=True))):
        if not a.isnan().all():  # rounding_nats, under a cap
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * a.abs().max().item())


def test_any_number_of_tokens_is_compiled_once():
    """The softmax pass once, and what calls it once; sizes 0 and 1 each once more."""
    weight = torch.randn(128, 8, requires_grad=True)
    function = torch.compile(lambda hidden, targets: unembedding_loss(hidden, weight, targets, vocab_size=100).loss, dynamic=True)
    torch._dynamo.utils.counters.clear()

    def graphs_after(*sizes) -> int:
        for size in sizes:
            hidden = torch.randn(size, 8, requires_grad=True)
            loss = function(hidden, torch.arange(size) % 100)
            loss.backward()
            plain = oec.unembedding_loss(hidden, weight, torch.arange(size) % 100, vocab_size=100).loss
            assert torch.allclose(loss, plain, atol=1e-5)
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    assert graphs_after(16) == graphs_after(17, 20, 23, 31, 40, 41, 42, 50, 600) == 2
    assert graphs_after(1, 0) == graphs_after(3, 1, 0, 1000)


@pytest.mark.parametrize("compiled", (False, True))
def test_a_chunk_of_logits_is_the_largest_thing_ever_held(monkeypatch, compiled):
    """Three products a chunk, none computed twice, none of more rows than the chunk has."""
    hidden, W, targets = problem()
    function = torch.compile(unembedding_loss, fullgraph=True) if compiled else unembedding_loss
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
    function = torch.compile(unembedding_loss, fullgraph=True) if compiled else unembedding_loss

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
            ours = gradients(unembedding_loss(hidden, W, targets, vocab_size=V, chunk_rows=8).loss, hidden, W)
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
        low = gradients(unembedding_loss(hidden, W, targets).loss, hidden, W)
    true = gradients(unembedding_loss(hidden, W, targets).loss, hidden, W)
    for a, b in zip(low, true):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 5e-3 * b.norm()
        assert (a[b.abs() > 1e-2 * b.abs().median()] != 0).all()  # smaller ones may cancel to 0 in float16's sum


@pytest.mark.parametrize("ignored", (-100, V, 10**6))
def test_any_number_can_mark_ignored_targets(ignored):
    hidden, W, targets = problem()
    marked = torch.where(targets == -1, ignored, targets)
    for rows in (0, 7):
        a = unembedding_loss(hidden, W, targets, vocab_size=V, chunk_rows=rows)
        b = unembedding_loss(hidden, W, marked, vocab_size=V, chunk_rows=rows, ignore_index=ignored)
        assert all(torch.equal(x, y) for x, y in zip(a, b))
        assert all(torch.equal(x, y) for x, y in zip(gradients(a.loss, hidden, W), gradients(b.loss, hidden, W)))


def test_a_scaled_loss_has_scaled_gradients_and_parts_add_up():
    """Gradient scaling and accumulation: linear in the loss, as autograd is."""
    hidden, W, targets = problem()
    whole = gradients(unembedding_loss(hidden, W, targets, vocab_size=V).loss * 65536, hidden, W)
    halves = [slice(0, 15), slice(15, N)]
    weights = [(targets[half] != -1).sum() / (targets != -1).sum() for half in halves]
    loss = sum(
        w.double() * unembedding_loss(hidden[h], W, targets[h], vocab_size=V).loss for w, h in zip(weights, halves)
    )
    for a, b in zip(whole, gradients(loss * 65536, hidden, W)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_no_counted_token_gives_zero_not_nan():
    hidden, W, targets = problem()
    parts = unembedding_loss(hidden, W, torch.full_like(targets, -1), vocab_size=V)
    assert parts.loss == 0
    assert all((g == 0).all() for g in gradients(parts.loss, hidden, W))


def test_statistics_survive_a_drift():
    """Logits near 100,000 with a spread of 1: the spread is not lost to cancellation in float32."""
    hidden = torch.ones(64, 2)
    W = torch.stack((torch.full((512,), 1e5), torch.randn(512, generator=torch.Generator().manual_seed(0))), dim=1)
    logits = hidden.double() @ W.double().T
    parts = unembedding_loss(hidden, W, torch.zeros(64, dtype=torch.int64))
    assert parts.logit_std.item() == pytest.approx(logits.std(correction=0).item(), rel=0.01)
    assert parts.logit_mean.item() == pytest.approx(logits.mean().item(), rel=1e-6)


# --- what it cannot differentiate

MESSAGE = r"oec\.unembedding_loss.*--fused_unembedding=False"


@pytest.mark.parametrize("name", oec.UnembeddingLoss._fields[1:-1])
@pytest.mark.parametrize("compiled", (False, True))
def test_only_the_loss_has_a_gradient(name, compiled):
    """Any other entry raises, alone and in a sum, and the loss beside it is unharmed."""
    hidden, W, targets = problem()
    f = lambda h, w: unembedding_loss(h, w, targets, vocab_size=V)
    parts = (torch.compile(f) if compiled else f)(hidden, W)
    assert all(g.isfinite().all() for g in torch.autograd.grad(parts.loss, (hidden, W), retain_graph=True))
    for value in (getattr(parts, name), parts.loss + 0.1 * getattr(parts, name) ** 2):
        with pytest.raises(Exception, match=MESSAGE):
            torch.autograd.grad(value, (hidden, W), retain_graph=True)


def test_second_and_forward_derivatives_are_refused():
    hidden, W, targets = problem()
    f = lambda h: unembedding_loss(h, W.detach(), targets, vocab_size=V).loss
    ones = torch.ones_like(hidden)
    with pytest.raises(RuntimeError, match=MESSAGE):
        torch.autograd.functional.hvp(f, hidden.detach(), ones)
    with pytest.raises(RuntimeError, match=MESSAGE):
        torch.func.jvp(f, (hidden.detach(),), (ones,))
    with pytest.raises(RuntimeError, match=MESSAGE):
        torch.func.jvp(torch.compile(f), (hidden.detach(),), (ones,))
    with pytest.raises(RuntimeError, match=MESSAGE):
        torch.func.grad(f)(hidden.detach())
    (gradient,) = torch.autograd.grad(f(hidden), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=MESSAGE):
        gradient.square().sum().backward()


def test_the_operator_keeps_pytorchs_rules():
    """The check of a compiled backward pass differentiates every output, which is refused here: the tests above stand for it."""
    hidden, W, targets = problem()
    options = (V, 0.1, 5.0, -1, 7, torch.float64, torch.float64, True, False)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.nanooec.unembedding, (hidden, W, targets, *options), test_utils=checks)


@pytest.mark.parametrize("cap", (1e6, 1e8))
def test_large_soft_caps_change_nothing(cap):
    parts = unembedding_loss(torch.ones(1, 1), torch.tensor([[1.0], [0.0]]), torch.tensor([0]), soft_cap=cap)
    assert parts.loss.item() == pytest.approx(0.313262, abs=1e-6)


def test_sums_over_tokens_are_not_formed_in_half_precision():
    """65,536 tokens whose gradients of one row add up to more than float16 holds, before they are averaged."""
    hidden, targets = torch.full((70_000, 4), 2.0), torch.zeros(70_000, dtype=torch.int64)
    W = torch.zeros(3, 4, requires_grad=True)
    with torch.autocast("cpu", torch.float16):
        loss = unembedding_loss(hidden, W, targets, chunk_rows=70_000).loss
    torch.testing.assert_close(gradients(loss, W)[0][:, 0], torch.tensor([-4 / 3, 2 / 3, 2 / 3]), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("device", ("cpu", pytest.param("cuda", marks=pytest.mark.gpu)))
@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)))
@pytest.mark.parametrize("cap, z_weight, rows", ((0.0, 0.0, 0), (5.0, 0.1, 7), (0.0, 0.1, N + 5)))
@pytest.mark.parametrize("compiled", (False, True))
def test_every_number_beside_float64(device, dtype, tolerance, cap, z_weight, rows, compiled):
    """Every number and both gradients beside the float64 reference, the loss scaled as a GradScaler does."""
    hidden, W, targets = (x.detach().to(device) for x in problem(torch.float32))
    hidden, W = (x.to(dtype).float().requires_grad_() for x in (hidden, W))
    options = {"z_loss_weight": z_weight, "soft_cap": cap}
    expected = reference(hidden.double(), W.double(), targets, **options)
    function = torch.compile(unembedding_loss, fullgraph=True) if compiled else unembedding_loss
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        parts = function(hidden, W, targets, vocab_size=V, chunk_rows=rows, **options)
    for name, a, b in zip(parts._fields, parts, expected):
        assert a.item() == pytest.approx(b.item(), rel=tolerance, abs=tolerance), name
    for a, b in zip(gradients(parts.loss * 1024, hidden, W), gradients(expected[0] * 1024, hidden, W)):
        assert (a - b).norm() < tolerance * b.norm()


# --- centring's own backward pass


def rare_row_errors(vocab_size: int, centred) -> torch.Tensor:
    """Relative errors of ∂L/∂e_i in bfloat16 against float64, of the rows whose token is not in the batch and lies 8 nats
    down, as after long training: their median, 99th percentile and largest."""
    generator = torch.Generator().manual_seed(0)
    frequent = vocab_size // 8
    W = torch.randn(vocab_size, 32, generator=generator) * 0.5
    W[frequent:, 0] -= 8
    hidden = torch.randn(512, 32, generator=generator)
    hidden[:, 0] = 1
    targets = torch.randint(0, frequent, (512,), generator=generator)

    def gradient(dtype):
        w = W.to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = unembedding_loss(hidden.to(w.dtype), centred(w), targets).loss
        return gradients(loss, w)[0].double()

    exact = gradient(torch.float64)
    is_rare = torch.ones(vocab_size, dtype=torch.bool).index_fill(0, targets.unique(), False)
    errors = ((gradient(torch.bfloat16) - exact).norm(dim=1) / exact.norm(dim=1))[is_rare]
    return torch.stack((errors.median(), errors.quantile(0.99), errors.max()))


@pytest.mark.parametrize("vocab_size", (4096, 50257))
def test_centring_as_the_model_does_it_spares_rare_tokens(vocab_size):
    """Their gradients are as good as the plain path's. Through the mean's own gradient they are not."""
    model = GPT(GPTConfig(vocab_size=vocab_size, block_size=4, n_layer=1, n_head=2, n_embd=32, oec="mu_centering"))

    def as_the_model_does(w):
        del model.unembedding.weight
        model.unembedding.weight = w
        return model.output_embedding()

    model.config.vocab_size = vocab_size
    plain, centred = rare_row_errors(vocab_size, lambda w: w), rare_row_errors(vocab_size, as_the_model_does)
    assert (centred <= 1.5 * plain).all(), (centred, plain)
    if vocab_size == 4096:
        assert (rare_row_errors(vocab_size, oec.center) > 3 * plain)[1:].all()  # what is being avoided
