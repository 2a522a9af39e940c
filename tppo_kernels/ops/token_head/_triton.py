"""`token_head` in Triton: hidden is read once forward, once backward, its gradient written once.

Tiles [U, L G]: U rows, L lanes, one a thread, each with G columns: 16 bytes of hidden, forward of
the wider of hidden and weight. Forward, a program takes U rows whole, its sums stay in the lanes
until the rows end, and weight comes from the caches. Backward, a program takes L G columns of every
P-th group of U rows: weight and the sums of its gradient stay in registers, and a second launch
adds up the P parts in their order. The gradient of bias, which may cancel, is summed in fp64.
"""

# Kernels grow tuples output by output:
# mypy: disable-error-code="assignment"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._core.record import flat
from ..._kernels.launch import launching_on, row_layout
from ..._kernels.memory import FP64
from . import reference
from .reference import TokenHeadCall, TokenHeadGradient

WARPS = 4
MAX_OUTPUTS = 8  # the sums of all outputs stay in registers
PROGRAMS = 1024  # of the first launch of backward; the same on every GPU, as results are


def supports(call: TokenHeadCall | TokenHeadGradient) -> str | None:
    """The reason for refusing, or None."""
    if any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in flat(call)):
        return FP64
    head = call.head if isinstance(call, TokenHeadGradient) else call
    outputs = head.weight.shape[0]
    if outputs > MAX_OUTPUTS:
        return f"weight has {outputs} outputs, expected at most {MAX_OUTPUTS}"
    return None


@triton.jit
def _columns(start, D, LG: tl.constexpr, G: tl.constexpr, ALIGNED: tl.constexpr):
    """(columns [L G], which of them there are: by whole groups where D is a multiple of G)."""
    column = start + tl.arange(0, LG)
    if ALIGNED:
        live = column // G * G < D
    else:
        live = column < D
    return column, live


