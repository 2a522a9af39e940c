"""`entropy` on the CPU: the kernels of `token_logprobs` without targets."""

from __future__ import annotations

from torch import Tensor

from ..token_logprobs import _cpp
from ..token_logprobs._cpp import bwd, supports
from ..token_logprobs.reference import EntropyCall

__all__ = ["bwd", "fwd", "supports"]


def fwd(call: EntropyCall) -> tuple[Tensor, ...]:
    """(entropy, top, log_sum), fp32; see `reference.fwd`."""
    return _cpp.fwd(call)[1:]
