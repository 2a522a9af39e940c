"""`value_loss` in Triton: forward and backward, a launch each.

Memory moved by forward: every column and the mask once, 17 B a token with old values and gradient
in fp32; the mask once more where a sequence's length is asked for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._kernels.launch import launching_on
from ..._kernels.losses import arrange, like_slopes, pair, share_of, supports
from ..._kernels.triton_losses import (
    PROGRAMS,
    TILE,
    column,
    is_last,
    leave,
    length_of,
    number,
    scale_of,
    scaled,
    shape_of,
    span,
    ticket,
    total,
    valid_tokens,
)
from . import reference
from .reference import ValueLossCall, ValueLossGradient

__all__ = ["bwd", "fwd", "supports"]

METRICS, SUMS = 6, 8  # of `_sums` and sequences with a valid token


@triton.jit
def _squared(value, target, old, clip):
    """0.5 max((V - R)^2, (V_clip - R)^2), its derivative, and where it is the clipped branch's.

    Within the clip V_clip is V itself; NaN of either branch shows in both results.
    """
    error, drift = value - target, value - old
    step = tl.where(drift > clip, clip, tl.where(drift < -clip, -clip, drift))
    held_error = tl.where(tl.abs(drift) <= clip, value, old + step) - target
    free, held = 0.5 * error * error, 0.5 * held_error * held_error
    clipped = held > free
    loss = tl.where(clipped, held, tl.where(free >= held, free, free + held))
    return loss, tl.where(free >= held, error, 0.0 * held), clipped


@triton.jit
def _sums(sums, loss, valid, clipped, target, error):
    """The sums of a program with a block's terms; moments in fp64, from sums of squares."""
    losses, tokens, clips, target_1, target_2, error_1, error_2 = sums
    wide_target, wide_error = target.to(tl.float64), error.to(tl.float64)
    return (losses + loss.to(tl.float64), tokens + valid.to(tl.int32), clips + clipped.to(tl.int32),
            target_1 + wide_target, target_2 + wide_target * wide_target,
            error_1 + wide_error, error_2 + wide_error * wide_error)


@triton.jit
def _store_moments(metrics_ptr, n, of, squares):
    """Mean and M2 from the sums; M2 is at least 0, NaN stays NaN."""
    mean = of / tl.where(n < 1.0, 1.0, n)
    m2 = squares - of * mean
    tl.store(metrics_ptr, mean.to(tl.float32))
    tl.store(metrics_ptr + 1, tl.where(m2 < 0.0, 0.0, m2).to(tl.float32))


@triton.jit
def _finish(parts_ptr, loss_ptr, metrics_ptr, scale_ptr, count, length, COUNT_OF: tl.constexpr,
            PROGRAMS: tl.constexpr):
    """Loss, metrics and scale from the sums of all programs."""
    n = total(parts_ptr, 1, PROGRAMS)
    scale = scale_of(n, total(parts_ptr, 7, PROGRAMS), count, length, COUNT_OF)
    loss = scale.to(tl.float64) * total(parts_ptr, 0, PROGRAMS)
    tl.store(loss_ptr, loss.to(tl.float32))
    tl.store(scale_ptr, scale)
    tl.store(metrics_ptr, n.to(tl.float32))
    tl.store(metrics_ptr + 1, total(parts_ptr, 2, PROGRAMS).to(tl.float32))
    _store_moments(metrics_ptr + 2, n, total(parts_ptr, 3, PROGRAMS), total(parts_ptr, 4, PROGRAMS))
    _store_moments(metrics_ptr + 4, n, total(parts_ptr, 5, PROGRAMS), total(parts_ptr, 6, PROGRAMS))


@triton.jit(do_not_specialize=["values_stride", "returns_stride", "old_stride", "mask_stride", "B",
                               "T", "N"])
