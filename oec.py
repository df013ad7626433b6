"""Output Embedding Centering, the method (Stollenwerk et al., arXiv 2601.02031), and its baselines.

Notation, as in the paper:

    V        real vocabulary size; W may hold more rows (padding), which are not tokens
    e_i      output embedding of token i: row i of the unembedding weight W, shape (padded_vocab, d)
    h        final hidden state of one position, shape (d,)
    l_i      logit e_i·h, and log Z = logsumexp_i l_i
    μ        mean output embedding (1/V) Σ_i e_i; the mean logit is exactly μ·h

The loss, log Z − l_target, does not see a shift that all logits share. So nothing in the loss holds μ, and
Adam makes μ drift. A drift costs precision: a logit near 1,000 is stored in steps of 4 in bfloat16. Four remedies:

    μ-centering   e_i ← e_i − μ                     center, center_
    μ-loss        L ← L + λ μᵀμ                     mu_loss
    z-loss        L ← L + λ mean((log Z)²)          unembedding_loss(z_loss_weight=λ)
    soft-capping  l ← c·tanh(l / c)                 unembedding_loss(soft_cap=c)

Padding rows never enter a mean, a statistic or log Z. This file needs PyTorch and nothing else.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# --- the mean output embedding and what is done with it ------------------------------------------


def mean_embedding(W: Tensor, vocab_size: int | None = None) -> Tensor:
    """μ = (1/V) Σ_i e_i over the real rows of `W (padded_vocab, d)`: shape (d,), at least float32 (paper, §2).

    If W is a DTensor (a weight that FSDP2 has sharded), every process gets the whole μ, as a plain tensor.
    """
    V, dtype = _real_size(W, vocab_size), torch.promote_types(W.dtype, torch.float32)
    if not _is_sharded(W):
        return _real_rows(W, V).mean(dim=0, dtype=dtype)
    # Slicing would gather the whole weight on every process. `redistribute` moves no data here; with it the gradient is sharded too.
    real = torch.where(_is_real(W, V), W, 0).redistribute(placements=W.placements)
    return (real.sum(dim=0, dtype=dtype) / V).full_tensor()


def center(W: Tensor, vocab_size: int | None = None, detach_mean: bool = False) -> Tensor:
    """e_i − μ on the real rows, padding rows untouched; differentiable; shape and dtype of `W` (paper, §4).

    Without z-loss and soft-cap it leaves probabilities, loss and ∂L/∂h as they were, with tied weights too. The rows of the
    result's gradient then sum to zero, up to rounding. The exact backward pass subtracts their mean from each of them. This mean
    is nothing but rounding error, which in low precision can be as large as the gradients of rare tokens. `detach_mean` skips the
    subtraction.
    """
    mu = mean_embedding(W, vocab_size)
    shift = _beside(W, mu.detach() if detach_mean else mu)
    if _real_size(W, vocab_size) < W.shape[0]:
        shift = torch.where(_is_real(W, vocab_size), shift, 0)
    return (W - shift).to(W.dtype)


@torch.no_grad()
def center_(W: Tensor, vocab_size: int | None = None) -> Tensor:
    """The paper's procedure: e_i ← e_i − μ in place, to be called after every optimizer step. Returns `W`."""
    if _is_sharded(W):  # a slice of it is a copy
        return W.copy_(center(W, vocab_size))
    _real_rows(W, vocab_size).sub_(mean_embedding(W, vocab_size))
    return W


def mu_loss(W: Tensor, vocab_size: int | None = None) -> Tensor:
    """μᵀμ, a scalar, unweighted, at least float32: the paper adds λ = 1e-4 times it to the loss (paper, §4)."""
    mu = mean_embedding(W, vocab_size)
    return (mu * mu).sum()  # autocast would compute mu @ mu in half precision


def z_loss(logits: Tensor) -> Tensor:
    """mean((log Z)²) over the tokens of `logits (…, V)`: PaLM's auxiliary loss, unweighted (arXiv 2204.02311, §5)."""
    return torch.logsumexp(logits, dim=-1).square().mean()


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """cap·tanh(logits/cap), elementwise; `cap = 0` means off (Gemma 2, arXiv 2408.00118)."""
    return cap * torch.tanh(logits / cap) if cap else logits


# --- the loss they act on ------------------------------------------------------------------------


class UnembeddingLoss(NamedTuple):
    """Scalars, over the tokens whose target is not `ignore_index` and over the V real logits of each, after soft-capping."""

    loss: Tensor  # cross_entropy + z_loss_weight · z_loss
    cross_entropy: Tensor  # mean of log Z − l_target, nats
    z_loss: Tensor  # mean of (log Z)², unweighted
    log_z: Tensor  # mean of log Z
    logit_mean: Tensor
    logit_std: Tensor  # over tokens and vocabulary
    logit_absmax: Tensor
    rounding_nats: Tensor  # what rounding the logits to their dtype costs (see the function below); nan with a soft-cap; no gradient


