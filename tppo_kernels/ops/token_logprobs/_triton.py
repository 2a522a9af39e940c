"""`token_logprobs` in Triton: one read of the logits forward; one read and one write backward.

A program walks a row, or its part of one where rows are few, in tiles [U, L G]: L lanes, one a
thread, each with U loads of G columns, 16 bytes, in flight. Maxima and sums stay in the lane until
the row ends: the loop has no barrier, no shuffle and one exponential a column (about 10.5
instructions; at its memory speed an H200 has room for 16). Rows may begin anywhere: groups are
aligned by address, and what sticks out at the ends of a row goes through one narrow load.

No length and no scalar is a compile-time constant: forward has one variant for few rows and one
for many, backward one for rows that begin as those of a contiguous tensor do and one for others.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._kernels.launch import launching_on, row_layout, scalar
from ..._kernels.memory import FP64
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

WARPS = 4  # small programs: 8 to 12 an SM, of which some load while others add up
UNROLL = 4  # 64 bytes a thread in flight
BUSY = 1024  # programs that keep every SM of a large GPU busy; the same on all, as results are
MAX_PARTS = 64
LOWEST = tl.constexpr(-3.4028234663852886e38)
NEG_INF = tl.constexpr(float("-inf"))
DEAD = tl.constexpr(-160.0)  # 2^DEAD is 0 in fp32, and 0 * DEAD is 0, where 0 * -inf is NaN


@triton.jit
def _fold(m, s, w, x, live, sign, pre, c, CAPPED: tl.constexpr):
    """Takes a tile x [U, L, G] into max v, sum 2^d and sum d 2^d of each lane, d = c (u - max u).

    live: which columns count, or None for all. NaN passes the maximum but not 2^d.
    """
    v = x.to(tl.float32) * sign
    if live is not None:
        v = tl.where(live, v, NEG_INF)
    new = tl.maximum(m, tl.max(tl.max(v, 2), 0))  # [L]
    if CAPPED:
        u = capped(v, pre)
        if live is not None:
            u = tl.where(live, u, NEG_INF)
        u_new = capped(new, pre)
        shift = (capped(m, pre) - u_new) * c
    else:
        u = v
        u_new = new
        shift = (m - new) * c
    shift = tl.maximum(shift, DEAD)
    shrink = tl.exp2(shift)
    d = (u - u_new[None, :, None]) * c  # [U, L, G]
    e = tl.exp2(d)
    weighted = e * tl.maximum(d, DEAD)
    w = shrink * (w + s * shift) + tl.sum(tl.sum(weighted, 2), 0)
    s = shrink * s + tl.sum(tl.sum(e, 2), 0)
    return new, s, w


@triton.jit
def _merge(m, s, w, pre, c, CAPPED: tl.constexpr):
    """(max v, sum, weighted sum) of all lanes or parts; sums in fp64 and in a fixed order."""
    top = tl.max(m, 0)
    if CAPPED:
        d = (capped(m, pre) - capped(top, pre)) * c
    else:
        d = (m - top) * c
    d = tl.maximum(d, DEAD)
    shrink = tl.exp2(d).to(tl.float64)
    s = s.to(tl.float64)
    return top, tl.sum(s * shrink, 0), tl.sum((w + s * d) * shrink, 0)


@triton.jit
def _finish(x_ptr, x_off, target_ptr, logprob_ptr, entropy_ptr, top_ptr, log_sum_ptr, row, columns,
            m, s, w, sign, pre, factor, CAPPED: tl.constexpr):
    """The four results of a row; NaN where its target is none or its largest z is not finite.

    In fp64: at |z| = 1e4 the rounding of each z to fp32 would cost 5e-4. log_sum takes up what
    `top` lost in rounding, for backward, which forms u * factor - top in one rounding.
    """
    target = tl.load(target_ptr + row).to(tl.int64)
    good = (target >= 0) & (target < columns)
    v = tl.load(x_ptr + x_off + target, mask=good, other=0.0).to(tl.float64) * sign
    d = (v - m) * factor
    u = m
    if CAPPED:
        d = (capped_exactly(v, pre) - capped_exactly(m.to(tl.float64), pre)) * factor
        u = capped(m, pre.to(tl.float32))
    log_s = tl.log(s) + tl.where(good & (s > 0), 0.0, float("nan"))
    factor32 = factor.to(tl.float32)
    top = u * factor32
    lost = u.to(tl.float64) * factor32 - top
    tl.store(logprob_ptr + row, (d - log_s).to(tl.float32))
    tl.store(entropy_ptr + row, (log_s - w / s / LOG2E).to(tl.float32))  # d counted in log 2
    tl.store(top_ptr + row, tl.where(log_s == log_s, top, float("nan")))
    tl.store(log_sum_ptr + row, (log_s + lost).to(tl.float32))


@triton.jit
def _skip(logprob_ptr, entropy_ptr, top_ptr, log_sum_ptr, row):
    """The results of a masked row."""
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

    m = tl.full([L], LOWEST, tl.float32)
    s = tl.zeros([L], tl.float32)
    w = tl.zeros([L], tl.float32)
    for tile in range(first, whole):
        x = tl.load(x_ptr + body_off + tile * TILE + offsets, eviction_policy="evict_first")
        m, s, w = _fold(m, s, w, tl.reshape(x, [U, L, G]), None, sign32, pre32, c, CAPPED)
    for tile in range(tl.maximum(first, whole), last):  # one at most; a mask by whole groups
        x = tl.load(x_ptr + body_off + tile * TILE + offsets, eviction_policy="evict_first",
                    mask=tile * TILE + group < live, other=0.0)
        m, s, w = _fold(m, s, w, tl.reshape(x, [U, L, G]), tile * TILE + column < live, sign32,
                        pre32, c, CAPPED)
    edge, alive = row_edge(lead, body, V, part, L, G)
    alive = alive & (edge < columns)
    x = tl.load(x_ptr + x_off + edge, mask=alive, other=0.0)
    m, s, w = _fold(m, s, w, x[None, :, None], alive[None, :, None], sign32, pre32, c, CAPPED)

    m, s, w = _merge(m, s, w, pre32, c, CAPPED)
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
    m = tl.load(part_ptr + part_off, mask=here, other=LOWEST)
    s = tl.load(part_ptr + part_off + 1, mask=here, other=0.0)
    w = tl.load(part_ptr + part_off + 2, mask=here, other=0.0)
    m, s, w = _merge(m.to(tl.float32), s, w, pre.to(tl.float32), (factor * LOG2E).to(tl.float32),
                     CAPPED)
    x_off = shift + row // inner * stride_outer + row % inner * stride_inner
    _finish(x_ptr, x_off, target_ptr, logprob_ptr, entropy_ptr, top_ptr, log_sum_ptr, row, columns,
            m, s, w, sign, pre, factor, CAPPED)


@triton.jit
def _row_gradients(row, g_logprob_ptr, stride_lp, g_entropy_ptr, stride_ent, slope):
    """(a, b) = slope (g_lp, g_ent); b is None where entropy has no gradient."""
    a = slope * 0.0
    b = None
    if g_logprob_ptr is not None:
        a = slope * tl.load(g_logprob_ptr + row * stride_lp).to(tl.float32)
    if g_entropy_ptr is not None:
        b = slope * tl.load(g_entropy_ptr + row * stride_ent).to(tl.float32)
    return a, b


@triton.jit
def _gradient(x, hit, sign, pre, factor, a, b, entropy, top, log_sum, CAPPED: tl.constexpr):
    """dx = slope (1 - u^2 if capped) (g_lp (1[hit] - p) - g_ent p (log p + entropy))."""
    u = x.to(tl.float32) * sign
    if CAPPED:
        u = capped(u, pre)
    log_p = tl.fma(u, factor, -top) - log_sum
    p = tl.exp2(log_p * LOG2E)
    if b is None:
        dx = tl.where(hit, a, 0.0) - p * a
    else:
        dx = tl.where(hit, a, 0.0) - p * (a + b * (tl.maximum(log_p, DEAD) + entropy))
    if CAPPED:
        dx = dx * (1.0 - u * u)
    return dx


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
    a, b = _row_gradients(row, g_logprob_ptr, stride_lp, g_entropy_ptr, stride_ent,
                          slope.to(tl.float32))
    entropy = tl.load(entropy_ptr + row)
    top = tl.load(top_ptr + row)
    log_sum = tl.load(log_sum_ptr + row)
    target = tl.load(target_ptr + row).to(tl.int64)

    x_off = shift + row // inner * stride_outer + row % inner * stride_inner  # 64-bit
    body_off, lead, body = row_body(dx_off, V, G)
    x_body_off = x_off + lead
    if TOGETHER:  # the same number, of which the compiler sees that it is aligned
        x_body_off = (x_off + G - 1) // G * G
    first, last = part_of(tl.cdiv(body, TILE), part, parts)
    whole = tl.minimum(last, tl.maximum(tl.minimum(columns - lead, body), 0) // TILE)
    offsets, group = tile_offsets(U, L * G, G)
    for tile in range(first, whole):
        start = tile * TILE
        x = tl.load(x_ptr + x_body_off + start + offsets, eviction_policy="evict_first")
        dx = _gradient(x, offsets == (target - lead - start).to(tl.int32), sign, pre, factor, a, b,
                       entropy, top, log_sum, CAPPED)
        tl.store(dx_ptr + body_off + start + offsets, dx)
    for tile in range(tl.maximum(first, whole), last):
        start = tile * TILE
        x = tl.load(x_ptr + x_body_off + start + offsets, eviction_policy="evict_first",
                    mask=start + group < tl.minimum(columns - lead, body), other=0.0)
        dx = _gradient(x, offsets == (target - lead - start).to(tl.int32), sign, pre, factor, a, b,
                       entropy, top, log_sum, CAPPED)
        dx = tl.where(start + offsets < columns - lead, dx, 0.0)
        tl.store(dx_ptr + body_off + start + offsets, dx, mask=start + group < body)
    edge, there = row_edge(lead, body, V, part, L, G)
    x = tl.load(x_ptr + x_off + edge, mask=there & (edge < columns), other=0.0)
    dx = _gradient(x, edge == target, sign, pre, factor, a, b, entropy, top, log_sum, CAPPED)
    tl.store(dx_ptr + dx_off + edge, tl.where(edge < columns, dx, 0.0), mask=there)


def supports(*args: object) -> str | None:
    """The reason for refusing, or None."""
    if any(isinstance(x, Tensor) and x.dtype == torch.float64 and x.dim() for x in args[:3]):
        return FP64
    return None


class _Rows(NamedTuple):
    """The rows of the logits: row i begins at shift + i // inner * outer + i % inner * stride."""

    x: Tensor
    targets: Tensor  # [N]
    mask: Tensor | None  # [N]
    place: tuple  # arguments of the kernels, from `temperature` to `stride_inner`
    columns: int
    together: bool  # whether rows lie to a group of columns as those of a contiguous tensor do


