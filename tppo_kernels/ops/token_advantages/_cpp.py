"""`token_advantages` on the CPU: the compiled parts of `gae` and `whiten`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._native import FP64
from ..._sequence import compute_dtype
from ..gae._cpp import fwd as gae
from ..whiten._cpp import fwd as whiten_fwd
from ..whiten._cpp import stats
from .reference import EPS, compose


def supports(tokens: Tensor, *rest: object) -> str | None:
    """The reason for refusing, or None; of `fwd` (values, log-probs: 1, 4, 5) and of `whiten`."""
    given = [x for x in (tokens, *rest[:1], *rest[3:5]) if isinstance(x, Tensor)]
    double = compute_dtype(*given) == torch.float64
    return FP64 if double else None


def fwd(*args) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `reference.compose`."""
    return compose(gae, stats, *args)


def whiten(advantages: Tensor, trained: Tensor | None, moments: Tensor, unbiased: bool) -> Tensor:
    """See `reference.whiten`."""
    eps = torch.tensor(EPS, dtype=torch.float64)
    return whiten_fwd(advantages, trained, moments, eps, unbiased, True)
