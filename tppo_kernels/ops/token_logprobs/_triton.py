"""`token_logprobs` in Triton: one read of the logits forward; one read and one write backward.

A program walks a row, or its part of one where rows are few, in tiles [U, L G]: L lanes, one a
thread, each with U loads of G columns, 16 bytes, in flight. Maxima and sums stay in the lane until
the row ends: the loop has no barrier, no shuffle and one exponential a column (about 11.9
instructions; at its memory speed an H200 has time for 16). Rows may begin anywhere: groups are
aligned by address, and what sticks out at the ends of a row goes through one narrow load.

No length and no scalar is a compile-time constant: forward has one variant for few rows and one
for many, backward one for rows that begin as those of a contiguous tensor do and one for others.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._kernels.launch import launching_on, row_layout, scalar
from ..._kernels.memory import refuses_fp64
from ..._kernels.triton_rows import (
    LOG2E,
    aligned,
    capped,
    capped_exactly,
    part_of,
    row_body,
    row_edge,
    row_scaling,
    tile_offsets,
)
from ..._kernels.triton_softmax import (
    NEG_INF,
    at_target,
    fold,
    gradient,
    log1p,
    merge,
    row_gradients,
)
from ..._math.linear import Scaling
from .reference import Call, Gradient

WARPS = 4  # small programs: 6 to 8 an SM, of which some load while others add up
UNROLL = 4  # 64 bytes a thread in flight
BUSY = 1024  # programs that keep every SM of a large GPU busy; the same on all, as results are
MAX_PARTS = 64


@triton.jit
def _finish(x_ptr, x_off, target_ptr, logprob_ptr, entropy_ptr, top_ptr, log_sum_ptr, row, columns,
            m, s, w, sign, pre, factor, CAPPED: tl.constexpr):
    """The results of a row, without log-probs where there are no targets; NaN where its target is
    none or its largest z is not finite.

    In fp64: at |z| = 1e4 the rounding of each z to fp32 would cost 5e-4. log_sum takes up what
    `top` lost in rounding, for backward, which forms u * factor - top in one rounding.
    """
    u = m
    if CAPPED:
        u = capped(m, pre.to(tl.float32))
    log_s = log1p(s) + tl.where(m > NEG_INF, 0.0, float("nan"))
    if target_ptr is not None:
        target = tl.load(target_ptr + row).to(tl.int64)
        good = (target >= 0) & (target < columns)
        v = tl.load(x_ptr + x_off + target, mask=good, other=0.0).to(tl.float64) * sign
        d = (v - m) * factor
        if CAPPED:
            d = (capped_exactly(v, pre) - capped_exactly(m.to(tl.float64), pre)) * factor
        log_s += tl.where(good, 0.0, float("nan"))
        tl.store(logprob_ptr + row, (d - log_s).to(tl.float32))
    factor32 = factor.to(tl.float32)
    top = u * factor32
    lost = u.to(tl.float64) * factor32 - top
    tl.store(entropy_ptr + row, (log_s - w / (1.0 + s) / LOG2E).to(tl.float32))  # d: log 2
    tl.store(top_ptr + row, tl.where(log_s == log_s, top, float("nan")))
    tl.store(log_sum_ptr + row, (log_s + lost).to(tl.float32))


@triton.jit
def _skip(logprob_ptr, entropy_ptr, top_ptr, log_sum_ptr, row):
    """The results of a masked row."""
    if logprob_ptr is not None:
        tl.store(logprob_ptr + row, 0.0)
    tl.store(entropy_ptr + row, 0.0)
    tl.store(top_ptr + row, 0.0)
    tl.store(log_sum_ptr + row, 0.0)


_RUNTIME = ("target_ptr", "mask_ptr", "logprob_ptr", "entropy_ptr", "top_ptr", "log_sum_ptr",
            "temperature_ptr", "softcap_ptr", "scale_ptr", "stride_t", "shift", "inner",
            "stride_outer", "stride_inner", "columns", "parts")


@triton.jit(do_not_specialize=(*_RUNTIME, "part_ptr", "V"))
def _token_logprobs_fwd_kernel(
        x_ptr, target_ptr, mask_ptr, logprob_ptr, entropy_ptr, top_ptr, log_sum_ptr, part_ptr,
        temperature: tl.float64, temperature_ptr, stride_t, softcap: tl.float64, softcap_ptr,
        scale: tl.float64, scale_ptr, shift, inner, stride_outer: tl.int64,
        stride_inner: tl.int64, V, columns, parts, CAPPED: tl.constexpr, U: tl.constexpr,
        L: tl.constexpr, G: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    if mask_ptr is not None:
        if tl.load(mask_ptr + row) == 0:
            if part_ptr is None:
                _skip(logprob_ptr, entropy_ptr, top_ptr, log_sum_ptr, row)
            return
    TILE: tl.constexpr = U * L * G
    sign, pre, factor, _ = row_scaling(row, temperature, temperature_ptr, stride_t, softcap,
                                    softcap_ptr, scale, scale_ptr, CAPPED)
    sign32 = sign.to(tl.float32)
    pre32 = pre.to(tl.float32)
    c = (factor * LOG2E).to(tl.float32)

    x_off = shift + row // inner * stride_outer + row % inner * stride_inner  # 64-bit
    body_off, lead, body = row_body(x_off, V, G)
    live = tl.maximum(tl.minimum(columns - lead, body), 0)  # columns of the body that count
    first, last = part_of(tl.cdiv(live, TILE), part, parts)
    whole = tl.minimum(last, live // TILE)
    offsets, group = tile_offsets(U, L * G, G)
    column = tl.reshape(offsets, [U, L, G])

    m = tl.full([L], NEG_INF, tl.float32)
    s = tl.zeros([L], tl.float32)
    w = tl.zeros([L], tl.float32)
    for tile in range(first, whole):
        x = tl.load(x_ptr + body_off + tile * TILE + offsets, eviction_policy="evict_first")
        m, s, w = fold(m, s, w, tl.reshape(x, [U, L, G]), None, sign32, pre32, c, CAPPED)
    for tile in range(tl.maximum(first, whole), last):  # one at most; a mask by whole groups
        x = tl.load(x_ptr + body_off + tile * TILE + offsets, eviction_policy="evict_first",
                    mask=tile * TILE + group < live, other=0.0)
        m, s, w = fold(m, s, w, tl.reshape(x, [U, L, G]), tile * TILE + column < live, sign32,
                        pre32, c, CAPPED)
    edge, alive = row_edge(lead, body, V, part, L, G)
    alive = alive & (edge < columns)
    x = tl.load(x_ptr + x_off + edge, mask=alive, other=0.0)
    m, s, w = fold(m, s, w, x[None, :, None], alive[None, :, None], sign32, pre32, c, CAPPED)

    m, s, w = merge(m, s, w, pre32, c, CAPPED)
    if part_ptr is None:
        _finish(x_ptr, x_off, target_ptr, logprob_ptr, entropy_ptr, top_ptr, log_sum_ptr, row,
                columns, m, s, w, sign, pre, factor, CAPPED)
    else:
        part_off = (row * parts + part) * 3
        tl.store(part_ptr + part_off, m)
        tl.store(part_ptr + part_off + 1, s)
        tl.store(part_ptr + part_off + 2, w)


@triton.jit(do_not_specialize=("x_ptr", *_RUNTIME, "part_ptr"))
def _token_logprobs_merge_kernel(
        x_ptr, target_ptr, mask_ptr, logprob_ptr, entropy_ptr, top_ptr, log_sum_ptr, part_ptr,
        temperature: tl.float64, temperature_ptr, stride_t, softcap: tl.float64, softcap_ptr,
        scale: tl.float64, scale_ptr, shift, inner, stride_outer: tl.int64,
        stride_inner: tl.int64, columns, parts, CAPPED: tl.constexpr, P: tl.constexpr):
    """The parts of a row, in their order."""
    row = tl.program_id(0).to(tl.int64)
    if mask_ptr is not None:
        if tl.load(mask_ptr + row) == 0:
            _skip(logprob_ptr, entropy_ptr, top_ptr, log_sum_ptr, row)
            return
    sign, pre, factor, _ = row_scaling(row, temperature, temperature_ptr, stride_t, softcap,
                                    softcap_ptr, scale, scale_ptr, CAPPED)
    part = tl.arange(0, P)
    part_off = (row * parts + part) * 3
    here = part < parts
    m = tl.load(part_ptr + part_off, mask=here, other=NEG_INF)
    s = tl.load(part_ptr + part_off + 1, mask=here, other=0.0)
    w = tl.load(part_ptr + part_off + 2, mask=here, other=0.0)
    m, s, w = merge(m.to(tl.float32), s, w, pre.to(tl.float32), (factor * LOG2E).to(tl.float32),
                     CAPPED)
    x_off = shift + row // inner * stride_outer + row % inner * stride_inner
    _finish(x_ptr, x_off, target_ptr, logprob_ptr, entropy_ptr, top_ptr, log_sum_ptr, row, columns,
            m, s, w, sign, pre, factor, CAPPED)


@triton.jit
def _clear(dx_ptr, dx_off, V, part, parts, U: tl.constexpr, L: tl.constexpr, G: tl.constexpr):
    """The gradient of a masked row."""
    TILE: tl.constexpr = U * L * G
    body_off, lead, body = row_body(dx_off, V, G)
    first, last = part_of(tl.cdiv(body, TILE), part, parts)
    offsets, group = tile_offsets(U, L * G, G)
    zeros = tl.zeros([U, L * G], tl.float32).to(dx_ptr.dtype.element_ty)
    for tile in range(first, last):
        tl.store(dx_ptr + body_off + tile * TILE + offsets, zeros,
                 mask=tile * TILE + group < body)
    edge, there = row_edge(lead, body, V, part, L, G)
    tl.store(dx_ptr + dx_off + edge, tl.zeros([L], tl.float32), mask=there)


@triton.jit(do_not_specialize=("g_logprob_ptr", "g_entropy_ptr", "stride_lp", "stride_ent",
                               *_RUNTIME, "V"))
def _token_logprobs_bwd_kernel(
        x_ptr, g_logprob_ptr, stride_lp, g_entropy_ptr, stride_ent, target_ptr, mask_ptr,
        entropy_ptr, top_ptr, log_sum_ptr, dx_ptr, temperature: tl.float64, temperature_ptr,
        stride_t, softcap: tl.float64, softcap_ptr, scale: tl.float64, scale_ptr, shift, inner,
        stride_outer: tl.int64, stride_inner: tl.int64, V, columns, parts, CAPPED: tl.constexpr,
        TOGETHER: tl.constexpr, U: tl.constexpr, L: tl.constexpr, G: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    dx_off = row * V
    if mask_ptr is not None:
        if tl.load(mask_ptr + row) == 0:
            _clear(dx_ptr, dx_off, V, part, parts, U, L, G)
            return
    TILE: tl.constexpr = U * L * G
    sign, pre, factor, slope = row_scaling(row, temperature, temperature_ptr, stride_t, softcap,
                                        softcap_ptr, scale, scale_ptr, CAPPED)
    sign, pre, factor = sign.to(tl.float32), pre.to(tl.float32), factor.to(tl.float32)
    a, b = row_gradients(row, g_logprob_ptr, stride_lp, g_entropy_ptr, stride_ent,
                         slope.to(tl.float32))
    entropy = tl.load(entropy_ptr + row)
    top = tl.load(top_ptr + row)
    log_sum = tl.load(log_sum_ptr + row)
    column = tl.full([], -1, tl.int32)
    if target_ptr is not None:
        column = tl.load(target_ptr + row).to(tl.int32)  # of a target that is none all is NaN

    x_off = shift + row // inner * stride_outer + row % inner * stride_inner  # 64-bit
    body_off, lead, body = row_body(dx_off, V, G)
    target = column - lead
    u = tl.load(x_ptr + x_off + column, mask=(column >= 0) & (column < columns),
                other=0.0).to(tl.float32) * sign
    if CAPPED:
        u = capped(u, pre)
    of_target = at_target(tl.fma(u, factor, -top) - log_sum, a, b, entropy)
    x_body_off = x_off + lead
    if TOGETHER:  # the same number, of which the compiler sees that it is aligned
        x_body_off = (x_off + G - 1) // G * G
    first, last = part_of(tl.cdiv(body, TILE), part, parts)
    whole = tl.minimum(last, tl.maximum(tl.minimum(columns - lead, body), 0) // TILE)
    offsets, group = tile_offsets(U, L * G, G)
    for tile in range(first, whole):
        start = tile * TILE
        x = tl.load(x_ptr + x_body_off + start + offsets, eviction_policy="evict_first")
        dx = gradient(x, offsets == target - start, of_target, sign, pre, factor, a, b, entropy,
                      top, log_sum, CAPPED)
        tl.store(dx_ptr + body_off + start + offsets, dx)
    for tile in range(tl.maximum(first, whole), last):
        start = tile * TILE
        x = tl.load(x_ptr + x_body_off + start + offsets, eviction_policy="evict_first",
                    mask=start + group < tl.minimum(columns - lead, body), other=0.0)
        dx = gradient(x, offsets == target - start, of_target, sign, pre, factor, a, b, entropy,
                      top, log_sum, CAPPED)
        dx = tl.where(start + offsets < columns - lead, dx, 0.0)
        tl.store(dx_ptr + body_off + start + offsets, dx, mask=start + group < body)
    edge, there = row_edge(lead, body, V, part, L, G)
    x = tl.load(x_ptr + x_off + edge, mask=there & (edge < columns), other=0.0)
    dx = gradient(x, edge == column, of_target, sign, pre, factor, a, b, entropy, top, log_sum,
                  CAPPED)
    tl.store(dx_ptr + dx_off + edge, tl.where(edge < columns, dx, 0.0), mask=there)


def supports(call: Call | Gradient) -> str | None:
    """The reason for refusing, or None."""
    inner: Any = getattr(call, "call", call)  # the logits, and the gradients that come in
    return refuses_fp64((inner.logits, *call[:2]))


class _Rows(NamedTuple):
    """The rows of the logits: row i begins at shift + i // inner * outer + i % inner * stride."""

    x: Tensor
    targets: Tensor | None  # [N]
    mask: Tensor | None  # [N]
    place: tuple  # arguments of the kernels, from `temperature` to `stride_inner`
    columns: int
    together: bool  # whether rows lie to a group of columns as those of a contiguous tensor do


