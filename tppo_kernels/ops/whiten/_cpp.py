"""`whiten` on the CPU: statistics in one read of memory, in double precision, and one pass."""

from __future__ import annotations

import torch
from torch import Tensor

import tppo_kernels._C as _C

from ..._kernels.memory import address, supports
from .reference import WhitenCall, WhitenStats

__all__ = ["fwd", "stats", "supports"]


def stats(call: WhitenStats) -> Tensor:
    """(n, mean, M2, max|x|) of the valid tokens."""  # [4] fp64
    x, mask = call
    values, valid = x.float().contiguous(), None if mask is None else mask.contiguous()
    moments = torch.empty(4, dtype=torch.float64, device=x.device)
    _C.whiten_stats(values.data_ptr(), address(valid), x.numel(), moments.data_ptr(),
                    torch.get_num_threads())
    return moments


def fwd(call: WhitenCall) -> Tensor:
    """(x - mean) * rsqrt(var + eps), fp32, 0 where masked."""
    x, mask, moments, eps, unbiased, shift_mean = call
    values, valid = x.float().contiguous(), None if mask is None else mask.contiguous()
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    _C.whiten_fwd(values.data_ptr(), address(valid), x.numel(), moments.contiguous().data_ptr(),
                  float(eps), unbiased, shift_mean, out.data_ptr(), torch.get_num_threads())
    return out
