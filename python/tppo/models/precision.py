"""How far two readings of one model may lie apart, by the type of its weights.

docs/precision.md derives the bound and says what was measured.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

ROUNDINGS = 18  # roundings a layer: each of two sublayers rounds its sum and about eight products


def dtype_name(dtype: torch.dtype) -> str:
    """A type of numbers as users write it: float32."""
    return str(dtype).removeprefix("torch.")


def rounding_error(model: Any, passes: int = 1) -> float:
    """Root mean square by which two readings in 16 bits differ, over that of what is read.

        sqrt(2) * u * sqrt(18 * layers * passes / 3)

    u is the unit roundoff of the type (bfloat16: 2^-8), each rounding adds an independent relative
    error of variance u^2 / 3, and a backward pass counts as a second pass.  Readings of the same
    rows in batches of one shape are equal to the bit; this is for those in batches of two shapes,
    whose sums are added up in different orders.
    """
    unit = torch.finfo(model.dtype).eps / 2
    layers = model.config.get_text_config().num_hidden_layers
    return math.sqrt(2) * unit * math.sqrt(ROUNDINGS * layers * passes / 3)


def relative_rms(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of `expected`."""
    scale = expected.double().square().mean().sqrt().item()
    error = (found.double() - expected.double()).square().mean().sqrt().item()
    return error / max(scale, torch.finfo(torch.float32).tiny)
