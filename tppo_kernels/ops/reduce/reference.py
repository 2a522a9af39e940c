"""The specification of `reduce` in plain PyTorch: the formula is `shares` of _math/sequence.py."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._core.check import Reduction
from ..._math.sequence import compute_dtype, select, shares


class ReduceCall(NamedTuple):
    """The arguments of the raw forward op."""

    x: Tensor  # [B, T] or [N]
    mask: Tensor | None  # [B, T] or [N] bool
    over: Reduction
    cu_seqlens: Tensor | None  # [B + 1] int32


class ReduceGradient(NamedTuple):
    """The arguments of the raw backward op."""

    grad: Tensor  # []
    scale: Tensor  # []
    mask: Tensor  # [B, T] or [N] bool; one True that is expanded where none was given
    over: Reduction
    cu_seqlens: Tensor | None  # [B + 1] int32
    dtype: torch.dtype  # of x


def fwd(call: ReduceCall) -> tuple[Tensor, Tensor]:
    """(Red(x) [], scale []); see `tppo_kernels.reduce`. dRed/dx = scale * c with c of `shares`."""
    dtype = compute_dtype(call.x)
    x = select(call.x, call.mask, dtype)
    mask = torch.ones_like(x, dtype=torch.bool) if call.mask is None else call.mask
    c, size = shares(mask, call.over, call.cu_seqlens, dtype)
    return (select(c * x, mask).sum(dtype=torch.float64) / size).to(dtype), size.reciprocal()


def bwd(backward: ReduceGradient) -> Tensor:
    """The gradient of x in its dtype, 0 where masked whatever comes in."""
    grad, scale, mask, over, cu_seqlens, dtype = backward
    c, _ = shares(mask, over, cu_seqlens, grad.dtype)
    return select(c * (grad * scale), mask).to(dtype).contiguous()
