"""`token_advantages` in Triton: `gae` and `whiten` composed, where there is no compiled part."""

from __future__ import annotations

import torch
from torch import Tensor

from ..gae._triton import fwd as gae
from ..whiten._triton import fwd as whiten_fwd
from ..whiten._triton import stats
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
