"""What PPO does with a batch whose figures are not finite.

One bad batch of a long training is skipped, counted, told and kept for `tppo replay`; several in a
row stop it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import nn

from tppo.methods.experience import Experience, Reading
from tppo.models.guards import GuardError, check_figures, check_weights
from tppo.progress import say

SPOILT = "ppo/spoilt"  # figure of a step: its batches that were skipped; only where there are some


class SpoiltBatch(NamedTuple):
    """What was skipped: the answers of a step that were scored, or a minibatch of them."""

    step: int
    part: str  # "rollout", "minibatch"
    data: Experience
    why: str


class SpoiltRollout(GuardError):
    """Scored answers whose figures are not finite."""

    def __init__(self, why: str, data: Experience):
        super().__init__(why)
        self.data = data


def check_experience(step: int, read: Reading, found: Experience) -> Experience:
    """What models, reward and advantage made of the answers, where all of it is finite.

    Errors: SpoiltRollout naming what is not.
    """
    of_classes = found.category is not None
    figures = {
        "log-probs of the policy": read.old,
        "log-probs of the reference": read.ref,
        "class logits of the reward model" if of_classes else "rewards": read.rewards,
        "values of the critic": read.values,
        "values of the critic after the last tokens": read.after,
        "advantages": found.advantages,
        "returns": found.returns,
    }
    try:
        check_figures(f"ppo step {step}", {k: x for k, x in figures.items() if x is not None})
    except GuardError as error:
        raise SpoiltRollout(str(error), found) from None
    return found


class Skips:
    """Counts the batches that are skipped.

    most: in a row, before the training stops.  keep: writes one for `tppo replay`, and says where,
    or "" if it could not.
    """

    def __init__(self, most: int):
        self.most, self.in_row, self.of_step = most, 0, 0
        self.keep: Callable[[SpoiltBatch], str] | None = None

    def add(self, step: int, data: Experience, why: str, models: Mapping[str, nn.Module], *,
            part: str = "rollout") -> None:  # fmt: skip
        """Skip a batch.

        Errors: GuardError where the weights themselves are not finite, so that no later batch can
        be better, and after `most` in a row.
        """
        try:
            check_weights(f"ppo step {step}", models)
        except GuardError as error:
            raise GuardError(f"{why}. {error}" if part == "minibatch" else why) from None
        self.in_row, self.of_step = self.in_row + 1, self.of_step + 1
        kept = ""
        if self.keep and (path := self.keep(SpoiltBatch(step, part, data, why))):
            kept = f"; `tppo replay {path}` repeats it"
        say(f"WARNING: {why}. The {part} is skipped ({self.in_row} in a row){kept}")
        if self.in_row >= self.most:
            raise GuardError(
                f"{why}. {self.in_row} batches in a row had figures that are not "
                f"finite, and the weights are as they were before the first of them{kept}; usually "
                "a smaller --ppo.lr or --ppo.critic-lr, or a reward without such values, helps; "
                "--ppo.max-spoilt N allows more of them"
            )