def place_scaling(scaling: Scaling) -> tuple:
    """The arguments of a kernel from `temperature` to `scale_ptr`."""
    t, cap = scaling.temperature, scaling.softcap
    return (*((1.0, t.reshape(-1).contiguous(), 1) if t.dim() else (*scalar(t), 0)),
            *((0.0, None) if cap is None else scalar(cap)), *scalar(scaling.logit_scale))


def _rows(call: Call) -> _Rows:
    logits, targets, mask, scaling, valid_vocab = (
        call.logits, call.targets, call.mask, call.scaling, call.valid_vocab)
    V = logits.shape[-1]
    x, inner, outer, stride = row_layout(logits)
    start, shift = aligned(x)
    group = 16 // x.element_size()
    return _Rows(start, None if targets is None else targets.reshape(-1).contiguous(),
                 None if mask is None else mask.reshape(-1).contiguous(),
                 (*place_scaling(scaling), shift, inner, outer, stride),
                 V if valid_vocab is None else valid_vocab,
                 not (shift or (stride - V) % group or (outer - inner * V) % group))


def _parts(rows: int, V: int, tile: int) -> int:
    """How many programs share a row: 1 as soon as the rows alone keep every SM busy."""
    return max(1, min(-(-BUSY // rows), V // (2 * tile), MAX_PARTS))


def _shape(x: Tensor) -> dict[str, int]:
    """The compile-time shape of a tile."""
    return {"U": UNROLL, "L": 32 * WARPS, "G": 16 // x.element_size()}


def fwd(call: Call) -> tuple[Tensor, ...]:
    """(logprobs, entropy, top, log_sum), fp32; see `reference.fwd`. Two launches for few rows.
    Without targets the log-probs are not computed, and empty."""
    logits, alone = call.logits, call.targets is None
    out = tuple(logits.new_empty(0 if alone and i == 0 else logits.shape[:-1], dtype=torch.float32)
                for i in range(4))
    count, V = math.prod(logits.shape[:-1]), logits.shape[-1]
    if count == 0:
        return out
    rows, capped, shape = _rows(call), call.scaling.softcap is not None, _shape(logits)
    parts = _parts(count, V, math.prod(shape.values()))
    written = (None if alone else out[0], *out[1:])
    kept = None if parts == 1 else logits.new_empty((count, parts, 3), dtype=torch.float64)
    with launching_on(logits):
        _token_logprobs_fwd_kernel[(count, parts)](
            rows.x, rows.targets, rows.mask, *written, kept, *rows.place, V, rows.columns, parts,
            CAPPED=capped, **shape, num_warps=WARPS)
        if parts > 1:
            _token_logprobs_merge_kernel[(count,)](
                rows.x, rows.targets, rows.mask, *written, kept, *rows.place, rows.columns, parts,
                CAPPED=capped, P=MAX_PARTS, num_warps=1)
    return out


def bwd(backward: Gradient) -> Tensor:
    """The gradient of the logits; see `reference.bwd`. One launch."""
    call, logits = backward.call, backward.call.logits
    grad = logits.new_empty(logits.shape)
    if grad.numel() == 0:
        return grad
    rows, V, shape = _rows(call), logits.shape[-1], _shape(logits)
    kept = [x.reshape(-1).contiguous() for x in backward[-3:]]  # entropy, top, log_sum
    grads: list = []
    for g in (backward.grad_logprobs, backward.grad_entropy):
        flat = None if g is None else g.reshape(-1)  # a view where expanded from one number
        grads += [flat, 0 if flat is None else flat.stride(0)]
    parts = _parts(kept[0].numel(), V, math.prod(shape.values()))
    with launching_on(logits):
        _token_logprobs_bwd_kernel[(kept[0].numel(), parts)](
            rows.x, *grads, rows.targets, rows.mask, *kept, grad, *rows.place, V, rows.columns,
            parts, CAPPED=call.scaling.softcap is not None, TOGETHER=rows.together, **shape,
            num_warps=WARPS)
    return grad
