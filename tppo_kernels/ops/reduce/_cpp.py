"""`reduce` on the CPU: one pass over the tokens, vectorised, spread over torch's threads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import tppo_kernels._C as _C

from ..._kernels import structs
from ..._kernels.losses import arrange, share_of
from ..._kernels.memory import DTYPES, FP64
from ..._kernels.structs import Column, Layout, Share
from . import reference
from .reference import ReduceCall, ReduceGradient


def supports(call: ReduceCall | ReduceGradient) -> str | None:
    """The reason for refusing, or None."""
    dtype = call.x.dtype if isinstance(call, ReduceCall) else call.dtype
    return FP64 if dtype == torch.float64 else None


class ReduceBatch(NamedTuple):
    """The struct of csrc/reduce.h, of those of csrc/loss.h; results are addresses."""

    layout: Layout
    x: Column  # [B, T] or [N]
    share: Share
    total: int  # []
    scale: int  # []


class ReduceShares(NamedTuple):
    """The struct of csrc/reduce.h for backward."""

    layout: Layout
    by_length: bool
    dtype: int  # of `out`, of DTYPES
    out: int  # [B, T] or [N]


def fwd(call: ReduceCall) -> tuple[Tensor, Tensor]:
    """(total, scale), fp32; see `reference.fwd`."""
    x, mask, over, cu_seqlens = call
    if x.numel() == 0:
        return reference.fwd(call)
    share = share_of(over, x)
    batch = arrange((x,), mask, cu_seqlens, share.of_sequences)
    alive: list[Tensor | None] = []
    total, scale = (torch.empty((), dtype=torch.float32, device=x.device) for _ in range(2))
    of_x, = structs.columns(batch)
    _C.reduce_fwd(ReduceBatch(structs.layout(batch), of_x, structs.share(share, alive),
                              total.data_ptr(), scale.data_ptr()), torch.get_num_threads())
    return total, scale


def bwd(backward: ReduceGradient) -> Tensor:
    """The gradient of x in its dtype; see `reference.bwd`."""
    grad, scale, mask, over, cu_seqlens, dtype = backward
    out = torch.empty(mask.shape, dtype=dtype, device=mask.device)
    if out.numel() == 0:
        return out
    by_length = share_of(over, mask).by_length
    batch = arrange((mask,), mask, cu_seqlens, by_length)
    _C.reduce_bwd(ReduceShares(structs.layout(batch), by_length, DTYPES[dtype], out.data_ptr()),
                  float(grad) * float(scale), torch.get_num_threads())
    return out
