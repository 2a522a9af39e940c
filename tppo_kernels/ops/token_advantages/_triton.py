"""`token_advantages` in Triton: `gae` and `whiten` composed, where there is no compiled part."""

from __future__ import annotations

from ..gae._triton import fwd as gae
from ..whiten._triton import fwd as whiten_fwd
from ..whiten._triton import stats
from ._composed import composed, supports

__all__ = ["fwd", "supports", "whiten"]

fwd, whiten = composed(gae, stats, whiten_fwd)