_soft_cap = soft_cap  # `unembedding_loss` has an argument of that name


def unembedding_loss(
    hidden: Tensor,
    W: Tensor,
    targets: Tensor,
    *,
    vocab_size: int | None = None,
    z_loss_weight: float = 0.0,
    soft_cap: float = 0.0,
    ignore_index: int = -1,
) -> UnembeddingLoss:
    """Cross-entropy and z-loss of the logits `hidden @ W.T`, with their statistics, in plain PyTorch.

    hidden (N, d), W (padded_vocab, d), targets (N,) int64; tokens whose target is `ignore_index` do not count, and
    without any counted token the loss is 0. The logits are computed in autocast's dtype, all else in at least float32.
    Every entry but `rounding_nats` can be differentiated, any number of times. The function holds all N × V logits;
    `runtime/unembedding.py` computes the same in little memory. Raises ValueError for shapes that do not fit.
    """
    check_arguments(hidden, W, targets, z_loss_weight, soft_cap)
    stored = hidden @ _real_rows(W, vocab_size).to(hidden.dtype).T  # (N, V), in low precision under autocast
    logits = _soft_cap(stored.to(torch.promote_types(stored.dtype, torch.float32)), soft_cap)
    counted = targets != ignore_index  # (N,)
    n_counted = counted.sum().clamp(min=1)

    def mean(values: Tensor) -> Tensor:  # over the counted tokens
        return torch.where(counted, values, 0.0).sum() / n_counted

    log_z = torch.logsumexp(logits, dim=1)
    l_target = logits.gather(1, torch.where(counted, targets, 0)[:, None])[:, 0]
    cross_entropy = mean(log_z - l_target)
    z_loss = mean(log_z.square())
    logit_mean = mean(logits.mean(dim=1))
    variance = mean((logits - logit_mean).square().mean(dim=1))
    logit_std = torch.where(variance == 0, 1.0, variance).sqrt() * (variance != 0)  # its gradient is finite at 0 too
    sizes = torch.where(counted[:, None], logits.abs(), 0.0)
    logit_absmax = sizes.amax() if len(hidden) else sizes.sum()
    logit_rms = logits.detach().square().mean(dim=1).sqrt()
    nats = mean(rounding_nats(logit_rms, stored.dtype)) if not soft_cap else torch.full_like(cross_entropy, torch.nan)
    loss = cross_entropy + z_loss_weight * z_loss
    return UnembeddingLoss(loss, cross_entropy, z_loss, mean(log_z), logit_mean, logit_std, logit_absmax, nats.detach())


def check_arguments(hidden: Tensor, W: Tensor, targets: Tensor, z_loss_weight: float, soft_cap: float):
    """ValueError, one line, for arguments of `unembedding_loss` that do not fit together."""
    if hidden.ndim != 2 or W.ndim != 2 or hidden.shape[1] != W.shape[1] or targets.shape != hidden.shape[:1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (hidden, W, targets))
        raise ValueError(f"unembedding_loss takes hidden (N, d), W (padded_vocab, d) and targets (N,), not {shapes}")
    if z_loss_weight < 0 or soft_cap < 0:
        raise ValueError("z_loss_weight and soft_cap must not be negative")


# --- what a drift costs --------------------------------------------------------------------------