def _rows(logits: Tensor, targets: Tensor, mask: Tensor | None, temperature: Tensor,
          softcap: Tensor | None, logit_scale: Tensor, valid_vocab: int | None) -> _Rows:
    V = logits.shape[-1]
    x, inner, outer, stride = row_layout(logits)
    heat = (1.0, temperature.reshape(-1).contiguous(), 1) if temperature.dim() else (
        *scalar(temperature), 0)
    cap = (0.0, None) if softcap is None else scalar(softcap)
    start, shift = aligned(x)
    group = 16 // x.element_size()
    return _Rows(start, targets.reshape(-1).contiguous(),
                 None if mask is None else mask.reshape(-1).contiguous(),
                 (*heat, *cap, *scalar(logit_scale), shift, inner, outer, stride),
                 V if valid_vocab is None else valid_vocab,
                 not (shift or (stride - V) % group or (outer - inner * V) % group))


def _parts(rows: int, V: int, tile: int) -> int:
    """How many programs share a row: 1 as soon as the rows alone keep every SM busy."""
    return max(1, min(-(-BUSY // rows), V // (2 * tile), MAX_PARTS))


def _shape(x: Tensor) -> dict[str, int]:
    """The compile-time shape of a tile."""
    return {"U": UNROLL, "L": 32 * WARPS, "G": 16 // x.element_size()}


def fwd(logits: Tensor, *arguments) -> tuple[Tensor, ...]:
    """(logprobs, entropy, top, log_sum), fp32; see `reference.fwd`. Two launches for few rows."""
    out = tuple(logits.new_empty(logits.shape[:-1], dtype=torch.float32) for _ in range(4))
    count, V = out[0].numel(), logits.shape[-1]
    if count == 0:
        return out
    rows, capped, shape = _rows(logits, *arguments), arguments[3] is not None, _shape(logits)
    parts = _parts(count, V, math.prod(shape.values()))
    kept = None if parts == 1 else logits.new_empty((count, parts, 3), dtype=torch.float64)
    with launching_on(logits):
        _token_logprobs_fwd_kernel[(count, parts)](
            rows.x, rows.targets, rows.mask, *out, kept, *rows.place, V, rows.columns, parts,
            CAPPED=capped, **shape, num_warps=WARPS)
        if parts > 1:
            _token_logprobs_merge_kernel[(count,)](
                rows.x, rows.targets, rows.mask, *out, kept, *rows.place, rows.columns, parts,
                CAPPED=capped, P=MAX_PARTS, num_warps=1)
    return out


def bwd(grad_logprobs: Tensor | None, grad_entropy: Tensor | None, logits: Tensor,
        *arguments) -> Tensor:
    """The gradient by logits; see `reference.bwd`. One launch."""
    grad = logits.new_empty(logits.shape)
    if grad.numel() == 0:
        return grad
    rows, V, shape = _rows(logits, *arguments[:-3]), logits.shape[-1], _shape(logits)
    kept = [x.reshape(-1).contiguous() for x in arguments[-3:]]  # entropy, top, log_sum
    grads: list = []
    for g in (grad_logprobs, grad_entropy):
        flat = None if g is None else g.reshape(-1)  # a view where expanded from one number
        grads += [flat, 0 if flat is None else flat.stride(0)]
    parts = _parts(kept[0].numel(), V, math.prod(shape.values()))
    with launching_on(logits):
        _token_logprobs_bwd_kernel[(kept[0].numel(), parts)](
            rows.x, *grads, rows.targets, rows.mask, *kept, grad, *rows.place, V, rows.columns,
            parts, CAPPED=arguments[3] is not None, TOGETHER=rows.together, **shape,
            num_warps=WARPS)
    return grad
