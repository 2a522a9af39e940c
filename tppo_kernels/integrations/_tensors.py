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
    if mask.is_floating_point():
        valid = mask != 0
        return valid if bool((mask == valid).all()) else None
    if mask.numel():  # comparing whole numbers with bools converts them: five times the time
        low, high = mask.aminmax()
        if bool((low < 0) | (high > 1)):
            return None
    return mask.bool()


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
