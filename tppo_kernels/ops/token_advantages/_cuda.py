"""`token_advantages` on an NVIDIA GPU: the compiled walk of `gae` between vectorised passes."""

from __future__ import annotations

from torch import Tensor

from ..gae._cuda import fwd as gae
from ..whiten.reference import stats
from ._cpp import supports
from .reference import compose, whiten

__all__ = ["fwd", "supports", "whiten"]


def fwd(*args) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `reference.compose`."""
    return compose(gae, stats, *args)
