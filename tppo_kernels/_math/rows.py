"""Which rows of a batch are valid, found on the host."""

from __future__ import annotations

from torch import Tensor

from .._core.check import Check
from .._core.keywords import suggests


@suggests
def valid_rows(
        mask: Tensor,  # [...] bool or whole numbers
) -> Tensor:
    """The flat positions of the True tokens of a mask, ascending: int64 [n_valid].

    mask: bool, or whole numbers (0 is not valid), of any shape. The size of the result is read on
    the host: call it once a batch, outside `torch.compile` and graph capture, and give it to the
    linear operators as `rows`.
    """
    check = Check("valid_rows")
    if mask is None:
        check.tensor("mask", mask, "...")
    mask = check.mask("mask", mask, "...")
    return mask.reshape(-1).nonzero()[:, 0]
