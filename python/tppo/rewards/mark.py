"""What tells a reward that is a model from the same with other weights."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def weights_mark(model: nn.Module) -> str:
    """Changes where a weight does."""
    mark = hashlib.sha256()
    for tensor in model.state_dict().values():
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        mark.update(flat.view(torch.uint8).numpy().tobytes())
    return mark.hexdigest()[:12]
