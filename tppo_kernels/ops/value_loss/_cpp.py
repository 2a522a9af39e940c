"""`value_loss` on the CPU: one pass over the tokens, vectorised, spread over torch's threads."""

from __future__ import annotations

import torch
from torch import Tensor

import tppo_kernels._C as _C

from ..._kernels.losses import (
    DTYPES,
    arrange,
    column_tuples,
    layout_tuple,
    like_slopes,
    pair,
    scalar_tuple,
    share_of,
    share_tuple,
    supports,
)
from . import reference

__all__ = ["Call", "bwd", "fwd", "supports"]

METRICS = 6
NO_CLIP = -1.0


class Call:
    """The C++ struct ValueBatch of a call, the results that it fills, and what it points to."""

    def __init__(self, values: Tensor, returns: Tensor, mask: Tensor | None,
                 old_values: Tensor | None, clip: Tensor | None, num_tokens: Tensor | None,
                 num_sequences: Tensor | None, norm_length: Tensor | None,
                 cu_seqlens: Tensor | None, reduction: str, grad: bool):
        share = share_of(reduction, num_tokens, num_sequences, norm_length, values)
        columns = (values, returns, None if clip is None else old_values)
        batch = arrange(columns, mask, cu_seqlens, share.of_sequences)
        alive: list[Tensor | None] = []

        def empty(size) -> Tensor:
            return torch.empty(size, dtype=torch.float32, device=values.device)

        self.loss, self.metrics, self.scale = empty(()), empty(METRICS), empty(())
        self.dvalues = empty(values.shape if grad else 0)
        out = [self.dvalues.data_ptr() if grad else 0, self.loss.data_ptr(),
               self.metrics.data_ptr(), self.scale.data_ptr()]
        self.alive = (batch, alive)
        unclipped = clip is None or old_values is None
        self.arguments = (layout_tuple(batch), column_tuples(batch),
                          scalar_tuple(pair(None if unclipped else clip, NO_CLIP), alive),
                          share_tuple(share, alive), out)

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `reference.fwd` returns."""
        return self.loss, self.dvalues, self.metrics, self.scale


def fwd(values: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, dvalues, metrics, scale), fp32; see `reference.fwd`."""
    if values.numel() == 0:
        return reference.fwd(values, *arguments)
    call = Call(values, *arguments)
    _C.value_loss_fwd(*call.arguments, torch.get_num_threads())
    return call.results()


def bwd(grad_loss: Tensor, scale: Tensor, dvalues: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of values in their dtype; see `reference.bwd`."""
    slopes, out = like_slopes(dvalues, dtype)
    _C.loss_bwd((slopes.data_ptr(), slopes.numel(), DTYPES[dtype], out.data_ptr()),
                float(grad_loss) * float(scale), torch.get_num_threads())
    return out
