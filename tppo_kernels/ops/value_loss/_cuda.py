"""`value_loss` on an NVIDIA GPU through the compiled extension: forward and backward, a launch
each. Forward is cooperative: behind its barrier one block adds up the sums of all."""

from __future__ import annotations

import torch
from torch import Tensor

import tppo_kernels._C as _C

from ..._kernels import structs
from ..._kernels.launch import current_stream, launching_on
from ..._kernels.losses import like_slopes, supports, workspace
from . import reference
from ._cpp import Batch
from .reference import ValueLossCall, ValueLossGradient

__all__ = ["bwd", "fwd", "supports"]


def fwd(call: ValueLossCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, dvalues, metrics, scale), fp32; see `reference.fwd`."""
    values = call.values
    if values.numel() == 0:
        return reference.fwd(call)
    with launching_on(values):
        batch = Batch(call)
        sums = workspace(values)
        _C.value_loss_fwd_cuda(batch.struct, sums.data_ptr(), current_stream(values))
    return batch.results()


def bwd(call: ValueLossGradient) -> Tensor:
    """The gradient of values in their dtype; see `reference.bwd`."""
    grad_loss, scale, dvalues, dtype = call
    slopes, out = like_slopes(dvalues, dtype)
    grad_loss = grad_loss.to(torch.float32)
    with launching_on(slopes):
        _C.loss_bwd_cuda(structs.slopes(slopes, out), structs.NO_SLOPES, grad_loss.data_ptr(),
                         scale.data_ptr(), current_stream(slopes))
    return out
