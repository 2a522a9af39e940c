"""What the compiled backends share: numbers of dtypes, addresses of tensors, and what they leave to
the reference."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Dtype of csrc/kernels.h
FP64 = "fp64 is computed in plain torch only"


def refuses_fp64(call: tuple) -> str | None:
    """The reason for refusing, where one of a record's fields is a tensor of fp64 with a size."""
    for x in call:
        if x is not None and isinstance(x, Tensor) and x.dtype == torch.float64 and x.dim():
            return FP64
    return None


def supports(call: tuple) -> str | None:
    """The reason for refusing, or None: of operators whose records begin with the values of tokens,
    then their mask or a second value."""
    return FP64 if any(x is not None and x.dtype == torch.float64 for x in call[:2]) else None


def address(x: Tensor | None) -> int:
    """Where a tensor's data lies; 0 for none."""
    return 0 if x is None else x.data_ptr()


def per_sequence(x: Tensor | None, batch: int, like: Tensor) -> Tensor:
    """A 0-d or [B] argument, or zeros, as a dense fp32 [B] on the device of `like`."""
    zeros = torch.zeros(batch, dtype=torch.float32, device=like.device)
    return zeros if x is None else (zeros + x.detach().to(torch.float32)).contiguous()
