"""`ppo_loss` on an NVIDIA GPU through the compiled extension: forward and backward, a launch each.

Forward is cooperative: behind its barrier one block adds up the sums of all.
"""

from __future__ import annotations

import torch
from torch import Tensor

import tppo_kernels._C as _C

from ..._kernels import structs
from ..._kernels.launch import current_stream, launching_on
from ..._kernels.losses import like_slopes, supports, workspace
from . import reference
from ._cpp import Call
from .reference import PolicyLossCall, PolicyLossGradient

__all__ = ["bwd", "fwd", "supports"]


def fwd(call: PolicyLossCall) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, dlogprobs, dentropy, metrics, scale), fp32; see `reference.fwd`."""
    logprobs = call.logprobs
    if logprobs.numel() == 0:
        return reference.fwd(call)
    with launching_on(logprobs):
        given = Call(call)
        sums = workspace(logprobs)
        _C.ppo_loss_fwd_cuda(given.struct, sums.data_ptr(), current_stream(logprobs))
    return given.results()


def bwd(call: PolicyLossGradient) -> tuple[Tensor, Tensor]:
    """The gradients in the inputs' dtypes, both in one launch; see `reference.bwd`."""
    slopes, dlogprobs = like_slopes(call.dlogprobs, call.logprobs_dtype)
    entropy_slopes, dentropy = like_slopes(call.dentropy, call.entropy_dtype)
    grad_loss = call.grad_loss.to(torch.float32)
    with launching_on(slopes):
        _C.loss_bwd_cuda(
            structs.slopes(slopes, dlogprobs), structs.slopes(entropy_slopes, dentropy),
            grad_loss.data_ptr(), call.scale.data_ptr(), current_stream(slopes))
    return dlogprobs, dentropy
