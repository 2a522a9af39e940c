"""Which sequence a packed token belongs to: checks and references both need it."""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_index(n: int, cu_seqlens: Tensor) -> Tensor:
    """The sequence of each packed token."""  # [N]
    tokens = torch.arange(n, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True)
