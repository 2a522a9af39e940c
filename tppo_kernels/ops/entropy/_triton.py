"""`entropy` in Triton: the kernels of `token_logprobs`, without targets."""

from __future__ import annotations

from ..token_logprobs._triton import bwd, fwd, supports

__all__ = ["bwd", "fwd", "supports"]
