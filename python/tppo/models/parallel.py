"""Several processes that train one model, a device each: `torchrun ... -m tppo train`.

Every process holds all models.  The work on the responses of a step is shared out, and what came of
it is exchanged, so that all of them hold the same experience and take the same optimiser step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_map_only

from tppo.environment import processes, whole

T = TypeVar("T")


class World(NamedTuple):
    """The processes, and which of them this one is; by default there is no other."""

    rank: int = 0
    size: int = 1

    def exchanged(self, own: T) -> list[T]:
        """What each process gives, in the order of ranks; of several, tensors come to the CPU."""
        if self.size == 1:
            return [own]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, tree_map_only(torch.Tensor, torch.Tensor.cpu, own))
        return found

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Each gradient becomes the sum of those of all processes, to the same bits in each."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.requires_grad:
                if parameter.grad is None:  # this process had no part of the minibatch
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)

    def of_first(self, own: T | None) -> T:
        """What the first process gives; the others wait for it."""
        found: list[Any] = [own]
        if self.size > 1:
            dist.broadcast_object_list(found)
        return found[0]


ALONE = World()


def from_environment() -> World:
    """The place of this process among those that torchrun started."""
    return World(*processes())


@contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """`from_environment`, and inside the block the processes can talk to each other."""
    world = from_environment()
    if world.size == 1:
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(whole("LOCAL_RANK", 0, torch.cuda.device_count()))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield world
    finally:
        dist.destroy_process_group()
