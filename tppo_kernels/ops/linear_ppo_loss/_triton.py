"""`linear_ppo_loss` on a GPU: cuBLAS's products, and the formulas of a row in Triton."""

from __future__ import annotations

import functools

from ..linear_logprobs._triton import STEPS, supports
from . import _chunked

__all__ = ["bwd", "fwd", "supports"]

fwd = functools.partial(_chunked.fwd, steps=STEPS)
bwd = _chunked.bwd
