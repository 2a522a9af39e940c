"""`value_loss` on the CPU: one pass over the tokens, vectorised, spread over torch's threads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import tppo_kernels._C as _C

from ..._kernels import structs
from ..._kernels.losses import arrange, like_slopes, pair, share_of, supports
from ..._kernels.structs import Column, Layout, Scalar, Share
from . import reference
from .reference import ValueLossCall, ValueLossGradient

__all__ = ["Batch", "bwd", "fwd", "supports"]

METRICS = 6
NO_CLIP = -1.0


class ValueBatch(NamedTuple):
    """The struct of csrc/value_loss.h, of those of csrc/loss.h; results are addresses."""

    layout: Layout
    values: Column  # [B, T] or [N]
    returns: Column  # [B, T] or [N]
    old_values: Column  # [B, T] or [N]
    clip: Scalar
    share: Share
    dvalues: int  # [N]
    loss: int  # []
    metrics: int  # [6]
    scale: int  # []


class Batch:
    """The struct of a call, the results that it fills, and what it points to."""

    def __init__(self, call: ValueLossCall):
        values, returns, mask, old_values, clip, reduction, cu_seqlens, grad = call
        share = share_of(reduction, values)
        columns = (values, returns, None if clip is None else old_values)
        batch = arrange(columns, mask, cu_seqlens, share.of_sequences)
        alive: list[Tensor | None] = []

        def empty(size) -> Tensor:
            return torch.empty(size, dtype=torch.float32, device=values.device)

        self.loss, self.metrics, self.scale = empty(()), empty(METRICS), empty(())
        self.dvalues = empty(values.shape if grad else 0)
        self.alive = (batch, alive)
        unclipped = clip is None or old_values is None
        of_values, of_returns, of_old = structs.columns(batch)
        self.struct = ValueBatch(
            structs.layout(batch), of_values, of_returns, of_old,
            structs.scalar(pair(None if unclipped else clip, NO_CLIP), alive),
            structs.share(share, alive), self.dvalues.data_ptr() if grad else 0,
            self.loss.data_ptr(), self.metrics.data_ptr(), self.scale.data_ptr())

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `reference.fwd` returns."""
        return self.loss, self.dvalues, self.metrics, self.scale


def fwd(call: ValueLossCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, dvalues, metrics, scale), fp32; see `reference.fwd`."""
    if call.values.numel() == 0:
        return reference.fwd(call)
    batch = Batch(call)
    _C.value_loss_fwd(batch.struct, torch.get_num_threads())
    return batch.results()


def bwd(call: ValueLossGradient) -> Tensor:
    """The gradient of values in their dtype; see `reference.bwd`."""
    grad_loss, scale, dvalues, dtype = call
    slopes, out = like_slopes(dvalues, dtype)
    _C.loss_bwd(structs.slopes(slopes, out), float(grad_loss) * float(scale),
                torch.get_num_threads())
    return out
