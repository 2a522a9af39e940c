"""Metrics for a logger: numbers of Python, read from the device at once."""

from __future__ import annotations

import torch
from torch import Tensor


def floats(values: dict[str, Tensor]) -> dict[str, float]:
    """The 0-d tensors as floats, by one read on the host."""
    numbers = torch.stack([x.detach().double() for x in values.values()]).tolist()
    return dict(zip(values, numbers, strict=True))
