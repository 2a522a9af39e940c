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
