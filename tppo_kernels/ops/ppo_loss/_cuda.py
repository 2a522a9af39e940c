"""`ppo_loss` on an NVIDIA GPU through the compiled extension: forward and backward, a launch each.

Forward is cooperative: behind its barrier one block adds up the sums of all.
"""

from __future__ import annotations

import torch
from torch import Tensor

import tppo_kernels._C as _C

from ..._kernels.launch import current_stream, launching_on
from ..._kernels.losses import DTYPES, like_slopes, supports, workspace
from . import reference
from ._cpp import Call

__all__ = ["bwd", "fwd", "supports"]


def fwd(logprobs: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, dlogprobs, dentropy, metrics, scale), fp32; see `reference.fwd`."""
    if logprobs.numel() == 0:
        return reference.fwd(logprobs, *arguments)
    with launching_on(logprobs):
        call = Call(logprobs, *arguments)
        room = workspace(logprobs)
        _C.ppo_loss_fwd_cuda(*call.arguments, room.data_ptr(), current_stream(logprobs))
    return call.results()


def bwd(grad_loss: Tensor, scale: Tensor, dlogprobs: Tensor, dentropy: Tensor,
        logprobs_dtype: torch.dtype, entropy_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The gradients in the inputs' dtypes, both in one launch; see `reference.bwd`."""
    slopes, dlogprobs = like_slopes(dlogprobs, logprobs_dtype)
    entropy_slopes, dentropy = like_slopes(dentropy, entropy_dtype)
    grad_loss = grad_loss.to(torch.float32)
    with launching_on(slopes):
        _C.loss_bwd_cuda(
            (slopes.data_ptr(), slopes.numel(), DTYPES[logprobs_dtype], dlogprobs.data_ptr()),
            (entropy_slopes.data_ptr(), entropy_slopes.numel(), DTYPES[entropy_dtype],
             dentropy.data_ptr()),
            grad_loss.data_ptr(), scale.data_ptr(), current_stream(slopes))
    return dlogprobs, dentropy
