"""`oec.unembedding_loss` again, lean: the same numbers, and never all N × V logits in memory.

It works on one chunk of tokens at a time: it computes the chunk's logits, replaces them with their gradient, and multiplies
this gradient with `W` and `hidden`. That is three matrix products, and the backward pass computes none of them again. Only
`loss` can be differentiated, and only once. Anything else raises an error; use `oec.unembedding_loss` for it.

This file needs PyTorch and `oec.py`; copy both beside your own trainer.
"""

from functools import cache

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from oec import UnembeddingLoss, _real_size, check_arguments, rounding_nats

try:
    import triton
    import triton.language as tl
except ImportError:  # it comes with PyTorch's CUDA builds
    triton = None

# A chunk holds at most about this many logits, or CHUNK_ROWS tokens if that is more: small beside the model (on a CPU, with a
# small vocabulary, inside its caches), large enough to keep the matrix units busy and additions into the weight gradient rare.
CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**28}
CHUNK_ROWS = 512
LARGE_CAP = 1024  # above it, `_soft_cap` uses tanh: the faster formula with σ would lose digits

REFUSAL = (
    "the lean unembedding_loss differentiates `loss`, once, and nothing else: detach its other entries, or use the plain "
    "oec.unembedding_loss, which differentiates all of them any number of times (train.py: --fused_unembedding=False)"
)


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
    logits_dtype: torch.dtype | None = None,
) -> UnembeddingLoss:
    """`oec.unembedding_loss` (same arguments, same numbers) in the memory of one chunk of logits.

    `chunk_rows` is the number of tokens in a chunk; 0 chooses. Matrix products run in autocast's dtype, all else in
    float32 (float64 for float64 input). The logits are stored in the products' dtype, or with `logits_dtype=torch.float32`
    as they leave the accumulators, not rounded. Raises ValueError for shapes that do not fit, RuntimeError where an
    entry other than `loss` is differentiated, for second derivatives, and in forward mode.
    """
    check_arguments(hidden, W, targets, z_loss_weight, soft_cap)
    vocab_size = _real_size(W, vocab_size)
    if chunk_rows < 0 or logits_dtype not in (None, torch.float32):
        raise ValueError("chunk_rows must not be negative, and logits_dtype must be None or torch.float32")
    if any(unpack_dual(tensor).tangent is not None for tensor in (hidden, W)):
        raise RuntimeError(REFUSAL)
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():  # torch.func.grad and its like
        raise RuntimeError(REFUSAL)
    device, dtype = hidden.device.type, hidden.dtype
    if device != "meta" and torch.is_autocast_enabled(device) and dtype != torch.float64:  # the meta device has no autocast
        dtype = torch.get_autocast_dtype(device)
    stored = torch.promote_types(dtype, logits_dtype or dtype)
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or W.requires_grad)
    options = (vocab_size, z_loss_weight, soft_cap, ignore_index, chunk_rows, dtype, stored, needs_grad)
    loss, statistics, *_ = _unembedding(hidden, W, targets, *options, torch.compiler.is_compiling())
    *statistics, nats = statistics.unbind()
    return UnembeddingLoss(loss, *statistics, nats.detach())