def rounding_nats(logit_rms: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """What rounding logits of size `logit_rms` to `dtype` adds to the cross-entropy, in nats, to first order; elementwise.

    Neighbouring numbers of `dtype` around size s are spacing(s) apart. Rounding adds an error of variance spacing²/12 to
    each logit, and independent errors of variance v add v/2 to E[log Z − l_target]: spacing(s)²/24 in all. The
    rule gives too much above about half a nat, and nan where `dtype` overflows. The result has the shape of `logit_rms`, at
    least float32, and no gradient.
    """
    info = torch.finfo(dtype)
    size = logit_rms.detach().to(torch.promote_types(logit_rms.dtype, torch.float32)).abs()
    exponent = torch.frexp(size.clamp(min=info.tiny)).exponent - 1  # size is in [2^exponent, 2^(exponent + 1))
    spacing = torch.ldexp(torch.full_like(size, info.eps), exponent)
    return torch.where(size <= info.max, spacing.square() / 24, torch.nan)


@torch.no_grad()
def diagnose(hidden: Tensor, W: Tensor, vocab_size: int | None = None) -> dict[str, float]:
    """How far a model's logits have drifted, and what their rounding costs: for anybody's running trainer, in one call.

    hidden (…, d) final hidden states of real text, W (padded_vocab, d) the unembedding weight as the model uses it.
    logit_mean, logit_std, logit_absmax; token_mean_std: the spread over tokens of a token's mean logit;
    mu_norm: ‖μ‖; mu_ratio: ‖μ‖ / mean ‖e_i‖; cosine: of μ and the mean hidden state;
    rounding_nats_bfloat16, rounding_nats_float16: what is added to the loss (nats) if the logits are stored in that dtype.
    Computed in float32 (float64 for float64 input), a chunk of tokens at a time. ValueError for shapes that do not fit.
    """
    if hidden.ndim < 2 or hidden.shape[-1:] != W.shape[1:] or hidden.numel() == 0:
        raise ValueError(f"diagnose takes hidden (…, {W.shape[-1]}) of at least one token, not {tuple(hidden.shape)}")
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, W.dtype), torch.float32)
    rows, tokens = _real_rows(W, vocab_size).to(dtype), hidden.flatten(0, -2).to(dtype)
    mu, mean_hidden, tiny = rows.mean(dim=0), tokens.mean(dim=0), torch.finfo(dtype).tiny
    parts = []  # of each token: the mean, the variance and the largest magnitude of its logits
    with torch.autocast(W.device.type, enabled=False):
        for h in tokens.split(max(1, 2**26 // len(rows))):
            logits = h @ rows.T
            variance, mean = torch.var_mean(logits, dim=1, correction=0)
            parts.append(torch.stack((mean, variance, logits.abs().amax(dim=1))).double())
    mean, variance, absmax = torch.cat(parts, dim=1)
    logit_rms = (variance + mean.square()).sqrt()
    values = {
        "logit_mean": mean.mean(),
        "token_mean_std": mean.std(correction=0),
        "logit_std": (variance.mean() + mean.var(correction=0)).sqrt(),
        "logit_absmax": absmax.amax(),
        "mu_norm": mu.norm(),
        "mu_ratio": mu.norm() / rows.norm(dim=1).mean().clamp(min=tiny),
        "cosine": (mu * mean_hidden).sum() / (mu.norm() * mean_hidden.norm()).clamp(min=tiny),
        "rounding_nats_bfloat16": rounding_nats(logit_rms, torch.bfloat16).mean(),
        "rounding_nats_float16": rounding_nats(logit_rms, torch.float16).mean(),
    }
    return {name: value.item() for name, value in values.items()}


@torch.no_grad()
def geometry(W: Tensor, vocab_size: int | None = None) -> dict[str, float]:
    """How far the output embeddings share a common direction (paper, §2).

    mu_norm: ‖μ‖; mean_norm: mean ‖e_i‖; mu_ratio: their quotient; max_norm: max ‖e_i‖; mean_cosine: mean cos(e_i, μ);
    isotropy: min_c Z(c) / max_c Z(c) with Z(c) = Σ_i exp(e_i·c) along the unit eigenvectors c of WᵀW
    (Arora et al. 2016; Mu & Viswanath 2018): 1 is isotropic. Computed in float64, Z in the log domain.
    """
    E = _real_rows(W, vocab_size).double()
    mu, norms, tiny = E.mean(dim=0), E.norm(dim=1), torch.finfo(torch.float64).tiny
    eigenvectors = torch.linalg.eigh(E.T @ E).eigenvectors  # columns
    log_partition = torch.logsumexp(E @ eigenvectors, dim=0)
    values = {
        "mu_norm": mu.norm(),
        "mean_norm": norms.mean(),
        "mu_ratio": mu.norm() / norms.mean().clamp(min=tiny),
        "max_norm": norms.max(),
        "mean_cosine": (E @ mu / (norms * mu.norm()).clamp(min=tiny)).mean(),
        "isotropy": (log_partition.min() - log_partition.max()).exp(),
    }
    return {name: value.item() for name, value in values.items()}


# --- real rows, and weights that FSDP2 shards over processes --------------------------------------


def _real_size(W: Tensor, vocab_size: int | None) -> int:
    if W.ndim != 2:
        raise ValueError(f"the unembedding weight must be (padded_vocab, d), not of shape {tuple(W.shape)}")
    if vocab_size is not None and not 0 < vocab_size <= W.shape[0]:
        raise ValueError(f"vocab_size={vocab_size} must lie in 1..{W.shape[0]}, the rows of the unembedding weight")
    return vocab_size or W.shape[0]


def _real_rows(W: Tensor, vocab_size: int | None) -> Tensor:
    V = _real_size(W, vocab_size)
    return W if V == W.shape[0] else W[:V]  # slicing all rows would copy the gradient


def _is_real(W: Tensor, vocab_size: int) -> Tensor:
    return _beside(W, torch.arange(W.shape[0], device=W.device)[:, None] < vocab_size)


def _is_sharded(W: Tensor) -> bool:
    return hasattr(W, "device_mesh")  # a DTensor; importing the class takes seconds


def _beside(W: Tensor, tensor: Tensor) -> Tensor:
    """`tensor`, equal on every process, in a form that can be combined with W: a DTensor cannot be mixed with plain tensors."""
    if not _is_sharded(W):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(tensor, W.device_mesh, [Replicate()] * W.device_mesh.ndim)
