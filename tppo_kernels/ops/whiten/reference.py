"""The specification of `whiten` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._math.sequence import compute_dtype, on, select

TINY = 1e-6  # spread below this share of max|x| is rounding, not signal


def stats(x: Tensor, mask: Tensor | None) -> Tensor:
    """(n, mean, M2, max|x|) of the valid tokens in two passes.

    The second pass also corrects the rounding of the first: with m the rounded mean and
    d = x - m, the mean is m + sum(d)/n and M2 = sum(d^2) - sum(d)^2/n.
    """  # [4] fp64
    x = select(x, mask, compute_dtype(x))
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


def fwd(x: Tensor, mask: Tensor | None, moments: Tensor, eps: Tensor, unbiased: bool,
        shift_mean: bool) -> Tensor:
    """(x - mean) * rsqrt(var + eps), and the mean again where it stays; 0 where masked."""
    dtype = compute_dtype(x)
    n, mean, m2, largest = moments.unbind()
    var = m2 / (n - int(unbiased)).clamp(min=1)
    flat = (n < 2) | (var <= (TINY * largest).square())
    zero = torch.zeros_like(mean)
    scale = torch.where(flat, zero, torch.rsqrt(var + on(eps, var)))
    high = mean.to(dtype)  # the mean in two parts: an fp32 mean alone would shift every result
    rest = (zero if shift_mean else mean) - (mean - high) * scale
    return select((select(x, mask, dtype) - high) * scale.to(dtype) + rest.to(dtype), mask)
