"""What a checkpoint of PPO's loop holds, and whether one is such."""

from __future__ import annotations

from typing import Any

from torch import nn

from tppo.methods.ppo import PPO
from tppo.models.keeper import NUMBER, Kept, check, state_of
from tppo.models.part_size import PartSize
from tppo.store.rows import Rows

STATE = {
    "metrics": Rows, "samples": Rows, "best_score": (*NUMBER, type(None)), "best_step": int,
    "seconds": NUMBER, "schedules": {"kl_coef": NUMBER}, "spoilt_in_row": int,
    "part_sizes": [int], "processes": int, "critic_fit": dict,
}  # fmt: skip
ROWS = {"metrics": {"step", "num_tokens", "policy/updates"}, "samples": {"step"}}
"""What later steps and the report read in each row."""


def part_sizes(trainer: PPO) -> list[PartSize]:
    """How much PPO reads at once of its own models, and of each that its reward reads."""
    reward = trainer.reward.modules() if isinstance(trainer.reward, nn.Module) else ()
    found = (getattr(module, "part_size", None) for module in reward)
    return [trainer.part_size, *(size for size in found if isinstance(size, PartSize))]


def kept_state(kept: Kept, sizes: int) -> dict[str, Any]:
    """The state of a checkpoint of a training with so many `part_sizes`.

    Errors: DataError where it is not one that `Loop.save` writes.
    """
    state = state_of(kept, STATE)
    for name, needed in ROWS.items():
        rows = state[name]
        for number in range(len(rows)):  # one by one: all of them may be more than is to be held
            try:
                row = rows[number]
            except ValueError as error:
                raise kept.refused(f"{name}.jsonl: line {number + 1}: {error}") from None
            if not isinstance(row, dict) or not needed <= row.keys():
                raise kept.refused(
                    f"row {number + 1} of {name}.jsonl lacks one of {sorted(needed)}"
                )
    check(kept, part_sizes=(len(state["part_sizes"]), sizes))
    check(kept, rows=([row["step"] for row in state["metrics"]], [*range(1, kept.step + 1)]))
    return state
