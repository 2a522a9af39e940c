"""`linear_logprobs` on a GPU: cuBLAS's products, and the row formulas in Triton.

Bytes of a logit beside the products, 16-bit inputs: statistics read 4; "store" reads 4 and writes 2
in the same launch; a gradient reads 4 and writes 2, from what was kept 2 and 2. Exponentials are
relative to the largest of their block of columns, so one read suffices, and none underflows.
Two launches a chunk of rows, in which each row is 16-byte aligned; see `Problem.buffers`.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._core.record import flat
from ..._kernels.launch import launching_on
from ..._kernels.memory import refuses_fp64
from ..._kernels.triton_rows import LN2, LOG2E, log2, part_of, row_scaling
from ..._kernels.triton_softmax import (
    DEAD,
    LOWEST,
    NEG_INF,
    at_target,
    gradient,
    log1p,
    row_gradients,
)
from ..._math import kept as layout
from ..._math.kept import Stats
from ..token_logprobs import _triton as token
from . import _chunked
from ._chunked import Rows, Slopes

TILE, WARPS = 2048, 4  # of a gradient of logits: 16 columns a thread, 64 bytes in flight
BLOCK_WARPS = 4  # of a tile of kept exponentials, of which each warp has a block
GROUP = 8  # adjacent columns of a thread: 16 bytes of 16-bit numbers

_SCALING = ("temperature_ptr", "stride_t", "softcap_ptr", "scale_ptr")


@triton.jit
def _keep(x, live, m, n, s, w, sign, c):
    """Takes a tile x [U, W, 32 G] into max v [W], and into how many have it, sum 2^d of the others
    and sum d 2^d [W, 32] of a row; apart, because beside a 1 an fp32 sum would lose the others.

    Each of the W warps reads a block of columns of its own, so that no step waits for another
    warp. live: which columns count, or None for all. Returns the exponentials of the tile,
    relative to the largest v of their block, those v [W], and the new m, n, s, w.
    """
    U: tl.constexpr = x.shape[0]
    W: tl.constexpr = x.shape[1]
    G: tl.constexpr = x.shape[2] // 32
    v = x.to(tl.float32) * sign
    if live is not None:
        v = tl.where(live, v, NEG_INF)
    most = tl.max(tl.max(tl.reshape(tl.max(v, 0), [W, 32, G]), 2), 1)
    most = tl.maximum(most, LOWEST)
    new = tl.maximum(m, most)
    d = (v - most[None, :, None]) * c
    e = tl.exp2(d)
    weighted = tl.reshape(e * tl.maximum(d, DEAD), [U, W, 32, G])
    shift = tl.maximum((m - new) * c, DEAD)[:, None]
    of_tile = tl.maximum((most - new) * c, DEAD)[:, None]
    is_top = d == 0.0
    n_tile = tl.sum(tl.sum(tl.reshape(is_top.to(tl.float32), [U, W, 32, G]), 3), 0)
    s_tile = tl.sum(tl.sum(tl.reshape(tl.where(is_top, 0.0, e), [U, W, 32, G]), 3), 0)
    w_tile = tl.sum(tl.sum(weighted, 3), 0)
    w = (tl.exp2(shift) * (w + (s + n) * shift)
         + tl.exp2(of_tile) * (w_tile + (s_tile + n_tile) * of_tile))
    beaten = (m != new)[:, None]
    lower = (most != new)[:, None]
    s = (tl.exp2(shift) * (s + tl.where(beaten, n, 0.0))
         + tl.exp2(of_tile) * (s_tile + tl.where(lower, n_tile, 0.0)))
    n = tl.where(beaten, 0.0, n) + tl.where(lower, 0.0, n_tile)
    return e, most, new, n, s, w


@triton.jit
def _block_offsets(U: tl.constexpr, W: tl.constexpr, C: tl.constexpr):
    """The columns of a tile [U, W, C]: the W blocks of U C columns lie one behind another."""
    return (tl.arange(0, U)[:, None, None] * C + tl.arange(0, W)[None, :, None] * (U * C)
            + tl.arange(0, C)[None, None, :])


@triton.jit(do_not_specialize=("x_ptr", "stride_x", "target_ptr", "e_ptr", "stats_ptr", *_SCALING,
                               "columns", "rows"))
def _linear_logprobs_keep_kernel(
        x_ptr, stride_x: tl.int64, target_ptr, e_ptr, stats_ptr, temperature: tl.float64,
        temperature_ptr, stride_t, softcap: tl.float64, softcap_ptr, scale: tl.float64, scale_ptr,
        columns, rows: tl.int64, SCALE: tl.constexpr, ALIGNED: tl.constexpr, U: tl.constexpr,
        W: tl.constexpr, G: tl.constexpr):
    """Statistics [4 + blocks, rows] and exponentials of a row; a block is a warp's U 32 G columns.

    Sums stay in the lane until the row ends: only the maximum of a block needs a warp.
    """
    row = tl.program_id(0).to(tl.int64)
    TILE: tl.constexpr = U * W * 32 * G
    sign, _, factor, _ = row_scaling(row, temperature, temperature_ptr, stride_t, softcap,
                                     softcap_ptr, scale, scale_ptr, False)
    sign32 = sign.to(tl.float32)
    c = (factor * LOG2E).to(tl.float32)
    x_row = tl.multiple_of(x_ptr + row * stride_x, 16)
    e_row = e_ptr + row * columns  # 64-bit
    if ALIGNED:
        e_row = tl.multiple_of(e_row, 16)
    block = tl.arange(0, W)[:, None]
    lane = tl.arange(0, 32)[None, :]  # the first one of a warp writes the shift of its block
    shift_ptr = stats_ptr + 4 * rows + row + block * rows + lane * 0
    offsets = _block_offsets(U, W, 32 * G)

    m = tl.full([W], LOWEST, tl.float32)
    n = tl.zeros([W, 32], tl.float32)
    s = tl.zeros([W, 32], tl.float32)
    w = tl.zeros([W, 32], tl.float32)
    whole = columns // TILE
    for tile in range(0, whole):
        x = tl.load(x_row + tile * TILE + offsets, eviction_policy="evict_first")
        e, u, m, n, s, w = _keep(x, None, m, n, s, w, sign32, c)
        tl.store(e_row + tile * TILE + offsets, e * SCALE)
        shift = tl.broadcast_to((u.to(tl.float64) * factor).to(tl.float32)[:, None], [W, 32])
        tl.store(shift_ptr + tile * W * rows, shift, mask=lane == 0)
    for tile in range(whole, tl.cdiv(columns, TILE)):  # one at most
        live = tile * TILE + offsets < columns
        written = live
        if ALIGNED:  # by whole groups, so that stores stay wide
            written = tile * TILE + offsets // G * G < columns
        x = tl.load(x_row + tile * TILE + offsets, mask=written, other=0.0)
        e, u, m, n, s, w = _keep(x, live, m, n, s, w, sign32, c)
        tl.store(e_row + tile * TILE + offsets, e * SCALE, mask=written)
        shift = tl.broadcast_to((u.to(tl.float64) * factor).to(tl.float32)[:, None], [W, 32])
        tl.store(shift_ptr + tile * W * rows, shift,
                 mask=(lane == 0) & (tile * TILE + block * (U * 32 * G) < columns))

    m, n, s, w = _joined(m, n, s, w, c)
    target = tl.load(target_ptr + row).to(tl.int64)
    good = (target >= 0) & (target < columns)
    v = tl.load(x_row + target, mask=good, other=0.0).to(tl.float64) * sign
    m64 = m.to(tl.float64)  # both in fp64: see `token_logprobs`
    log_sum = log1p(s + (n - 1.0))
    good = good & (n > 0)
    entropy = log_sum - w / (s + n) / LOG2E
    nan = float("nan")
    logprob = factor * (v - m64) - log_sum
    tl.store(stats_ptr + row, tl.where(good, logprob, nan).to(tl.float32))
    tl.store(stats_ptr + rows + row, tl.where(good, entropy, nan).to(tl.float32))
    tl.store(stats_ptr + 2 * rows + row, tl.where(good, factor * m64, nan).to(tl.float32))
    tl.store(stats_ptr + 3 * rows + row, tl.where(good, log_sum, nan).to(tl.float32))


@triton.jit
def _joined(m, n, s, w, c):
    """(max v, how many, sum, weighted sum) of all warps m [W], n, s, w [W, 32]; sums in fp64."""
    top = tl.max(m, 0)
    d = tl.maximum((m - top) * c, DEAD)[:, None]
    shrink = tl.exp2(d).to(tl.float64)
    own = n.to(tl.float64)
    beaten = (m != top)[:, None]
    total = tl.sum(tl.sum((s + tl.where(beaten, own, 0.0)) * shrink, 1), 0)
    weighted = tl.sum(tl.sum((w + (s + n) * d).to(tl.float64) * shrink, 1), 0)
    return top, tl.sum(tl.sum(tl.where(beaten, 0.0, own), 1), 0), total, weighted


@triton.jit
def _write(dx_row, low_row, twice, offsets, dx, live):
    """dx, rounded to its dtype; `twice`: and in the second row what it lost.

    What was written is read back for that: used as a register too, a rounded number would be
    converted by an instruction of its own, where a pair shares one.
    """
    tl.store(dx_row + offsets, dx, mask=live)
    if twice:
        tl.debug_barrier()
        high = tl.load(dx_row + offsets, mask=live)
        tl.store(low_row + offsets, dx - high.to(tl.float32), mask=live)


_OF_ROWS = ("g_logprob_ptr", "g_entropy_ptr", "stride_lp", "stride_ent", "target_ptr",
            "logprob_ptr", "entropy_ptr", "top_ptr", "log_sum_ptr")


@triton.jit(do_not_specialize=("x_ptr", "stride_x", "dx_ptr", "stride_dx", "low_off", *_OF_ROWS,
                               *_SCALING, "columns", "parts"))
def _linear_logprobs_gradient_kernel(
        x_ptr, stride_x: tl.int64, dx_ptr, stride_dx: tl.int64, low_off: tl.int64, g_logprob_ptr,
        stride_lp, g_entropy_ptr, stride_ent, target_ptr, logprob_ptr, entropy_ptr, top_ptr,
        log_sum_ptr, temperature: tl.float64, temperature_ptr, stride_t, softcap: tl.float64,
        softcap_ptr, scale: tl.float64, scale_ptr, columns, parts, CAPPED: tl.constexpr,
        TILE: tl.constexpr):
    """dx of the logits x, in its own dtype; it may take their place.

    low_off: where the second number that makes up a dx lies, behind the first; 0 without.
    """
    row = tl.program_id(0).to(tl.int64)
    sign, pre, factor, slope = row_scaling(row, temperature, temperature_ptr, stride_t, softcap,
                                           softcap_ptr, scale, scale_ptr, CAPPED)
    sign, pre, factor = sign.to(tl.float32), pre.to(tl.float32), factor.to(tl.float32)
    a, b = row_gradients(row, g_logprob_ptr, stride_lp, g_entropy_ptr, stride_ent,
                         slope.to(tl.float32))
    entropy = tl.load(entropy_ptr + row)
    top = tl.load(top_ptr + row)
    log_sum = tl.load(log_sum_ptr + row)
    target = tl.load(target_ptr + row).to(tl.int32)
    of_target = at_target(tl.load(logprob_ptr + row), a, b, entropy)
    x_row = tl.multiple_of(x_ptr + row * stride_x, 16)
    dx_row = tl.multiple_of(dx_ptr + row * stride_dx, 16)
    low_row = tl.multiple_of(dx_row + low_off, 16)
    offsets = tl.arange(0, TILE)
    first, last = part_of(tl.cdiv(columns, TILE), tl.program_id(1), parts)
    whole = tl.minimum(last, columns // TILE)
    for tile in range(first, whole):
        start = tile * TILE
        x = tl.load(x_row + start + offsets, eviction_policy="evict_first")
        dx = gradient(x, offsets == target - start, of_target, sign, pre, factor, a, b, entropy,
                      top, log_sum, CAPPED)
        _write(dx_row, low_row, low_off != 0, start + offsets, dx, None)
    for tile in range(tl.maximum(first, whole), last):
        start = tile * TILE
        live = start + offsets < columns
        x = tl.load(x_row + start + offsets, mask=live, other=0.0)
        dx = gradient(x, offsets == target - start, of_target, sign, pre, factor, a, b, entropy,
                      top, log_sum, CAPPED)
        _write(dx_row, low_row, low_off != 0, start + offsets, dx, live)


@triton.jit
def _of_kept(e, hit, of_target, log_share, a, b, entropy, SCALE: tl.constexpr):
    """dx of exponentials e = exp(z - shift), p = e exp(log_share); log p from log e.

    e: a tile [U, W, C]; log_share: of its blocks [W]. What the columns of a block share is computed
    once: dx = e (first + second log2 e). The logarithm of an e of 0 is held at DEAD, and so is that
    of a block without probability: both are multiplied by 0.
    """
    e = e.to(tl.float32) * (1.0 / SCALE)
    share = -tl.exp2(log_share * LOG2E)
    if b is None:
        dx = e * (share * a)[None, :, None]
    else:
        if SCALE == 1.0:
            d = tl.maximum(tl.log2(e), DEAD)
        else:  # as exact as an e of 16 bits
            d = tl.maximum(log2(e), DEAD)
        first = share * (a + b * (tl.maximum(log_share, DEAD) + entropy))
        second = share * b * LN2
        dx = e * tl.fma(d, second[None, :, None], first[None, :, None])
    return tl.where(hit, of_target, dx)


@triton.jit(do_not_specialize=("e_ptr", "dx_ptr", "stride_dx", "low_off", *_OF_ROWS, "shift_ptr",
                               "stride_shift", *_SCALING, "columns", "parts"))
def _linear_logprobs_kept_kernel(
        e_ptr, dx_ptr, stride_dx: tl.int64, low_off: tl.int64, g_logprob_ptr, stride_lp,
        g_entropy_ptr, stride_ent, target_ptr, logprob_ptr, entropy_ptr, top_ptr, log_sum_ptr,
        shift_ptr, stride_shift: tl.int64, temperature: tl.float64, temperature_ptr, stride_t,
        softcap: tl.float64, softcap_ptr, scale: tl.float64, scale_ptr, columns, parts,
        SCALE: tl.constexpr, ALIGNED: tl.constexpr, U: tl.constexpr, W: tl.constexpr,
        G: tl.constexpr):
    """dx from kept exponentials; at the target from its logprob, because 1 - p is a difference."""
    row = tl.program_id(0).to(tl.int64)
    _, _, _, slope = row_scaling(row, temperature, temperature_ptr, stride_t, softcap, softcap_ptr,
                                 scale, scale_ptr, False)
    a, b = row_gradients(row, g_logprob_ptr, stride_lp, g_entropy_ptr, stride_ent,
                         slope.to(tl.float32))
    entropy = tl.load(entropy_ptr + row)
    top = tl.load(top_ptr + row)
    log_sum = tl.load(log_sum_ptr + row)
    target = tl.load(target_ptr + row).to(tl.int32)
    of_target = at_target(tl.load(logprob_ptr + row), a, b, entropy)

    e_row = e_ptr + row * columns  # 64-bit
    if ALIGNED:
        e_row = tl.multiple_of(e_row, 16)
    dx_row = tl.multiple_of(dx_ptr + row * stride_dx, 16)
    low_row = tl.multiple_of(dx_row + low_off, 16)
    TILE: tl.constexpr = U * W * 32 * G
    offsets = _block_offsets(U, W, 32 * G)
    block = tl.arange(0, W)
    shift_ptr += row + block * stride_shift
    first, last = part_of(tl.cdiv(columns, TILE), tl.program_id(1), parts)
    whole = tl.minimum(last, columns // TILE)
    for tile in range(first, whole):
        start = tile * TILE
        shift = tl.load(shift_ptr + tile * W * stride_shift)
        e = tl.load(e_row + start + offsets, eviction_policy="evict_first")
        dx = _of_kept(e, offsets == target - start, of_target, shift - top - log_sum, a, b,
                      entropy, SCALE)
        _write(dx_row, low_row, low_off != 0, start + offsets, dx, None)
    for tile in range(tl.maximum(first, whole), last):
        start = tile * TILE
        live = start + offsets < columns
        if ALIGNED:  # by whole groups, so that loads and stores stay wide
            live = start + offsets // G * G < columns
        shift = tl.load(shift_ptr + tile * W * stride_shift,
                        mask=start + block * (U * 32 * G) < columns, other=0.0)
        e = tl.load(e_row + start + offsets, mask=live, other=0.0)
        dx = _of_kept(e, offsets == target - start, of_target, shift - top - log_sum, a, b,
                      entropy, SCALE)
        _write(dx_row, low_row, low_off != 0, start + offsets, dx, live)


def supports(call: tuple) -> str | None:
    """The reason for refusing a record of either linear operator, or None."""
    return refuses_fp64(flat(call))


def _by_block(e: Tensor, columns: int) -> dict:
    """What a kernel whose tile is a block of kept exponentials e for each warp is compiled for."""
    return {"SCALE": layout.FP16_SCALE if e.dtype == torch.float16 else 1.0,
            "ALIGNED": columns % GROUP == 0, "U": layout.KEPT_BLOCK // (32 * GROUP),
            "W": BLOCK_WARPS, "G": GROUP, "num_warps": BLOCK_WARPS}


def _of_rows(slopes: Slopes, rows: Rows, out: Tensor) -> tuple:
    """The arguments of a kernel from `stride_dx` to `target_ptr`.

    Behind the gradients their strides, 0 where one is expanded from one number; how far the second
    numbers of out [2 R, v] lie behind the first ones, 0 of out [R, v]; no column of this shard for
    a target of another.
    """
    chunk, count = rows.chunk, rows.x.shape[0]
    low_off = count * out.stride(0) if out.shape[0] > count else 0
    grads = [y for g in slopes[:2] for y in ((None, 0) if g is None else (g, g.stride(0)))]
    here = (chunk.targets if chunk.owned is None
            else torch.where(chunk.owned, chunk.targets, -1))
    return (out.stride(0), low_off, *grads, here)


def _exponentials(rows: Rows) -> Stats:
    x, out = rows.x, rows.exponentials
    assert out is not None
    count, columns = x.shape
    stats = x.new_empty(4 + layout.blocks_of(columns, torch.device("cuda")), count)
    with launching_on(x):
        _linear_logprobs_keep_kernel[(count,)](
            x, x.stride(0), rows.chunk.targets, out, stats,
            *token.place_scaling(rows.chunk.scaling), columns, count, **_by_block(out, columns))
    return Stats.of(stats, 0, count)


def _gradient(slopes: Slopes, rows: Rows, stats: Stats, out: Tensor) -> None:
    x, (count, columns), scaling = rows.x, rows.x.shape, rows.chunk.scaling
    parts = token._parts(count, columns, TILE)
    with launching_on(x):
        _linear_logprobs_gradient_kernel[(count, parts)](
            x, x.stride(0), out, *_of_rows(slopes, rows, out), *stats[:4],
            *token.place_scaling(scaling), columns, parts, CAPPED=scaling.softcap is not None,
            TILE=TILE, num_warps=WARPS)


def _gradient_of_exponentials(slopes: Slopes, rows: Rows, stats: Stats, out: Tensor) -> None:
    e, (count, columns) = rows.x, rows.x.shape
    parts = token._parts(count, columns, layout.KEPT_BLOCK * BLOCK_WARPS)
    assert stats.shifts is not None
    with launching_on(e):
        _linear_logprobs_kept_kernel[(count, parts)](
            e, out, *_of_rows(slopes, rows, out), *stats, stats.shifts.stride(0),
            *token.place_scaling(rows.chunk.scaling), columns, parts, **_by_block(e, columns))


STEPS = _chunked.Steps(token.fwd, _exponentials, _gradient, _gradient_of_exponentials,
                       aligned=True, by_blocks=True)
fwd = functools.partial(_chunked.fwd, steps=STEPS)
bwd = functools.partial(_chunked.bwd, steps=STEPS)
frozen = _chunked.frozen
