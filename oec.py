"""Output Embedding Centering, the method (Stollenwerk et al., arXiv 2601.02031), and its baselines.

Notation, as in the paper:

    V        real vocabulary size; W may hold more rows (padding), which are not tokens
    e_i      output embedding of token i: row i of the unembedding weight W, shape (padded_vocab, d)
    h        final hidden state of one position, shape (d,)
    l_i      logit e_i·h, and log Z = logsumexp_i l_i
    μ        mean output embedding (1/V) Σ_i e_i; the mean logit is exactly μ·h

The loss, log Z − l_target, does not see a shift common to all logits, so nothing in it holds μ, and
Adam makes μ drift. Four remedies:

    μ-centering   e_i ← e_i − μ                     center, center_
    μ-loss        L ← L + λ μᵀμ                     mu_loss
    z-loss        L ← L + λ mean((log Z)²)          unembedding_loss(z_loss_weight=λ)
    soft-capping  l ← c·tanh(l / c)                 soft_cap, unembedding_loss(soft_cap=c)

Padding rows never enter a mean, a statistic or log Z. This file needs PyTorch and nothing else.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

# A chunk of logits holds about this many numbers, but has CHUNK_ROWS tokens at least: small beside the model (on a
# CPU, inside its caches), large enough to keep the matrix units busy and additions into the weight gradient rare.
CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**28}
CHUNK_ROWS = 256


# --- the mean output embedding and what is done with it ------------------------------------------


def mean_embedding(W: Tensor, vocab_size: int | None = None) -> Tensor:
    """μ = (1/V) Σ_i e_i over the real rows of `W (padded_vocab, d)`: shape (d,), at least float32 (paper, §2).

    Of a DTensor, as FSDP2 shards weights, it is the whole μ on every process, a plain tensor.
    """
    V, dtype = _real_size(W, vocab_size), torch.promote_types(W.dtype, torch.float32)
    if not _is_sharded(W):
        return _real_rows(W, V).mean(dim=0, dtype=dtype)
    # A slice would be gathered whole on every process. `redistribute` here moves nothing, but its gradient comes sharded.
    real = torch.where(_is_real(W, V), W, 0).redistribute(placements=W.placements)
    return (real.sum(dim=0, dtype=dtype) / V).full_tensor()


def center(W: Tensor, vocab_size: int | None = None) -> Tensor:
    """e_i − μ on the real rows, padding rows untouched; differentiable; shape and dtype of `W` (paper, §4).

    Used in the forward pass it leaves probabilities, loss and ∂L/∂h as they were, tied weights or not.
    """
    centered = (W - _beside(W, mean_embedding(W, vocab_size))).to(W.dtype)
    if vocab_size is None or vocab_size == W.shape[0]:
        return centered
    return torch.where(_is_real(W, vocab_size), centered, W)


@torch.no_grad()
def center_(W: Tensor, vocab_size: int | None = None) -> Tensor:
    """The paper's procedure: e_i ← e_i − μ in place, to be called after every optimizer step. Returns `W`."""
    if _is_sharded(W):  # a slice of it is a copy
        return W.copy_(center(W, vocab_size))
    _real_rows(W, vocab_size).sub_(mean_embedding(W, vocab_size))
    return W


def mu_loss(W: Tensor, vocab_size: int | None = None) -> Tensor:
    """μᵀμ, a scalar, unweighted: the paper adds λ = 1e-4 times it to the loss (paper, §4)."""
    mu = mean_embedding(W, vocab_size)
    return mu @ mu


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """cap·tanh(logits/cap), elementwise; `cap = 0` means off (Gemma 2, arXiv 2408.00118)."""
    return cap * torch.tanh(logits / cap) if cap else logits


def _real_size(W: Tensor, vocab_size: int | None) -> int:
    if W.ndim != 2:
        raise ValueError(f"the unembedding weight must be (padded_vocab, d), not of shape {tuple(W.shape)}")
    if vocab_size is not None and not 0 < vocab_size <= W.shape[0]:
        raise ValueError(f"vocab_size={vocab_size} must lie in 1..{W.shape[0]}, the rows of the unembedding weight")
    return vocab_size or W.shape[0]


