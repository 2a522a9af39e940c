"""`entropy` in Triton: the kernels of `token_logprobs` without targets."""

from __future__ import annotations

from torch import Tensor

from ..token_logprobs import _triton
from ..token_logprobs._triton import bwd, supports
from ..token_logprobs.reference import EntropyCall

__all__ = ["bwd", "fwd", "supports"]


def fwd(call: EntropyCall) -> tuple[Tensor, ...]:
    """(entropy, top, log_sum), fp32; see `reference.fwd`."""
    return _triton.fwd(call)[1:]
