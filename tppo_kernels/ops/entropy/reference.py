"""The specification of `entropy`: that of `token_logprobs` without its log-probs."""

from __future__ import annotations

from torch import Tensor

from ..token_logprobs import reference
from ..token_logprobs.reference import EntropyCall, EntropyGradient


def fwd(call: EntropyCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(nothing [0], entropy, top, log_sum): see the `fwd` that computes them, log-probs first."""
    _, entropy, top, log_sum = reference.fwd(call)
    return entropy.new_empty(0), entropy, top, log_sum


def bwd(backward: EntropyGradient) -> Tensor:
    """The gradient of the logits, in their dtype, contiguous; 0 in masked rows and dead columns."""
    return reference.bwd(backward)
