"""`linear_ppo_loss` on the CPU: torch's products, and the formulas of a row in C++."""

from __future__ import annotations

import functools

from ..linear_logprobs._cpp import STEPS, supports
from . import _chunked

__all__ = ["bwd", "fwd", "supports"]

fwd = functools.partial(_chunked.fwd, steps=STEPS)
bwd = _chunked.bwd
