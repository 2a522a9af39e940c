"""The specification of `whiten` in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._math.sequence import compute_dtype, on, select

TINY = 1e-6  # spread below this share of max|x| is rounding, not signal


class WhitenStats(NamedTuple):
    """The arguments of a raw call for the statistics; the tensors are of one shape."""

    x: Tensor  # [...]
    mask: Tensor | None  # [...] bool


class WhitenCall(NamedTuple):
    """The arguments of a raw call that whitens by given statistics."""

    x: Tensor  # [...]
    mask: Tensor | None  # [...] bool
    moments: Tensor  # [4] fp64: n, mean, M2, max|x|
    eps: Tensor  # []
    unbiased: bool
    shift_mean: bool


def stats(call: WhitenStats) -> Tensor:
    """(n, mean, M2, max|x|) of the valid tokens in two passes.

    The second pass also corrects the rounding of the first: with m the rounded mean and
    d = x - m, the mean is m + sum(d)/n and M2 = sum(d^2) - sum(d)^2/n.
    """  # [4] fp64
    mask = call.mask
    x = select(call.x, mask, compute_dtype(call.x))
    if x.numel() == 0:
        return torch.zeros(4, dtype=torch.float64, device=x.device)
    n = torch.full((), x.numel(), dtype=torch.float64, device=x.device)
    n = n if mask is None else mask.sum().double()
    least_one = n.clamp(min=1)
    m = (x.sum() / least_one).to(x.dtype)
    d = select(x - m, mask)
    drift = d.sum().double()
    m2 = (d * d).sum().double() - drift * drift / least_one
    return torch.stack([n, m.double() + drift / least_one, m2.clamp(min=0), x.abs().max().double()])


def merge(parts: Tensor) -> Tensor:
    """The statistics of a union from those of its parts (Chan et al. 1979)."""  # [W, 4] -> [4]
    n, mean, m2, largest = parts.unbind(1)
    total = n.sum()
    common = (n * mean).sum() / total.clamp(min=1)
    spread = (m2 + n * (mean - common).square()).sum()
    return torch.stack([total, common, spread, largest.max()])


def fwd(call: WhitenCall) -> Tensor:
    """(x - mean) * rsqrt(var + eps), and the mean again where it stays; 0 where masked."""
    x, mask, moments, eps, unbiased, shift_mean = call
    dtype = compute_dtype(x)
    n, mean, m2, largest = moments.unbind()
    var = m2 / (n - int(unbiased)).clamp(min=1)
    flat = (n < 2) | (var <= (TINY * largest).square())
    zero = torch.zeros_like(mean)
    scale = torch.where(flat, zero, torch.rsqrt(var + on(eps, var)))
    high = mean.to(dtype)  # the mean in two parts: an fp32 mean alone would shift every result
    rest = (zero if shift_mean else mean) - (mean - high) * scale
    return select((select(x, mask, dtype) - high) * scale.to(dtype) + rest.to(dtype), mask)
