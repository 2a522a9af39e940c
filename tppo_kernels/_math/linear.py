"""What a call of the two linear operators is about: the head, the rows, the part of the vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor


class Scaling(NamedTuple):
    """How logits x become z = softcap tanh(logit_scale x / softcap) / temperature."""

    temperature: Tensor  # [], or [...]: one a row
    softcap: Tensor | None  # []
    logit_scale: Tensor  # []

    def factor(self) -> Tensor:
        """dz/dx where there is no softcap: 0-d in fp64, or [R, 1] in the dtype of a temperature
        that has one number a row."""
        t = self.temperature
        return self.logit_scale.double() / (t[:, None] if t.dim() else t)


class LinearInputs(NamedTuple):
    """hidden @ weight.T + bias, which rows of it are computed, and in how many bytes at a time."""

    hidden: Tensor  # [..., D]
    weight: Tensor  # [V, D], or [V / W, D] of a group
    targets: Tensor  # [...] int64 or int32
    mask: Tensor | None  # [...] bool
    bias: Tensor | None  # [V]
    rows: Tensor | None  # [M] int64
    scaling: Scaling
    valid_vocab: int | None  # columns from here on are dead
    capacity: int | None
    budget: int  # bytes for logits and their gradient
    group: str | None  # name of the process group that shares the vocabulary


class Shard(NamedTuple):
    """The live columns of this process's part of the vocabulary."""

    first: int  # the global number of its first column
    columns: int  # v: how many are live
    total: int  # live columns of all parts


def process_group(name: str | None) -> Any:
    """The process group of a name, because raw ops take the name; None for None."""
    given: Any = name
    return None if name is None else dist.distributed_c10d._resolve_process_group(given)


def shard_of(inputs: LinearInputs) -> Shard:
    """Parts are equal, in the order of ranks; columns >= valid_vocab are dead."""
    size, rank, world = inputs.weight.shape[0], 0, 1
    if inputs.group is not None:
        group = process_group(inputs.group)
        rank, world = dist.get_rank(group), dist.get_world_size(group)
    total = size * world if inputs.valid_vocab is None else inputs.valid_vocab
    return Shard(rank * size, max(0, min(size, total - rank * size)), total)


def slot_count(n: int, rows: Tensor | None, capacity: int | None) -> int:
    """M, the number of rows that the linear operators compute and keep of n."""
    if rows is not None:
        return rows.shape[0]
    return n if capacity is None else capacity
