"""`whiten` in Triton: at most two launches for the statistics, one for the result.

Memory moved: x and the mask twice, the result once. Each program takes every P-th block of x: a
block's statistics are two-pass in registers, blocks and programs are merged in a fixed order in
fp64 (Chan et al. 1979). Full blocks are loaded without a bound, which lets loads be wide.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._kernels.launch import launching_on, scalar
from ..._kernels.memory import supports
from .reference import TINY, WhitenCall, WhitenStats

__all__ = ["fwd", "stats", "supports"]

BLOCK = 4096
PROGRAMS = 1024  # at most; the same on every GPU, so that results are too
_TINY = tl.constexpr(TINY)


@triton.jit
def _load(x_ptr, mask_ptr, start, n, BLOCK: tl.constexpr):
    """A block in fp32, 0 where masked, and what is valid of it."""  # [BLOCK], [BLOCK]
    x_off = start + tl.arange(0, BLOCK)
    if start + BLOCK <= n:
        x = tl.load(x_ptr + x_off).to(tl.float32)
        valid = tl.full([BLOCK], 1, tl.int1)
        if mask_ptr is not None:
            valid = tl.load(mask_ptr + x_off) != 0
    else:
        valid = x_off < n
        x = tl.load(x_ptr + x_off, mask=valid, other=0.0).to(tl.float32)
        if mask_ptr is not None:
            valid = tl.load(mask_ptr + x_off, mask=valid, other=0) != 0
    return tl.where(valid, x, 0.0), valid


@triton.jit(do_not_specialize=["n"])
def _whiten_stats_kernel(x_ptr, mask_ptr, parts_ptr, n, BLOCK: tl.constexpr):
    """(n, mean, M2, max|x|) of the blocks of this program."""  # parts: [P, 4] fp64
    first = tl.program_id(0).to(tl.int64) * BLOCK
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    count = tl.full([], 0.0, tl.float64)
    mean = tl.full([], 0.0, tl.float64)
    m2 = tl.full([], 0.0, tl.float64)
    largest = tl.full([], 0.0, tl.float32)
    for start in range(first, n, stride):
        x, valid = _load(x_ptr, mask_ptr, start, n, BLOCK)
        block_count = tl.sum(valid.to(tl.int32), 0).to(tl.float32)
        least_one = tl.maximum(block_count, 1.0)
        m = tl.sum(x, 0) / least_one
        d = tl.where(valid, x - m, 0.0)
        drift = tl.sum(d, 0)  # what the rounding of m left
        block_m2 = tl.sum(d * d, 0) - drift * drift / least_one
        block_mean = m.to(tl.float64) + (drift / least_one).to(tl.float64)
        total = count + block_count.to(tl.float64)
        share = block_count.to(tl.float64) / tl.where(total < 1.0, 1.0, total)
        delta = block_mean - mean
        m2 += block_m2.to(tl.float64) + delta * delta * count * share
        mean += delta * share
        count = total
        largest = tl.maximum(largest, tl.max(tl.abs(x), 0))
    part_ptr = parts_ptr + tl.program_id(0) * 4
    tl.store(part_ptr, count)
    tl.store(part_ptr + 1, mean)
    tl.store(part_ptr + 2, tl.where(m2 < 0.0, 0.0, m2))
    tl.store(part_ptr + 3, largest.to(tl.float64))


@triton.jit(do_not_specialize=["parts"])
def _whiten_merge_kernel(parts_ptr, moments_ptr, parts, PROGRAMS: tl.constexpr):
    """The statistics of all programs from those of each."""  # [P, 4] -> [4]
    p = tl.arange(0, PROGRAMS)
    here = p < parts
    count = tl.load(parts_ptr + p * 4, mask=here, other=0.0)
    mean = tl.load(parts_ptr + p * 4 + 1, mask=here, other=0.0)
    m2 = tl.load(parts_ptr + p * 4 + 2, mask=here, other=0.0)
    largest = tl.load(parts_ptr + p * 4 + 3, mask=here, other=0.0)
    total = tl.sum(count, 0)
    common = tl.sum(count * mean, 0) / tl.where(total < 1.0, 1.0, total)
    delta = mean - common
    tl.store(moments_ptr, total)
    tl.store(moments_ptr + 1, common)
    tl.store(moments_ptr + 2, tl.sum(m2 + count * delta * delta, 0))
    tl.store(moments_ptr + 3, tl.max(largest, 0))


@triton.jit(do_not_specialize=["eps", "n", "unbiased", "shift_mean"])
def _whiten_fwd_kernel(x_ptr, mask_ptr, moments_ptr, eps_ptr, eps, out_ptr, n, unbiased,
                       shift_mean, BLOCK: tl.constexpr):
    """(x - mean) * rsqrt(var + eps), and the mean again where it stays; 0 where masked."""
    if eps_ptr is not None:
        eps = tl.load(eps_ptr)
    count = tl.load(moments_ptr)
    mean = tl.load(moments_ptr + 1)
    largest = tl.load(moments_ptr + 3)
    freedom = count - unbiased
    var = tl.load(moments_ptr + 2) / tl.where(freedom < 1.0, 1.0, freedom)
    tiny = largest * _TINY
    flat = (count < 2.0) | (var <= tiny * tiny)
    scale = tl.where(flat, 0.0, 1.0 / tl.sqrt(var + eps))
    high = mean.to(tl.float32)  # the mean in two parts: fp32 alone would shift every result
    rest = tl.where(shift_mean != 0, 0.0, mean) - (mean - high.to(tl.float64)) * scale
    start = tl.program_id(0).to(tl.int64) * BLOCK
    x, valid = _load(x_ptr, mask_ptr, start, n, BLOCK)
    y = tl.where(valid, (x - high) * scale.to(tl.float32) + rest.to(tl.float32), 0.0)
    out_off = start + tl.arange(0, BLOCK)
    if start + BLOCK <= n:
        tl.store(out_ptr + out_off, y)
    else:
        tl.store(out_ptr + out_off, y, mask=out_off < n)


def stats(call: WhitenStats) -> Tensor:
    """(n, mean, M2, max|x|) of the valid tokens."""  # [4] fp64
    x, mask = call
    n = x.numel()
    if n == 0:
        return torch.zeros(4, dtype=torch.float64, device=x.device)
    x, mask = x.contiguous(), None if mask is None else mask.contiguous()
    programs = min(triton.cdiv(n, BLOCK), PROGRAMS)
    parts = torch.empty(programs, 4, dtype=torch.float64, device=x.device)
    with launching_on(x):
        _whiten_stats_kernel[(programs,)](x, mask, parts, n, BLOCK=BLOCK, num_warps=8)
        if programs == 1:
            return parts[0]
        moments = torch.empty(4, dtype=torch.float64, device=x.device)
        _whiten_merge_kernel[(1,)](parts, moments, programs, PROGRAMS=PROGRAMS, num_warps=4)
    return moments


def fwd(call: WhitenCall) -> Tensor:
    """(x - mean) * rsqrt(var + eps), fp32, 0 where masked."""
    x, mask, moments, eps, unbiased, shift_mean = call
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    n = x.numel()
    if n == 0:
        return out
    x, mask = x.contiguous(), None if mask is None else mask.contiguous()
    eps_value, eps_ptr = scalar(eps)
    with launching_on(x):
        _whiten_fwd_kernel[(triton.cdiv(n, BLOCK),)](
            x, mask, moments.contiguous(), eps_ptr, eps_value, out, n, int(unbiased),
            int(shift_mean), BLOCK=BLOCK, num_warps=8)
    return out
