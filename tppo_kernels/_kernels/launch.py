"""What the GPU backends share: where a launch runs, and how a scalar reaches it."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor

_HERE: AbstractContextManager = contextlib.nullcontext()


def scalar(x: Tensor) -> tuple[float, Tensor | None]:
    """A 0-d tensor as (its value, None) on the CPU, or (0.0, itself in fp32) on a GPU.

    A kernel takes both and reads the pointer where there is one: neither a host synchronisation
    nor a launch that fills memory, which graph capture and the launch count forbid.
    """
    if x.is_cpu:
        return x.item(), None
    return 0.0, x if x.dtype == torch.float32 else x.to(torch.float32)


def launching_on(x: Tensor) -> AbstractContextManager:
    """Makes the device of x the current one, of which Triton and `current_stream` take theirs."""
    if x.is_cpu or x.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(x.device)


def current_stream(x: Tensor) -> int:
    """The stream that a compiled kernel is launched on; 0 on the CPU, where tests emulate one."""
    return 0 if x.is_cpu else torch.cuda.current_stream().cuda_stream


def row_layout(x: Tensor) -> tuple[Tensor, int, int, int]:
    """(x, inner, outer, stride): row i of [..., D] at i // inner * outer + i % inner * stride.

    Rows of a batch sliced as x[:, 3:-1] are so read in place; where the numbers of a row do not lie
    together, or leading sizes do not fold into two, x is copied.
    """
    D = x.shape[-1]
    if x.is_contiguous():
        return x, 1, D, D
    x = x if D == 1 or x.stride(-1) == 1 else x.contiguous()
    x = x.reshape(1, 1, D) if x.dim() == 1 else x[None] if x.dim() == 2 else x.flatten(0, -3)
    return x, x.shape[1], x.stride(0), x.stride(1)