def choose_chunk_rows(tokens: int, rows: int, device: str) -> int:
    """Tokens in a chunk of logits for a weight of so many rows: all chunks about equal."""
    most = max(CHUNK_ROWS, CHUNK_ELEMENTS.get(device, 2**26) // rows)
    chunks = max(1, -(-tokens // most))
    return max(1, -(-tokens // chunks))


# One operator, opaque to the compiler, which would otherwise fuse the chunks and hold all their logits at once.
@torch.library.custom_op("nanooec::unembedding", mutates_args=())
def _unembedding(
    hidden: Tensor, W: Tensor, targets: Tensor, vocab_size: int, z_weight: float, cap: float, ignore_index: int,
    chunk_rows: int, dtype: torch.dtype, stored: torch.dtype, needs_grad: bool, compiled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, the other scalars of UnembeddingLoss, ∂(sum over tokens)/∂hidden and ∂/∂W, and 1/count.

    Gradients are formed here, where the logits are, as sums over tokens. `_scale_gradients` divides by the count, in float32: in half
    precision 1/N times a probability of one in 50,000 is below float16's smallest number.
    """
    wide = torch.promote_types(dtype, torch.float32)
    softmax_pass, cap_in_place = (_compiled(_softmax_pass), _compiled(_cap_in_place)) if compiled else (_softmax_pass, _cap_in_place)
    on_triton = _takes_triton(hidden.device, compiled) and wide == torch.float32 and cap <= LARGE_CAP
    (N, d), rows = hidden.shape, W.shape[0]
    chunk_rows = chunk_rows or choose_chunk_rows(N, rows, hidden.device.type)
    # Without the second context manager, the first call after the model is compiled has other dispatch keys than later calls,
    # and torch.compile would compile the softmax pass twice.
    with torch.autocast(hidden.device.type, enabled=False), torch._C._AutoDispatchBelowADInplaceOrView():
        hidden_low, W_low = hidden.to(dtype), W.to(dtype)
        factor = W_low.T if stored == dtype else _wide_factor(W_low.T, wide)
        buffer = hidden.new_empty(min(chunk_rows, N), rows, dtype=stored)  # one chunk's logits
        grad_buffer = buffer if stored == dtype or not needs_grad else torch.empty_like(buffer, dtype=dtype)  # their gradient
        statistics = hidden.new_empty(5, N, dtype=wide)
        grad_hidden = hidden_low.new_empty(N if needs_grad else 0, d)
        grad_W = W.new_empty(rows if needs_grad else 0, d, dtype=wide)
        for first in range(0, N, chunk_rows):
            chunk = slice(first, first + chunk_rows)
            h, target = hidden_low[chunk], targets[chunk]
            logits, grad_logits = _multiply(h, factor, out=buffer[: len(h)]), grad_buffer[: len(h)]
            if on_triton:
                to_write = grad_logits if needs_grad else None
                _run_triton_kernel(logits, to_write, target, statistics[:, chunk], vocab_size, z_weight, cap, ignore_index)
            else:
                real = logits[:, :vocab_size]
                if compiled:  # one compiled pass serves any number of tokens
                    torch._dynamo.maybe_mark_dynamic(real, 0)
                    torch._dynamo.maybe_mark_dynamic(target, 0)
                if cap and stored == wide:
                    cap_in_place(real, cap)
                statistics[:, chunk] = softmax_pass(real, target, z_weight, cap, ignore_index, wide, needs_grad)
                if needs_grad:
                    logits[:, vocab_size:] = 0
                    if grad_buffer is not buffer:
                        grad_logits.copy_(logits)
            if needs_grad:
                torch.mm(grad_logits, W_low, out=grad_hidden[chunk])
                _add_product(grad_W, grad_logits.T, h, is_first=first == 0)
        if N == 0:
            grad_W.zero_()
        loss, reported, inverse_count = _reduce(statistics, targets != ignore_index, z_weight, cap, stored)
    return loss, reported, grad_hidden, grad_W, inverse_count


def _wide_factor(factor: Tensor, wide: torch.dtype) -> Tensor:
    """The right operand of a product with a float32 result: unchanged on CUDA, cast to float32 elsewhere."""
    return factor if factor.is_cuda else factor.to(wide)


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    if a.is_cuda and a.dtype != out.dtype:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a.to(b.dtype), b, out=out)


def _add_product(total: Tensor, a: Tensor, b: Tensor, is_first: bool):
    """total += a @ b (or = if `is_first`), summed in total's dtype: in half precision a sum over tokens could overflow."""
    beta = 0 if is_first else 1  # with 0, what stands in `total` is not read
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=beta)


@_unembedding.register_fake
def _(hidden, W, targets, vocab_size, z_weight, cap, ignore_index, chunk_rows, dtype, stored, needs_grad, compiled):
    wide, n = torch.promote_types(dtype, torch.float32), int(needs_grad)
    scalar = hidden.new_empty((), dtype=wide)
    grad_hidden = hidden.new_empty(n * hidden.shape[0], hidden.shape[1], dtype=dtype)
    grad_W = W.new_empty(n * W.shape[0], W.shape[1], dtype=wide)
    return scalar, hidden.new_empty(len(UnembeddingLoss._fields) - 1, dtype=wide), grad_hidden, grad_W, torch.empty_like(scalar)


def _save_gradients(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # None for an unused output
    ctx.save_for_backward(*output[2:])
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype


def _scale_gradients(ctx, grad_loss, *grads_of_others):
    grad_hidden, grad_W, inverse_count = ctx.saved_tensors
    scale = inverse_count * (0.0 if grad_loss is None else grad_loss)
    for grad in grads_of_others:  # of statistics, or (second derivatives) of grad_hidden and grad_W
        if grad is not None:
            scale = scale + _refuse(grad)
    # In float32: a low-precision tensor times a scalar tensor would be multiplied in low precision.
    return (grad_hidden.to(scale.dtype) * scale).to(ctx.dtypes[0]), (grad_W * scale).to(ctx.dtypes[1]), *[None] * 10


_unembedding.register_autograd(_scale_gradients, setup_context=_save_gradients)


# A compiled backward pass gets zeros, not None, for unused outputs. So the operator below, which is not traced, looks at their values.
@torch.library.custom_op("nanooec::refuse_gradient", mutates_args=())
def _refuse(grad: Tensor) -> Tensor:
    """0, a scalar, for a gradient of zeros; raises for any other."""
    if (grad != 0).any():
        raise RuntimeError(REFUSAL)
    return grad.new_zeros(())


@_refuse.register_fake
def _(grad):
    return grad.new_empty(())


def _refuse_again(ctx, grad):
    raise RuntimeError(REFUSAL)


_refuse.register_autograd(_refuse_again)


def _soft_cap(raw: Tensor, cap: float) -> Tensor:
    if cap > LARGE_CAP:
        return cap * torch.tanh(raw / cap)
    return 2 * cap * torch.sigmoid(raw * (2 / cap)) - cap  # a third of tanh's time on a CPU


def _cap_in_place(logits: Tensor, cap: float):
    """Caps float32 logits before `_softmax_pass`, which then takes half the time. Low-precision logits would be rounded again."""
    logits.copy_(_soft_cap(logits, cap))


def _softmax_pass(logits, target, z_weight, cap, ignore_index, wide, needs_grad):
    """One chunk: five numbers per token, (5, rows); `logits` become ∂(Σ over tokens of the loss)/∂(logits before the cap).

        L         = log Z − l_target + λ (log Z)²
        ∂L/∂l_i   = p_i (1 + 2 λ log Z) − 1[i = target]
        l         = c·tanh(raw / c) = 2c·σ(2 raw / c) − c   gives   ∂l/∂raw = 1 − (l/c)²

    With a cap, logits in the dtype `wide` come capped by `_cap_in_place`.
    Mean and variance of a token's logits are taken about its largest logit: nothing cancels when all of
    them have drifted far from zero together, which is the case worth watching.
    """

    def capped(raw):
        return _soft_cap(raw, cap) if cap and logits.dtype != wide else raw

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
def _compiled(function):
    return torch.compile(function, dynamic=False)


# --- the same pass for CUDA ----------------------------------------------------------------------


def _takes_triton(device: torch.device, compiled: bool) -> bool:
    return triton is not None and device.type == "cuda" and compiled  # Triton needs a C compiler, and so does torch.compile


def _run_triton_kernel(logits, grad_logits, target, statistics, vocab_size, z_weight, cap, ignore_index):
    """`_softmax_pass` for CUDA: reads `logits` (rows, padded_vocab), contiguous, and writes `statistics` (5, rows) and the gradient
    `grad_logits`, which has the same shape and may be the same tensor, or None. Its padding columns become 0."""
    with torch.cuda.device_of(logits):
        _triton_softmax_pass[(len(logits),)](
            logits, grad_logits, target.contiguous(), statistics, statistics.stride(0), z_weight, ignore_index,
            V=vocab_size, WIDTH=logits.shape[1], CAP=cap, **_launch_options(logits.element_size()),
        )  # fmt: skip


def _launch_options(logit_bytes: int) -> dict[str, int]:
    """16 logits per thread at a time, in loads of 16 bytes; 16 KiB per block, which was the fastest on an H100."""
    return {"BLOCK": 16384 // logit_bytes, "LOAD": 16 // logit_bytes, "num_warps": 32 // logit_bytes}


if triton:

    @triton.jit
    def _capped(raw, CAP: tl.constexpr):
        raw = raw.to(tl.float32)
        return 2 * CAP * tl.sigmoid(raw * (2 / CAP)) - CAP if CAP > 0 else raw

    @triton.jit
    def _add_logits(l, is_real, reference, highest, lowest, total, moment_1, moment_2):
        """Updates the statistics of each group of LOAD neighbours, (groups,), with its new logits l (groups, LOAD)."""
        before, highest = highest, tl.maximum(highest, tl.max(l, axis=1))
        exponentials, centred = tl.exp(l - highest[:, None]), l - reference
        if is_real is not None:
            exponentials = tl.where(is_real, exponentials, 0.0)
        total = total * tl.exp(before - highest) + tl.sum(exponentials, axis=1)
        moment_1 += tl.sum(centred, axis=1)
        moment_2 += tl.sum(centred * centred, axis=1)
        return highest, tl.minimum(lowest, tl.min(l, axis=1)), total, moment_1, moment_2

    @triton.jit
    def _before_cap(grad, l, CAP: tl.constexpr):
        return grad * (1 - (l / CAP) * (l / CAP)) if CAP > 0 else grad

    @triton.jit
    def _triton_softmax_pass(
        logits, grad_logits, targets, statistics, stride, z_weight, ignore_index, V: tl.constexpr, WIDTH: tl.constexpr,
        CAP: tl.constexpr, BLOCK: tl.constexpr, LOAD: tl.constexpr,
    ):  # fmt: skip
        """One program per token, two passes over its logits: statistics, then the gradient. A thread loads LOAD neighbours, 16 bytes,
        at a time, and threads meet after the loops. Blocks before LAST have no padding and need no masks."""
        row = tl.program_id(0).to(tl.int64)
        line = logits + row * WIDTH
        LAST: tl.constexpr = (V - 1) // BLOCK * BLOCK  # the last block with real logits starts here
        lanes = tl.arange(0, BLOCK // LOAD)[:, None] * LOAD + tl.arange(0, LOAD)[None, :]
        is_real, is_stored = lanes < V - LAST, lanes < WIDTH - LAST  # loads use is_stored: with is_real, an odd V would split them into loads of one logit
        target = tl.load(targets + row).to(tl.int32)
        is_counted = target != ignore_index
        is_token = (target >= 0) & (target < V)
        l_target = _capped(tl.load(line + tl.where(is_token, target, 0)), CAP)
        l_target = tl.where(is_counted & ~is_token, float("nan"), l_target)  # a wrong target is seen in the loss
        reference = _capped(tl.load(line), CAP)  # moments about it do not cancel when all logits drift together

        highest, lowest = tl.full([BLOCK // LOAD], -float("inf"), tl.float32), tl.full([BLOCK // LOAD], float("inf"), tl.float32)
        total, moment_1, moment_2 = tl.zeros_like(highest), tl.zeros_like(highest), tl.zeros_like(highest)
        for start in range(0, LAST, BLOCK):
            l = _capped(tl.load(line + start + lanes), CAP)
            highest, lowest, total, moment_1, moment_2 = _add_logits(l, None, reference, highest, lowest, total, moment_1, moment_2)
        last = _capped(tl.load(line + LAST + lanes, mask=is_stored, other=0.0), CAP)
        last = tl.where(is_real, last, reference)  # padding takes a value that adds zero to the moments
        highest, lowest, total, moment_1, moment_2 = _add_logits(last, is_real, reference, highest, lowest, total, moment_1, moment_2)
        of_threads, highest = highest, tl.max(highest)
        log_sum, mean = tl.log(tl.sum(total * tl.exp(of_threads - highest))), tl.sum(moment_1) / V
        log_z = highest + log_sum
        statistics += row
        tl.store(statistics, log_z)
        tl.store(statistics + stride, l_target)
        tl.store(statistics + 2 * stride, reference + mean)
        tl.store(statistics + 3 * stride, tl.sum(moment_2) / V - mean * mean)
        tl.store(statistics + 4 * stride, tl.maximum(tl.abs(highest), tl.abs(tl.min(lowest))))

        if grad_logits is not None:
            factor = tl.where(is_counted, 1 + 2 * z_weight * log_z, 0.0)
            grad_line = grad_logits + row * WIDTH  # `store` rounds to its dtype
            for start in range(0, LAST, BLOCK):
                l = _capped(tl.load(line + start + lanes), CAP)
                grad = _before_cap(tl.exp(l - highest - log_sum) * factor, l, CAP)
                tl.store(grad_line + start + lanes, grad)
            grad = tl.where(is_real, _before_cap(tl.exp(last - highest - log_sum) * factor, last, CAP), 0.0)
            tl.store(grad_line + LAST + lanes, grad, mask=is_stored)
            for start in range(LAST + BLOCK, WIDTH, BLOCK):
                tl.store(grad_line + start + lanes, tl.zeros_like(grad), mask=lanes < WIDTH - start)
            tl.debug_barrier()  # the target's gradient is written after all others
            at_target = _before_cap(tl.exp(l_target - highest - log_sum) * factor - 1, l_target, CAP)
            tl.store(grad_line + target, at_target, mask=is_counted & is_token)


def _reduce(statistics, counted, z_weight, cap, stored):
    """From the statistics of the tokens (5, N): the loss, the other scalars of UnembeddingLoss as one vector, and 1/count."""
    log_z, l_target, mean, variance, absmax = torch.where(counted, statistics, 0.0)
    inverse_count = 1 / counted.sum().clamp(min=1).to(log_z.dtype)
    cross_entropy = (log_z - l_target).sum() * inverse_count
    z_loss = log_z.square().sum() * inverse_count
    logit_mean = mean.sum() * inverse_count
    # The variance of all logits is the mean variance within a token plus the variance of the tokens' means.
    spread = torch.where(counted, mean - logit_mean, 0.0).square()
    logit_std = ((variance + spread).sum() * inverse_count).clamp(min=0).sqrt()
    log_z_mean = log_z.sum() * inverse_count
    logit_absmax = absmax.amax() if len(counted) else absmax.sum()
    nats = rounding_nats((mean.square() + variance.clamp(min=0)).sqrt(), stored)
    nats = torch.where(counted, nats, 0.0).sum() * inverse_count if not cap else torch.full_like(z_loss, torch.nan)
    reported = torch.stack((cross_entropy, z_loss, log_z_mean, logit_mean, logit_std, logit_absmax, nats))
    return cross_entropy + z_weight * z_loss, reported, inverse_count