def _real_rows(W: Tensor, vocab_size: int | None) -> Tensor:
    V = _real_size(W, vocab_size)
    return W if V == W.shape[0] else W[:V]  # a whole slice would cost its gradient a copy


def _is_real(W: Tensor, vocab_size: int) -> Tensor:
    return _beside(W, torch.arange(W.shape[0], device=W.device)[:, None] < vocab_size)


def _is_sharded(W: Tensor) -> bool:
    return hasattr(W, "device_mesh")  # a DTensor, without the seconds that importing the class takes


def _beside(W: Tensor, tensor: Tensor) -> Tensor:
    """`tensor`, the same on every process, as an operand of `W`: a DTensor takes no plain tensors."""
    if not _is_sharded(W):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(tensor, W.device_mesh, [Replicate()] * W.device_mesh.ndim)


# --- the unembedding and its loss ----------------------------------------------------------------


class UnembeddingLoss(NamedTuple):
    """Scalars. Only `loss` carries a gradient. Means and the spread are over the counted tokens' real logits."""

    loss: Tensor  # cross_entropy + z_loss_weight · z_loss
    cross_entropy: Tensor  # mean of log Z − l_target, nats
    z_loss: Tensor  # mean of (log Z)², unweighted
    log_z: Tensor  # mean of log Z
    logit_mean: Tensor
    logit_std: Tensor
    logit_absmax: Tensor


