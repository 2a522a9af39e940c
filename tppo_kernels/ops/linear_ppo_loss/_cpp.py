"""`linear_ppo_loss` on the CPU: torch's products, and the row formulas in C++."""

from __future__ import annotations

import functools

from ..linear_logprobs._cpp import STEPS, supports
from . import reference

__all__ = ["bwd", "fwd", "supports"]

fwd = functools.partial(reference.fwd, steps=STEPS)
bwd = reference.bwd