def _value_loss_fwd_kernel(
        values_ptr, returns_ptr, old_ptr, mask_ptr, values_stride, returns_stride, old_stride,
        mask_stride, offsets_ptr, B, T, N, clip, count, length, clip_ptr, count_ptr, length_ptr,
        dvalues_ptr, loss_ptr, metrics_ptr, scale_ptr, parts_ptr, ticket_ptr,
        BY_LENGTH: tl.constexpr, COUNT_OF: tl.constexpr, BLOCK: tl.constexpr,
        PROGRAMS: tl.constexpr):
    """Loss, derivatives without the scale, metrics and scale of all sequences."""
    bound = number((clip, clip_ptr))
    values, returns = (values_ptr, values_stride), (returns_ptr, returns_stride)
    olds, mask = (old_ptr, old_stride), (mask_ptr, mask_stride)
    zero, none = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.int32)
    sums = (zero, none, none, zero, zero, zero, zero)
    live = tl.full([], 0, tl.int32)
    for b in range(tl.program_id(0).to(tl.int64), B, tl.num_programs(0)):
        begin, tokens = span(offsets_ptr, b, T, N)
        sequence = (offsets_ptr, b, begin, tokens)  # here: Triton 3.6 returns no pointer of None
        c = tl.full([], 1.0, tl.float32)
        if BY_LENGTH:
            c = tl.div_rn(1.0, length_of(mask, sequence, BLOCK))
        before = sums[1]
        for start in range(0, sequence[3], BLOCK):
            place = (sequence, start + tl.arange(0, BLOCK))
            valid = valid_tokens(mask, place)
            value, target = column(values, place, valid, 1), column(returns, place, valid, 1)
            if old_ptr is None:
                slope = value - target
                loss, clipped = 0.5 * slope * slope, valid & (place[1] < 0)
            else:
                old = column(olds, place, valid, 1)
                loss, slope, clipped = _squared(value, target, old, bound)
            sums = _sums(sums, c * loss, valid, clipped, target, target - value)
            if dvalues_ptr is not None:
                tl.store(dvalues_ptr + sequence[2] + place[1], tl.where(valid, c * slope, 0.0),
                         mask=place[1] < sequence[3])
        live += (tl.max(sums[1] - before, 0) > 0).to(tl.int32)
    for k in tl.static_range(7):
        leave(parts_ptr, k, tl.sum(sums[k], 0), PROGRAMS)
    leave(parts_ptr, 7, live, PROGRAMS)
    if is_last(ticket_ptr):
        _finish(parts_ptr, loss_ptr, metrics_ptr, scale_ptr, (count, count_ptr),
                (length, length_ptr), COUNT_OF, PROGRAMS)


@triton.jit(do_not_specialize=["n"])
def _value_loss_bwd_kernel(grad_ptr, scale_ptr, dvalues_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """grad * scale * dvalues in the type of the result, 0 where the derivative is 0."""
    factor = tl.load(grad_ptr).to(tl.float32) * tl.load(scale_ptr)
    scaled(dvalues_ptr, out_ptr, n, factor, BLOCK)


def fwd(call: ValueLossCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, dvalues, metrics, scale), fp32; see `reference.fwd`."""
    values, returns, mask, old_values, clip, reduction, cu_seqlens, grad = call
    if values.numel() == 0:
        return reference.fwd(call)
    share = share_of(reduction, values)
    batch = arrange((values, returns, None if clip is None else old_values), mask, cu_seqlens,
                    share.of_sequences)
    numbers = [pair(x) for x in (clip, share.denominator, share.length)]

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=values.device)

    loss, metrics, scale = empty(), empty(METRICS), empty()
    dvalues = empty(*values.shape) if grad else empty(0)
    with launching_on(values):
        _value_loss_fwd_kernel[(min(batch.batch, PROGRAMS),)](
            *batch.columns, batch.mask, *batch.strides, batch.mask_stride, batch.cu_seqlens,
            batch.batch, batch.tokens, batch.total, *(x for x, _ in numbers),
            *(p for _, p in numbers), dvalues if grad else None, loss, metrics, scale,
            empty(SUMS, PROGRAMS, dtype=torch.float64), ticket(values), BY_LENGTH=share.by_length,
            COUNT_OF=share.count_of, PROGRAMS=PROGRAMS, **shape_of(batch))
    return loss, dvalues, metrics, scale


def bwd(call: ValueLossGradient) -> Tensor:
    """The gradient of values in their dtype; see `reference.bwd`."""
    grad_loss, scale, dvalues, dtype = call
    slopes, out = like_slopes(dvalues, dtype)
    if slopes.numel():
        with launching_on(scale):
            _value_loss_bwd_kernel[(triton.cdiv(slopes.numel(), TILE),)](
                grad_loss, scale, slopes, out, slopes.numel(), BLOCK=TILE, num_warps=4)
    return out
