"""`entropy` on the CPU: the kernels of `token_logprobs`, without targets."""

from __future__ import annotations

from ..token_logprobs._cpp import bwd, fwd, supports

__all__ = ["bwd", "fwd", "supports"]
