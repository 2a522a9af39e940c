"""`token_advantages` on the CPU: the compiled parts of `gae` and `whiten`."""

from __future__ import annotations

from ..gae._cpp import fwd as gae
from ..whiten._cpp import fwd as whiten_fwd
from ..whiten._cpp import stats
from ._composed import composed, supports

__all__ = ["fwd", "supports", "whiten"]

fwd, whiten = composed(gae, stats, whiten_fwd)