@triton.jit
def _row_group(first, mask_ptr, inner, stride_outer, stride_inner, N, U: tl.constexpr,
               G: tl.constexpr, ALIGNED: tl.constexpr):
    """(rows [U], which of them are valid, where they begin in hidden)."""
    row = first + tl.arange(0, U)
    valid = row < N
    off = (row // inner).to(tl.int64) * stride_outer + (row % inner).to(tl.int64) * stride_inner
    if mask_ptr is not None:
        valid = valid & (tl.load(mask_ptr + row, mask=valid, other=0) != 0)
    if ALIGNED:
        off = off // G * G  # the same number, of which the compiler sees that it is aligned
    return row, valid, off


@triton.jit(do_not_specialize=("bias_ptr", "mask_ptr", "out_ptr", "inner", "stride_outer",
                               "stride_inner", "N", "D"))
def _token_head_fwd_kernel(x_ptr, w_ptr, bias_ptr, mask_ptr, out_ptr, inner,
                           stride_outer: tl.int64, stride_inner: tl.int64, N, D,
                           K: tl.constexpr, ALIGNED: tl.constexpr, U: tl.constexpr,
                           L: tl.constexpr, G: tl.constexpr):
    row, valid, off = _row_group(tl.program_id(0) * U, mask_ptr, inner, stride_outer,
                                 stride_inner, N, U, G, ALIGNED)
    if ALIGNED:
        D = D // G * G
    sums = ()
    for _ in tl.static_range(K):
        sums = sums + (tl.zeros([U, L], tl.float32),)
    for start in range(0, D, L * G):
        column, live = _columns(start, D, L * G, G, ALIGNED)
        x = tl.load(x_ptr + off[:, None] + column[None, :], mask=valid[:, None] & live[None, :],
                    other=0.0, eviction_policy="evict_first").to(tl.float32)  # [U, L G]
        new = ()
        for k in tl.static_range(K):
            w = tl.load(w_ptr + k * D + column, mask=live, other=0.0).to(tl.float32)  # [L G]
            new = new + (sums[k] + tl.sum(tl.reshape(x * w[None, :], [U, L, G]), 2),)
        sums = new
    for k in tl.static_range(K):
        out = tl.sum(sums[k], 1)  # [U]
        if bias_ptr is not None:
            out += tl.load(bias_ptr + k).to(tl.float32)
        tl.store(out_ptr + row.to(tl.int64) * K + k, tl.where(valid, out, 0.0), mask=row < N)


@triton.jit(do_not_specialize=("g_ptr", "mask_ptr", "inner", "stride_outer", "stride_inner", "N",
                               "D"))
def _token_head_bwd_kernel(g_ptr, x_ptr, w_ptr, mask_ptr, dx_ptr, part_ptr, inner,
                           stride_outer: tl.int64, stride_inner: tl.int64, N, D,
                           K: tl.constexpr, ALIGNED: tl.constexpr, U: tl.constexpr,
                           L: tl.constexpr, G: tl.constexpr):
    part = tl.program_id(0)
    if ALIGNED:
        D = D // G * G
    column, live = _columns(tl.program_id(1) * (L * G), D, L * G, G, ALIGNED)
    weight = ()
    sums = ()
    bias_sums = ()
    for k in tl.static_range(K):
        weight = weight + (tl.load(w_ptr + k * D + column, mask=live, other=0.0).to(tl.float32),)
        sums = sums + (tl.zeros([L * G], tl.float32),)
        bias_sums = bias_sums + (tl.zeros([U], tl.float64),)
    for first in range(part * U, N, tl.num_programs(0) * U):
        row, valid, off = _row_group(first, mask_ptr, inner, stride_outer, stride_inner, N, U, G,
                                     ALIGNED)
        if part_ptr is not None:
            x = tl.load(x_ptr + off[:, None] + column[None, :], mask=valid[:, None] & live[None, :],
                        other=0.0, eviction_policy="evict_first").to(tl.float32)  # [U, L G]
        dx = tl.zeros([U, L * G], tl.float32)
        new = ()
        new_bias = ()
        for k in tl.static_range(K):
            g = tl.load(g_ptr + row.to(tl.int64) * K + k, mask=valid, other=0.0)  # [U]
            g = g.to(tl.float32)
            dx += g[:, None] * weight[k][None, :]
            if part_ptr is not None:
                new = new + (sums[k] + tl.sum(g[:, None] * x, 0),)
                new_bias = new_bias + (bias_sums[k] + g.to(tl.float64),)
        if part_ptr is not None:
            sums = new
            bias_sums = new_bias
        if dx_ptr is not None:
            dx_off = row.to(tl.int64) * D
            if mask_ptr is not None:  # 0 times a weight may be NaN; read anew, or registers run out
                there = tl.load(mask_ptr + row, mask=row < N, other=0)
                dx = tl.where((there != 0)[:, None], dx, 0.0)
            tl.store(dx_ptr + dx_off[:, None] + column[None, :], dx,
                     mask=(row < N)[:, None] & live[None, :])
    if part_ptr is not None:
        part_off = part.to(tl.int64) * (K * D + 2 * K)
        for k in tl.static_range(K):
            tl.store(part_ptr + part_off + k * D + column, sums[k], mask=live)
            if tl.program_id(1) == 0:
                total = tl.sum(bias_sums[k], 0)
                high = total.to(tl.float32)
                tl.store(part_ptr + part_off + K * D + k, high)
                tl.store(part_ptr + part_off + K * D + K + k, (total - high).to(tl.float32))


@triton.jit(do_not_specialize=("part_ptr", "dw_ptr", "dbias_ptr", "parts", "count", "K"))
def _token_head_merge_kernel(part_ptr, dw_ptr, dbias_ptr, parts, count, K, P: tl.constexpr,
                             BLOCK: tl.constexpr):
    """The sums of all parts: weight's gradient [count], behind it that of bias in two parts."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    of_bias = (column >= count) & (column < count + K)
    total = tl.zeros([P, BLOCK], tl.float64)
    for first in range(0, parts, P):
        part = first + tl.arange(0, P).to(tl.int64)
        here = (part < parts)[:, None]
        ptr = part_ptr + part[:, None] * (count + 2 * K) + column[None, :]
        total += tl.load(ptr, mask=here & (column < count + K)[None, :], other=0.0)
        total += tl.load(ptr + K, mask=here & of_bias[None, :], other=0.0)
    result = tl.sum(total, 0).to(tl.float32)
    if dw_ptr is not None:
        tl.store(dw_ptr + column, result, mask=column < count)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + column - count, result, mask=of_bias)


class _Launch(NamedTuple):
    """What both passes hand to their kernels."""

    x: Tensor
    weight: Tensor
    mask: Tensor | None
    place: tuple[int, ...]  # inner, stride_outer, stride_inner, N, D
    shape: dict[str, int]  # compile-time

    @staticmethod
    def of(hidden: Tensor, weight: Tensor, mask: Tensor | None, size: int) -> _Launch:
        """Groups are 16 bytes of numbers of `size` bytes; of one number where rows of hidden or
        weight begin elsewhere than at multiples of 16 bytes."""
        x, inner, outer, stride = row_layout(hidden)
        weight = weight.contiguous()
        K, D = weight.shape
        group = 16 // size
        aligned = not (D % group or outer % group or stride % group or x.data_ptr() % 16
                       or weight.data_ptr() % 16)
        group, flight = (group, 32 // group) if aligned else (1, 16)
        return _Launch(x, weight, None if mask is None else mask.contiguous(),
                     (inner, outer, stride, hidden.numel() // D, D),
                     {"K": K, "ALIGNED": aligned, "U": flight if K <= 4 else flight // 2,
                      "L": 32 * WARPS, "G": group})


def fwd(call: TokenHeadCall) -> Tensor:
    """hidden @ weight.T + bias at valid rows, 0 elsewhere, fp32; one launch."""
    hidden, weight, bias, mask = call
    if hidden.numel() == 0 or weight.numel() == 0:
        return reference.fwd(call)
    out = hidden.new_empty((*hidden.shape[:-1], weight.shape[0]), dtype=torch.float32)
    given = _Launch.of(hidden, weight, mask, max(hidden.element_size(), weight.element_size()))
    with launching_on(hidden):
        _token_head_fwd_kernel[(triton.cdiv(given.place[3], given.shape["U"]),)](
            given.x, given.weight, None if bias is None else bias.contiguous(), given.mask, out,
            *given.place, **given.shape, num_warps=WARPS)
    return out


def bwd(call: TokenHeadGradient) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients, each in the dtype of its tensor, empty where not wanted; two launches."""
    grad, (hidden, weight, bias, mask), grad_hidden, grad_weight, grad_bias = call
    if grad.numel() == 0 or hidden.numel() == 0:
        return reference.bwd(call)
    grad_bias = grad_bias and bias is not None
    dx = hidden.new_empty(hidden.shape if grad_hidden else (0,))
    dw = weight.new_empty(weight.shape if grad_weight else (0,))
    dbias = weight.new_empty(0) if bias is None else bias.new_empty(
        bias.shape if grad_bias else (0,))
    size = hidden.element_size() * (1 if weight.shape[0] <= 4 else 2)  # or registers run out
    given = _Launch.of(hidden, weight, mask, size)
    (K, D), shape, kept = weight.shape, given.shape, None
    blocks = triton.cdiv(D, shape["L"] * shape["G"])
    parts = max(1, min(triton.cdiv(given.place[3], shape["U"]), PROGRAMS // blocks))
    if grad_weight or grad_bias:
        kept = hidden.new_empty((parts, K * D + 2 * K), dtype=torch.float32)
    with launching_on(hidden):
        if grad_hidden or kept is not None:
            _token_head_bwd_kernel[(parts, blocks)](
                grad.contiguous(), given.x, given.weight, given.mask, dx if grad_hidden else None,
                kept, *given.place, **shape, num_warps=WARPS)
        if kept is not None:
            _token_head_merge_kernel[(triton.cdiv(K * D + K, 64),)](
                kept, dw if grad_weight else None, dbias if grad_bias else None, parts, K * D,
                K, P=16, BLOCK=64, num_warps=4)
    return dx, dw, dbias
