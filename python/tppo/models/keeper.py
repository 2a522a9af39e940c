"""What long work keeps on the way, so that a process that is killed does not cost all of it.

The work counts steps of whatever kind (optimiser steps, batches of answers), and offers after each
what the rest depends on; where and how often that is written is the matter of who keeps it
(`tppo.store.checkpoint.Checkpoints` on the disk).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from tppo.models.policy import load_trained, trained_state


class Kept(Protocol):
    """What was kept after a step."""

    @property
    def step(self) -> int: ...
    @property
    def weights(self) -> Mapping[str, dict[str, Tensor]]: ...
    @property
    def optimizer(self) -> dict[str, Any]: ...
    @property
    def state(self) -> dict[str, Any]: ...


class Rest(NamedTuple):
    """What the steps that are still to do depend on."""

    weights: Mapping[str, Mapping[str, Tensor]]
    """By name: of models, or any other tensors."""
    optimizer: dict[str, Any]
    state: dict[str, Any]
    """What JSON can hold."""


class Keeper(Protocol):
    """Keeps the newest of what it is offered."""

    def newest(self, steps: int) -> Kept | None:
        """What an earlier process has left of this work, which has so many steps."""

    def after(self, step: int, steps: int, rest: Callable[[], Rest]) -> None:
        """A step is done; `rest` is called where it is time to write.

        Errors: Stopped, after it was written, where a signal has asked the process to end.
        """


class NothingKept:
    """For work that nobody resumes."""

    def newest(self, steps: int) -> None:
        """Nothing."""

    def after(self, step: int, steps: int, rest: Callable[[], Rest]) -> None:
        """Nothing."""


NOTHING_KEPT = NothingKept()


def resumed(keeper: Keeper, steps: int, model: nn.Module, optimizer: Any) -> Kept | None:
    """What was kept of a training; model and optimiser are then as they were."""
    kept = keeper.newest(steps)
    if kept is not None:
        load_trained(model, kept.weights["model"])
        optimizer.load_state_dict(kept.optimizer)
    return kept


def rest_of(
    model: nn.Module, optimizer: Any, state: dict[str, Any], **tensors: dict[str, Tensor]
) -> Rest:
    """What a training depends on: `resumed` reads model and optimiser back."""
    weights = {"model": trained_state(model)} | {n: kept for n, kept in tensors.items() if kept}
    return Rest(weights, optimizer.state_dict(), state)
