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

from typing import NamedTuple

import torch
from torch import Tensor

# A chunk of logits holds about this many numbers, but has CHUNK_ROWS tokens at least: small beside the model (on a
# CPU, inside its caches), large enough to keep the matrix units busy and additions into the weight gradient rare.
CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**28}
CHUNK_ROWS = 256


# --- the mean output embedding and what is done with it ------------------------------------------


def mean_embedding(W: Tensor, vocab_size: int | None = None) -> Tensor:
    """μ = (1/V) Σ_i e_i over the real rows of `W (padded_vocab, d)`: shape (d,), at least float32 (paper, §2)."""
    return _real_rows(W, vocab_size).mean(dim=0, dtype=torch.promote_types(W.dtype, torch.float32))


def center(W: Tensor, vocab_size: int | None = None) -> Tensor:
    """e_i − μ on the real rows, padding rows untouched; differentiable; shape and dtype of `W` (paper, §4).

    Used in the forward pass it leaves probabilities, loss and ∂L/∂h as they were, tied weights or not.
    """
    centered = (W - mean_embedding(W, vocab_size)).to(W.dtype)
    if vocab_size is None or vocab_size == W.shape[0]:
        return centered
    is_real = torch.arange(W.shape[0], device=W.device) < vocab_size
    return torch.where(is_real[:, None], centered, W)


@torch.no_grad()
def center_(W: Tensor, vocab_size: int | None = None) -> Tensor:
    """The paper's procedure: e_i ← e_i − μ in place, to be called after every optimizer step. Returns `W`."""
    _real_rows(W, vocab_size).sub_(mean_embedding(W, vocab_size))
    return W


def mu_loss(W: Tensor, vocab_size: int | None = None) -> Tensor:
    """μᵀμ, a scalar, unweighted: the paper adds λ = 1e-4 times it to the loss (paper, §4)."""
    mu = mean_embedding(W, vocab_size)
    return mu @ mu


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """cap·tanh(logits/cap), elementwise; `cap = 0` means off (Gemma 2, arXiv 2408.00118)."""
    return cap * torch.tanh(logits / cap) if cap else logits


def _real_rows(W: Tensor, vocab_size: int | None) -> Tensor:
    if W.ndim != 2:
        raise ValueError(f"the unembedding weight must be (padded_vocab, d), not of shape {tuple(W.shape)}")
    if vocab_size is None or vocab_size == W.shape[0]:
        return W
    if not 0 < vocab_size <= W.shape[0]:
        raise ValueError(f"vocab_size={vocab_size} must lie in 1..{W.shape[0]}, the rows of the unembedding weight")
    return W[:vocab_size]


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
    vocab_size = _real_rows(W, vocab_size).shape[0]
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
    loss, statistics = _ChunkedUnembedding.apply(hidden, W, targets, *options)
    return UnembeddingLoss(loss, *statistics.detach().unbind())


class _ChunkedUnembedding(torch.autograd.Function):
    """Gradients are formed in `forward`, as sums over tokens; `backward` scales them by 1/count in float32.

    The 1/count waits for float32 because half precision would lose it: 1/N times a probability of one
    in 50,000 is below float16's smallest number.
    """

    @staticmethod
    def forward(ctx, hidden, W, targets, vocab_size, z_weight, cap, ignore_index, chunk_rows, dtype, needs_grad):
        wide = torch.promote_types(dtype, torch.float32)
        hidden_low, W_low = hidden.to(dtype), W.to(dtype)
        grad_hidden, per_token = [], []
        grad_W = None
        for h, target in zip(hidden_low.split(chunk_rows), targets.split(chunk_rows)):
            logits = h @ W_low.T  # (rows, padded_vocab)
            counted = target != ignore_index
            statistics, grad_logits = _softmax_pass(logits, target, counted, vocab_size, z_weight, cap, wide)
            per_token.append(statistics)
            if needs_grad:
                grad_hidden.append(grad_logits @ W_low)  # (rows, d)
                grad_W_chunk = (grad_logits.T @ h).to(wide)  # (padded_vocab, d)
                grad_W = grad_W_chunk if grad_W is None else grad_W + grad_W_chunk
        statistics = [torch.cat(column) for column in zip(*per_token)]
        loss, statistics, inverse_count = _reduce(statistics, targets != ignore_index, vocab_size, z_weight)
        if needs_grad:
            ctx.save_for_backward(torch.cat(grad_hidden), grad_W, inverse_count)
            ctx.dtypes = hidden.dtype, W.dtype
        return loss, statistics

    @staticmethod
    def backward(ctx, grad_loss, _):
        grad_hidden, grad_W, inverse_count = ctx.saved_tensors
        scale = grad_loss * inverse_count
        hidden_dtype, W_dtype = ctx.dtypes
        return (grad_hidden * scale).to(hidden_dtype), (grad_W * scale).to(W_dtype), *[None] * 8


def _softmax_pass(logits, target, counted, vocab_size, z_weight, cap, wide):
    """One chunk: per-token statistics and ∂(Σ over tokens of the loss)/∂(logits before the cap), in `logits.dtype`.

        L         = log Z − l_target + λ (log Z)²
        ∂L/∂l_i   = p_i (1 + 2 λ log Z) − 1[i = target]
        l         = c·tanh(raw / c)   gives   ∂l/∂raw = 1 − (l/c)²

    Mean and variance of a token's logits are taken about its largest logit: nothing cancels when all of
    them have drifted far from zero together, which is the case worth watching.
    """
    l = soft_cap(logits.to(wide), cap)  # (rows, padded_vocab)
    column = torch.arange(l.shape[1], device=l.device)
    is_real = column < vocab_size
    l_real = l if vocab_size == l.shape[1] else l.masked_fill(~is_real, -torch.inf)
    highest = l_real.amax(dim=1, keepdim=True)
    lowest = l.masked_fill(~is_real, torch.inf).amin(dim=1)
    below_highest = l_real - highest
    exponential = below_highest.exp()
    sum_exponential = exponential.sum(dim=1, keepdim=True)
    log_z = highest + sum_exponential.log()  # (rows, 1)

    is_target = column == target[:, None]
    l_target = torch.where(is_target, l, 0.0).sum(dim=1)
    distance = torch.where(is_real, below_highest, 0.0)
    mean_distance = distance.sum(dim=1) / vocab_size
    variance = distance.square().sum(dim=1) / vocab_size - mean_distance.square()
    absmax = torch.maximum(highest[:, 0].abs(), lowest.abs())
    statistics = (log_z[:, 0], l_target, highest[:, 0] + mean_distance, variance, absmax)

    probability = exponential / sum_exponential
    grad = probability * (1 + 2 * z_weight * log_z) - is_target.to(wide)
    if cap:
        grad = grad * (1 - (l / cap).square())
    grad = torch.where(counted[:, None], grad, 0.0)
    return statistics, grad.to(logits.dtype)


def _reduce(statistics, counted, vocab_size, z_weight):
    """Per-token vectors (N,) to the loss, the other scalars of UnembeddingLoss as one vector, and 1/count."""
    log_z, l_target, mean, variance, absmax = (torch.where(counted, column, 0.0) for column in statistics)
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
