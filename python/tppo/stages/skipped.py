"""Steps of PPO that could not be taken: without a guide's answer, or with figures not finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tppo.methods.rlgf import SKIPPED, GuidedPPO
from tppo.models.guards import GuardError

if TYPE_CHECKING:
    from tppo.stages.loop import Loop


def taken(row: Mapping[str, Any]) -> bool:
    """Whether the step of a row has scored answers."""
    return "objective/scores" in row


class Course(NamedTuple):
    """The steps of a training that were taken."""

    steps: int
    first: Mapping[str, Any]
    last: Mapping[str, Any]
    updates: int


def course_of(rows: Sequence[Mapping[str, Any]]) -> Course:
    """What rows say of the steps that were taken.  Errors: GuardError where none was."""
    steps, updates, first, last = 0, 0, None, None
    for row in rows:  # one by one: a long training has more than are to be held
        updates += row["policy/updates"]
        if taken(row):
            steps, first, last = steps + 1, first or row, row
    if first is None or last is None:
        raise GuardError(f"ppo: none of {len(rows)} steps could be taken, because the figures of "
                         "their answers are not finite (the reasons stand above)")  # fmt: skip
    return Course(steps, first, last, updates)


def skip(loop: Loop, step: int) -> None:
    """Go on behind a step that was skipped.  Before the first of several in a row a checkpoint is
    written, from which a later call takes all of them again.

    Errors: GuardError after `rlgf.max_skipped` in a row, or where no step of a run could be taken.
    """
    assert isinstance(loop.trainer, GuidedPPO)
    missed = 1
    while missed < step and loop.metrics[-missed].get(SKIPPED):
        missed += 1
    done = step - missed
    if missed == 1 and done % loop.config.checkpoint_every and loop.world.rank == 0:
        loop.save(done)
    if missed >= loop.trainer.rlgf.max_skipped or step == loop.steps == missed:
        then = f"the same call goes on after step {done}" if done else "no step was taken yet"
        raise GuardError(
            f"ppo step {step}: the guide gave no answer, and {missed} steps in a row are skipped "
            f"for that (the reasons stand above). Nothing is lost: {then}; --rlgf.max-skipped N "
            "allows more of them"
        )
