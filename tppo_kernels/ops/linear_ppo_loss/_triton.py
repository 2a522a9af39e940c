"""`linear_ppo_loss` on a GPU: cuBLAS's products, and the row formulas in Triton."""

from __future__ import annotations

import functools

from ..linear_logprobs._triton import STEPS, supports
from . import reference

__all__ = ["bwd", "fwd", "supports"]

fwd = functools.partial(reference.fwd, steps=STEPS)
bwd = reference.bwd
