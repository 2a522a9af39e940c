"""`token_advantages` on the CPU: the compiled walk of `gae` between vectorised passes."""

from __future__ import annotations

from torch import Tensor

from ..._sequence import compute_dtype
from ..gae._cpp import fwd as gae
from .reference import compose


def supports(token_rewards: Tensor, values: Tensor, mask: Tensor | None, train_mask: Tensor | None,
             logprobs: Tensor | None, ref_logprobs: Tensor | None, *_: object) -> str | None:
    """The reason for refusing, or None."""
    given = [x for x in (token_rewards, values, logprobs, ref_logprobs) if x is not None]
    return "fp64 is computed by the reference only" if compute_dtype(*given).itemsize == 8 else None


def fwd(*args) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `reference.compose`."""
    return compose(gae, *args)
