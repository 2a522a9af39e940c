"""`token_advantages` on the CPU: the compiled parts of `gae` and `whiten`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..gae._cpp import fwd as gae
from ..whiten._cpp import fwd as whiten_fwd
from ..whiten._cpp import stats
from .reference import EPS, compose
from .reference import refuse_fp64 as supports

__all__ = ["fwd", "supports", "whiten"]


def fwd(*args) -> tuple[Tensor, ...]:
    """See `reference.compose`."""
    return compose(gae, stats, whiten, *args)


def whiten(advantages: Tensor, trained: Tensor | None, moments: Tensor, unbiased: bool) -> Tensor:
    """See `reference.whiten`."""
    eps = torch.tensor(EPS, dtype=torch.float64)
    return whiten_fwd(advantages, trained, moments, eps, unbiased, True)
