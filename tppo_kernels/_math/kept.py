"""What the forward pass of `linear_logprobs` keeps for its backward: the layout of two tensors.

stats [4 + blocks, M]: logprob, entropy, top and log_sum of each computed row, with
logsumexp(z) = top + log_sum; then one shift for each block of columns.
kept: "store": exponentials exp(z - shift) [M, v], times 2^15 in fp16; the shift is that of their
block, or without blocks top. Under a softcap the logits in their place, because tanh's slope
1 - tanh^2 is, where tanh is near 1, a difference that no rounded exponential holds.
"frozen": dlogprob/dhidden [M, D], unrounded. Otherwise empty [0].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .linear import LinearInputs, shard_of
from .sequence import compute_dtype

FP16_SCALE = 2.0 ** 15  # a kept fp16 exponential is normal down to e^-20
KEPT_BLOCK = 512  # columns whose exponentials have a maximum of their own on a GPU


class Stats(NamedTuple):
    """What backward knows of each row; top is that of this shard's columns, or of all."""

    logprobs: Tensor  # [R]
    entropy: Tensor  # [R]
    top: Tensor  # [R]
    log_sum: Tensor  # [R]
    shifts: Tensor | None = None  # [blocks, R]: of kept exponentials, in the place of top

    @staticmethod
    def of(stats: Tensor, first: int, last: int) -> Stats:
        """The columns first to last of the tensor [4 + blocks, M] that forward returns."""
        logprobs, entropy, top, log_sum, *shifts = stats[:, first:last].unbind()
        return Stats(logprobs, entropy, top, log_sum, stats[4:, first:last] if shifts else None)

    def put(self, stats: Tensor, first: int, last: int) -> None:
        """The reverse; without shifts of its own each block has `top`."""
        stats[:4, first:last] = torch.stack(self[:4])
        stats[4:, first:last] = self.top if self.shifts is None else self.shifts


def kept_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None,
               softcap: Tensor | None) -> torch.dtype:
    """Of the exponentials: that of hidden, but fp16 for bf16, because its eight bits cost the
    gradient of the entropy its accuracy; fp64 where that is computed in. Of logits under a softcap:
    that of the computation."""
    dtype = compute_dtype(hidden, weight, bias)
    if dtype == torch.float64 or softcap is not None:
        return dtype
    return torch.float16 if hidden.dtype == torch.bfloat16 else hidden.dtype


def blocks_of(columns: int, device: torch.device, softcap: Tensor | None = None) -> int:
    """How many shifts the kept exponentials of a row have: on a CPU they are relative to top, and
    logits under a softcap to nothing."""
    return 0 if device.type == "cpu" or softcap is not None else -(-columns // KEPT_BLOCK)


def empty_outputs(inputs: LinearInputs, slots: int, regime: str, *, by_blocks: bool = False
                  ) -> tuple[Tensor, Tensor]:
    """Zeroed stats, and memory for what a regime keeps of so many rows.

    by_blocks: exponentials have shifts on every device. Rows of logits begin at multiples of 16
    bytes, those of exponentials are [M, v].
    """
    hidden, softcap = inputs.hidden, inputs.scaling.softcap
    dtype = compute_dtype(hidden, inputs.weight, inputs.bias)
    blocks, kept = 0, hidden.new_empty(0)
    if regime == "frozen":
        kept = hidden.new_zeros((slots, hidden.shape[-1]), dtype=dtype)
    elif regime == "store":
        columns = shard_of(inputs).columns
        device = torch.device("cuda") if by_blocks else hidden.device
        blocks = blocks_of(columns, device, softcap)
        width = columns if softcap is None else columns + -columns % 4
        kept = hidden.new_empty((slots, width), dtype=kept_dtype(
            hidden, inputs.weight, inputs.bias, softcap))
    return hidden.new_zeros((4 + blocks, slots), dtype=dtype), kept
