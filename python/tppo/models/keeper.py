"""What long work keeps on the way, so that a process that is killed does not cost all of it.

The work counts steps of whatever kind (optimiser steps, batches of answers), and offers after each
what the rest depends on; where and how often that is written is the matter of who keeps it
(`tppo.store.checkpoint.Checkpoints` on the disk).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from tppo.errors import DataError, short
from tppo.models.part_size import PartSize
from tppo.models.policy import load_trained, trained_state

NUMBER = (int, float)
PART_SIZE = "part_size"  # tokens that a training reads at once, where the memory set them too


class Kept(Protocol):
    """What was kept after a step; the work that goes on from it says what it needs of that by
    `state_of`, `weights_of` and `resumed`.
    """

    @property
    def step(self) -> int: ...
    @property
    def weights(self) -> Mapping[str, dict[str, Tensor]]: ...
    @property
    def optimizer(self) -> dict[str, Any]: ...
    @property
    def state(self) -> dict[str, Any]: ...
    def refused(self, why: str) -> DataError:
        """The error that says why this work cannot go on from it, and what to do."""


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
        restore(kept, {"model": model}, optimizer)
    return kept


def restore(kept: Kept, models: Mapping[str, nn.Module], optimizer: Any = None) -> None:
    """Give models the weights that are kept by their names, and an optimiser its state.

    Errors: DataError where they are not those of this work.
    """
    found = {name: fitting(kept, name, model) for name, model in models.items()}
    if optimizer is not None:
        try:
            optimizer.load_state_dict(kept.optimizer)
        except ValueError as error:
            raise kept.refused(str(error)) from None
    for name, model in models.items():
        load_trained(model, found[name])


def fitting(kept: Kept, name: str, model: nn.Module) -> dict[str, Tensor]:
    """Weights that are kept by a name.  Errors: DataError where they are not such as the model
    trains, by name, shape and type.
    """
    own = trained_state(model)
    found = weights_of(kept, name, *own)
    for key, x in found.items():
        was, is_now = ((tuple(y.shape), str(y.dtype)) for y in (x, own[key]))
        if was != is_now:
            raise kept.refused(f"weight {key!r} of {name!r} is {was}, expected {is_now}")
    return found


def weights_of(kept: Kept, name: str, *keys: str) -> dict[str, Tensor]:
    """The tensors that are kept by a name.  keys: theirs, where they are known.

    Errors: DataError where there are none, or with other keys.
    """
    found = kept.weights.get(name)
    if found is None:
        raise kept.refused(f"it lacks the tensors {name!r}")
    if keys and found.keys() != {*keys}:
        raise kept.refused(_apart(f"the tensors {name!r}", found, keys))
    return found


def state_of(
    kept: Kept, kinds: Mapping[str, Any], size: PartSize | None = None
) -> dict[str, Any]:
    """The state, without what `size` takes of it: how much the memory has held at once.

    kinds: of each entry its type, several of them, [what each of a list is], or the kinds of its
    own entries.

    Errors: DataError where an entry is missing, of another type, or not known here.
    """
    if size is not None:
        kinds = {**kinds, PART_SIZE: int}
    if why := _misfit("the state", kept.state, kinds):
        raise kept.refused(why)
    if size is not None:
        size.go_on(kept.state[PART_SIZE])
    return {name: value for name, value in kept.state.items() if size is None or name != PART_SIZE}


def history_of(kept: Kept) -> list[dict[str, Any]]:
    """The rows of figures that a training has kept.  Errors: DataError where there are none."""
    found = kept.state.get("history")
    if why := _misfit("the state's 'history'", found, [dict]):
        raise kept.refused(why)
    return kept.state["history"]


def answers_of(kept: Kept, rows: int, *names: str) -> list[list[list[Any]]]:
    """What is kept of so many rows of answers, one list a name, as numbers a token.

    Errors: DataError where it is of another number of rows.
    """
    state_of(kept, {})
    found = weights_of(kept, "answers", "lengths", *names)
    lengths: list[int] = found["lengths"].tolist()
    check(kept, answers=(len(lengths), rows), **{
        name: (tuple(found[name].shape), (sum(lengths),)) for name in names
    })  # fmt: skip
    return [[row.tolist() for row in found[name].split(lengths)] for name in names]


def check(kept: Kept, **expected: tuple[Any, Any]) -> None:
    """Figures that have to be what follows from others: (was, expected) by name.

    Errors: DataError naming the first that is not.
    """
    for name, (was, wanted) in expected.items():
        if was != wanted:
            raise kept.refused(f"{name} is {short(was)}, expected {short(wanted)}")


def _misfit(name: str, value: Any, kind: Any) -> str:
    if isinstance(kind, Mapping):
        if not isinstance(value, dict):
            return f"{name} is {short(value)}, expected an object"
        if value.keys() != kind.keys():
            return _apart(name, value, [*kind])
        return next(filter(None, (_misfit(f"{name}[{k!r}]", value[k], kind[k]) for k in kind)), "")
    if isinstance(kind, list):
        wrong = (_misfit(f"{name}[{i}]", x, kind[0]) for i, x in enumerate(value))
        return next(filter(None, wrong), "") if isinstance(value, list) else (
            f"{name} is {short(value)}, expected a list")  # fmt: skip
    if isinstance(value, bool) or not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        return f"{name} is {short(value)}, expected {' or '.join(k.__name__ for k in kinds)}"
    return ""


def _apart(name: str, found: Mapping[str, Any], wanted: Sequence[str]) -> str:
    """What keys are on one side alone."""
    parts = [("lacks", {*wanted} - found.keys()), ("has, unknown here,", found.keys() - {*wanted})]
    return " and ".join(
        f"{name if i == 0 else 'it'} {verb} {short(sorted(keys), 200)}"
        for i, (verb, keys) in enumerate((v, k) for v, k in parts if k)
    )


def rest_of(
    model: nn.Module,
    optimizer: Any,
    state: dict[str, Any],
    size: PartSize,
    **tensors: dict[str, Tensor],
) -> Rest:
    """What a training depends on: `resumed` reads model and optimiser back, `state_of` the rest."""
    weights = {"model": trained_state(model)} | {n: kept for n, kept in tensors.items() if kept}
    return Rest(weights, optimizer.state_dict(), state | {PART_SIZE: size.tokens})