def unembedding_loss(
    hidden: Tensor,
    W: Tensor,
    targets: Tensor,
    *,
    vocab_size: int | None = None,
    z_loss_weight: float = 0.0,
    soft_cap: float = 0.0,
    ignore_index: int = -1,
    chunk_rows: int = 0,
) -> UnembeddingLoss:
    """Cross-entropy and z-loss of the logits `hidden @ W.T`, with their statistics, a chunk of tokens at a time.

    hidden (N, d), W (padded_vocab, d), targets (N,) int64; tokens whose target is `ignore_index` do not
    count. The whole (N, padded_vocab) logits never exist: each chunk's gradient is formed while its logits
    are at hand, so forward and backward cost three matrix products in all. `chunk_rows` is the tokens in a
    chunk, 0 to choose by size. Logits and statistics are those the softmax sees, after soft-capping.
    Matrix products run in autocast's dtype, all else in float32 (float64 for float64 input).
    With no counted token at all the loss is 0. Raises ValueError for shapes that do not fit.
    """
    if hidden.ndim != 2 or W.ndim != 2 or hidden.shape[1] != W.shape[1] or targets.shape != hidden.shape[:1]:
        raise ValueError(
            "unembedding_loss takes hidden (N, d), W (padded_vocab, d) and targets (N,), not "
            f"{tuple(hidden.shape)}, {tuple(W.shape)} and {tuple(targets.shape)}"
        )
    if z_loss_weight < 0 or soft_cap < 0 or chunk_rows < 0:
        raise ValueError("z_loss_weight, soft_cap and chunk_rows must not be negative")
    vocab_size = _real_size(W, vocab_size)
    device = hidden.device.type
    compute_dtype = hidden.dtype
    if torch.is_autocast_enabled(device) and compute_dtype != torch.float64:
        compute_dtype = torch.get_autocast_dtype(device)
    if chunk_rows == 0:
        most = max(CHUNK_ROWS, CHUNK_ELEMENTS.get(device, 2**26) // W.shape[0])
        chunks = max(1, -(-len(hidden) // most))
        chunk_rows = max(1, -(-len(hidden) // chunks))  # all chunks about equal
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or W.requires_grad)
    options = (vocab_size, z_loss_weight, soft_cap, ignore_index, chunk_rows, compute_dtype, needs_grad)
    loss, statistics, *_ = _unembedding(hidden, W, targets, *options, torch.compiler.is_compiling())
    return UnembeddingLoss(loss, *statistics.detach().unbind())


# One operator, opaque to the compiler: left to itself it would fuse the chunks and hold all their logits at once.
@torch.library.custom_op("nanooec::unembedding", mutates_args=())
def _unembedding(
    hidden: Tensor, W: Tensor, targets: Tensor, vocab_size: int, z_weight: float, cap: float, ignore_index: int,
    chunk_rows: int, dtype: torch.dtype, needs_grad: bool, compiled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, the other scalars of UnembeddingLoss, ∂(sum over tokens)/∂hidden and ∂/∂W, and 1/count.

    Gradients are formed here, where the logits are, as sums over tokens. The 1/count waits for `backward` and float32:
    half precision would lose it, since 1/N times a probability of one in 50,000 is below float16's smallest number.
    """
    wide = torch.promote_types(dtype, torch.float32)
    softmax_pass = _compiled_softmax_pass() if compiled else _softmax_pass
    (N, d), rows = hidden.shape, W.shape[0]
    with torch.autocast(hidden.device.type, enabled=False):
        hidden_low, W_low = hidden.to(dtype), W.to(dtype)
        buffer = hidden_low.new_empty(min(chunk_rows, N), rows)  # one chunk's logits, then their gradient
        statistics = hidden.new_empty(5, N, dtype=wide)
        grad_hidden = hidden_low.new_empty(N if needs_grad else 0, d)
        grad_W = W.new_zeros(rows if needs_grad else 0, d, dtype=wide)
        for first in range(0, N, chunk_rows):
            chunk = slice(first, first + chunk_rows)
            h, target = hidden_low[chunk], targets[chunk]
            logits = torch.mm(h, W_low.T, out=buffer[: len(h)])
            real = logits[:, :vocab_size]
            statistics[:, chunk] = softmax_pass(real, target, z_weight, cap, ignore_index, wide, needs_grad)
            if needs_grad:
                logits[:, vocab_size:] = 0
                torch.mm(logits, W_low, out=grad_hidden[chunk])
                grad_W.addmm_(logits.T, h) if dtype == wide else grad_W.add_(logits.T @ h)
        loss, reported, inverse_count = _reduce(statistics, targets != ignore_index, z_weight)
    return loss, reported, grad_hidden, grad_W, inverse_count


@_unembedding.register_fake
def _(hidden, W, targets, vocab_size, z_weight, cap, ignore_index, chunk_rows, dtype, needs_grad, compiled):
    wide, n = torch.promote_types(dtype, torch.float32), int(needs_grad)
    scalar = hidden.new_empty((), dtype=wide)
    grad_hidden = hidden.new_empty(n * hidden.shape[0], hidden.shape[1], dtype=dtype)
    grad_W = W.new_empty(n * W.shape[0], W.shape[1], dtype=wide)
    return scalar, hidden.new_empty(6, dtype=wide), grad_hidden, grad_W, torch.empty_like(scalar)


def _save_gradients(ctx, inputs, output):
    ctx.save_for_backward(*output[2:])
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype


def _scale_gradients(ctx, grad_loss, *_):
    grad_hidden, grad_W, inverse_count = ctx.saved_tensors
    scale = grad_loss * inverse_count
    return (grad_hidden * scale).to(ctx.dtypes[0]), (grad_W * scale).to(ctx.dtypes[1]), *[None] * 9


_unembedding.register_autograd(_scale_gradients, setup_context=_save_gradients)


def _softmax_pass(logits, target, z_weight, cap, ignore_index, wide, needs_grad):
    """One chunk: five numbers a token, (5, rows); `logits` become ∂(Σ over tokens of the loss)/∂(logits before the cap).

        L         = log Z − l_target + λ (log Z)²
        ∂L/∂l_i   = p_i (1 + 2 λ log Z) − 1[i = target]
        l         = c·tanh(raw / c) = 2c·σ(2 raw / c) − c   gives   ∂l/∂raw = 1 − (l/c)²

    Mean and variance of a token's logits are taken about its largest logit: nothing cancels when all of
    them have drifted far from zero together, which is the case worth watching.
    """

    def capped(raw):  # the sigmoid takes a third of tanh's time on a CPU; it is wide here, and tanh's equal to rounding
        return 2 * cap * torch.sigmoid(raw * (2 / cap)) - cap if cap else raw

    raw = logits.to(wide)  # (rows, V)
    highest, lowest = capped(raw.amax(dim=1, keepdim=True)), capped(raw.amin(dim=1, keepdim=True))  # (rows, 1)
    l = capped(raw)
    below_highest = l - highest
    log_sum = below_highest.exp().sum(dim=1, keepdim=True).log()
    log_z = highest + log_sum

    vocab_size = logits.shape[1]
    is_counted = (target != ignore_index)[:, None]
    target = torch.where(is_counted, target[:, None], 0)
    l_target = capped(raw.gather(1, target))
    mean_distance = below_highest.sum(dim=1, keepdim=True) / vocab_size
    variance = below_highest.square().sum(dim=1, keepdim=True) / vocab_size - mean_distance.square()
    absmax = torch.maximum(highest.abs(), lowest.abs())
    statistics = torch.cat((log_z, l_target, highest + mean_distance, variance, absmax), dim=1).T
    if needs_grad:
        is_target = torch.arange(vocab_size, device=l.device, dtype=torch.int32) == target.int()
        # The probability once more from its exponent: cheaper than a second buffer of a chunk's size.
        grad = (below_highest - log_sum).exp() * (1 + 2 * z_weight * log_z) - is_target.to(wide)
        if cap:
            grad = grad * (1 - (l / cap).square())
        logits.copy_(torch.where(is_counted, grad, 0.0))
    return statistics


@cache
def _compiled_softmax_pass():
    return torch.compile(_softmax_pass, dynamic=False)


def _reduce(statistics, counted, z_weight):
    """(5, N) numbers of tokens to the loss, the other scalars of UnembeddingLoss as one vector, and 1/count."""
    log_z, l_target, mean, variance, absmax = torch.where(counted, statistics, 0.0)
    inverse_count = 1 / counted.sum().clamp(min=1).to(log_z.dtype)
    cross_entropy = (log_z - l_target).sum() * inverse_count
    z_loss = log_z.square().sum() * inverse_count
    logit_mean = mean.sum() * inverse_count
    # The variance of all logits is the mean variance within a token plus the variance of the tokens' means.
    spread = torch.where(counted, mean - logit_mean, 0.0).square()
    logit_std = ((variance + spread).sum() * inverse_count).clamp(min=0).sqrt()
    log_z_mean = log_z.sum() * inverse_count
    reported = torch.stack((cross_entropy, z_loss, log_z_mean, logit_mean, logit_std, absmax.amax()))
    return cross_entropy + z_weight * z_loss, reported, inverse_count


# --- geometry ------------------------------------------------------------------------------------


@torch.no_grad()
def geometry(W: Tensor, vocab_size: int | None = None) -> dict[str, float]:
    """How far the output embeddings share a common direction (paper, §2).

    mu_norm ‖μ‖ · mean_norm mean ‖e_i‖ · mu_ratio their quotient · max_norm · mean_cosine mean cos(e_i, μ) ·
    isotropy min_c Z(c) / max_c Z(c) with Z(c) = Σ_i exp(e_i·c) along the unit eigenvectors c of WᵀW
    (Arora et al. 2016; Mu & Viswanath 2018): 1 is isotropic. Computed in float64, exponents in the log domain.
    """
    E = _real_rows(W, vocab_size).double()
    mu, norms = E.mean(dim=0), E.norm(dim=1)
    mu_norm, mean_norm = mu.norm(), norms.mean()
    tiny = torch.finfo(E.dtype).tiny
    eigenvectors = torch.linalg.eigh(E.T @ E).eigenvectors  # columns
    log_partition = torch.logsumexp(E @ eigenvectors, dim=0)
    return {
        "mu_norm": mu_norm.item(),
        "mean_norm": mean_norm.item(),
        "mu_ratio": (mu_norm / mean_norm.clamp(min=tiny)).item(),
        "max_norm": norms.max().item(),
        "mean_cosine": (E @ mu / (norms * mu_norm).clamp(min=tiny)).mean().item(),
        "isotropy": (log_partition.min() - log_partition.max()).exp().item(),
    }
