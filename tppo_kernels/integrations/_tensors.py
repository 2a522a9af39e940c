"""What an adapter asks of tensors before it answers: are they what our operators take.

A trainer's function takes more: it broadcasts, weights by its mask, and has gradients with respect
to what is data to us. For such a call an adapter asks the trainer's own function.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mask_of(mask: Tensor) -> Tensor | None:
    """A mask of bool, or of 0 and 1 in another dtype, as bool; None where it weights instead."""
    if mask.dtype == torch.bool:
        return mask
    narrow = mask.to(torch.uint8)  # one pass over eight bytes a token; the rest is of one byte
    if narrow.numel() and int(narrow.max()) > 1:
        return None
    if mask.is_floating_point() and not torch.equal(narrow.to(mask.dtype), mask):
        return None
    return narrow.view(torch.bool)


def has_gap(mask: Tensor) -> bool:
    """Whether something valid stands behind a masked slot of its row; mask: [B, T] bool."""
    rises = (mask[:, 1:] > mask[:, :-1]).view(torch.uint8)
    return rises.numel() > 0 and bool(rises.max())  # a maximum of bytes is faster than `any`


def plain(x: Tensor) -> bool:
    """Whether a tensor is no DTensor, nested or other kind, on a device that the operators know."""
    return type(x) in (Tensor, torch.nn.Parameter) and x.device.type in ("cpu", "cuda")


def floats(*tensors: Tensor) -> bool:
    """Whether tensors are plain ones of floats."""
    return all(plain(x) and x.is_floating_point() for x in tensors)


def alike(*tensors: Tensor) -> bool:
    """Whether tensors have one shape."""
    return all(x.shape == tensors[0].shape for x in tensors)


def differentiated(*tensors: Tensor | None) -> bool:
    """Whether a gradient is asked for with respect to one of them."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
