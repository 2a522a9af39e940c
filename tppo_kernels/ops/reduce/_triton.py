"""`reduce` in Triton: forward and backward, a launch each.

Forward reads x and the mask once: what a sequence of few tokens weighs more is applied to its sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._kernels.launch import launching_on
from ..._kernels.losses import arrange, pair, share_of
from ..._kernels.memory import FP64
from ..._kernels.triton_losses import (
    PROGRAMS,
    column,
    is_last,
    leave,
    length_of,
    scale_of,
    shape_of,
    span,
    ticket,
    total,
    valid_tokens,
)
from . import reference
from .reference import ReduceCall, ReduceGradient

SUMS = 3  # of x, of valid tokens, of sequences with one


@triton.jit(do_not_specialize=["x_stride", "mask_stride", "B", "T", "N"])
def _reduce_fwd_kernel(
        x_ptr, mask_ptr, x_stride, mask_stride, offsets_ptr, B, T, N, count, length, count_ptr,
        length_ptr, total_ptr, scale_ptr, parts_ptr, ticket_ptr, BY_LENGTH: tl.constexpr,
        COUNT_OF: tl.constexpr, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr):
    """The reduction, and the scale of its gradient."""
    values, mask = (x_ptr, x_stride), (mask_ptr, mask_stride)
    sums, tokens = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.int32)
    live = tl.full([], 0, tl.int32)
    for b in range(tl.program_id(0).to(tl.int64), B, tl.num_programs(0)):
        begin, size = span(offsets_ptr, b, T, N)
        sequence = (offsets_ptr, b, begin, size)  # here: Triton 3.6 returns no pointer of None
        own, n = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.int32)
        for start in range(0, sequence[3], BLOCK):
            place = (sequence, start + tl.arange(0, BLOCK))
            valid = valid_tokens(mask, place)
            own += column(values, place, valid, 1).to(tl.float64)
            n += valid.to(tl.int32)
        if BY_LENGTH:
            own = own / tl.maximum(tl.sum(n, 0), 1).to(tl.float64)
        sums += own
        tokens += n
        live += (tl.max(n, 0) > 0).to(tl.int32)
    leave(parts_ptr, 0, tl.sum(sums, 0), PROGRAMS)
    leave(parts_ptr, 1, tl.sum(tokens, 0), PROGRAMS)
    leave(parts_ptr, 2, live, PROGRAMS)
    if is_last(ticket_ptr):
        scale = scale_of(total(parts_ptr, 1, PROGRAMS), total(parts_ptr, 2, PROGRAMS),
                         (count, count_ptr), (length, length_ptr), COUNT_OF)
        whole = scale.to(tl.float64) * total(parts_ptr, 0, PROGRAMS)
        tl.store(total_ptr, whole.to(tl.float32))
        tl.store(scale_ptr, scale)


@triton.jit(do_not_specialize=["mask_stride", "B", "T", "N"])
def _reduce_bwd_kernel(grad_ptr, scale_ptr, mask_ptr, mask_stride, offsets_ptr, out_ptr, B, T, N,
                       BY_LENGTH: tl.constexpr, BLOCK: tl.constexpr):
    """grad * scale at valid tokens, by the tokens of their sequence where BY_LENGTH, else 0."""
    factor = tl.load(grad_ptr).to(tl.float32) * tl.load(scale_ptr)
    mask = (mask_ptr, mask_stride)
    for b in range(tl.program_id(0).to(tl.int64), B, tl.num_programs(0)):
        begin, size = span(offsets_ptr, b, T, N)
        sequence = (offsets_ptr, b, begin, size)
        share = factor
        if BY_LENGTH:
            share = tl.div_rn(factor, length_of(mask, sequence, BLOCK))
        for start in range(0, sequence[3], BLOCK):
            place = (sequence, start + tl.arange(0, BLOCK))
            slope = tl.where(valid_tokens(mask, place), share, 0.0)
            tl.store(out_ptr + begin + place[1], slope.to(out_ptr.dtype.element_ty),
                     mask=place[1] < sequence[3])


def supports(call: ReduceCall | ReduceGradient) -> str | None:
    """The reason for refusing, or None."""
    dtype = call.x.dtype if isinstance(call, ReduceCall) else call.dtype
    return FP64 if dtype == torch.float64 else None


def fwd(call: ReduceCall) -> tuple[Tensor, Tensor]:
    """(total, scale), fp32; see `reference.fwd`."""
    x, mask, over, cu_seqlens = call
    if x.numel() == 0:
        return reference.fwd(call)
    share = share_of(over, x)
    batch = arrange((x,), mask, cu_seqlens, share.of_sequences)
    numbers = [pair(share.denominator), pair(share.length)]

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=x.device)

    result, scale = empty(), empty()
    with launching_on(x):
        _reduce_fwd_kernel[(min(batch.batch, PROGRAMS),)](
            *batch.columns, batch.mask, *batch.strides, batch.mask_stride, batch.cu_seqlens,
            batch.batch, batch.tokens, batch.total, *(n for n, _ in numbers),
            *(p for _, p in numbers), result, scale, empty(SUMS, PROGRAMS, dtype=torch.float64),
            ticket(x), BY_LENGTH=share.by_length, COUNT_OF=share.count_of, PROGRAMS=PROGRAMS,
            **shape_of(batch))
    return result, scale


def bwd(backward: ReduceGradient) -> Tensor:
    """The gradient of x in its dtype; see `reference.bwd`."""
    grad, scale, mask, over, cu_seqlens, dtype = backward
    out = torch.empty(mask.shape, dtype=dtype, device=mask.device)
    if out.numel():
        by_length = share_of(over, mask).by_length
        batch = arrange((mask,), mask, cu_seqlens, by_length)
        with launching_on(mask):
            _reduce_bwd_kernel[(min(batch.batch, PROGRAMS),)](
                grad, scale, batch.mask, batch.mask_stride, batch.cu_seqlens, out, batch.batch,
                batch.tokens, batch.total, BY_LENGTH=by_length, **shape_of(batch))
    return out
