"""A greedy answer beside those that are sampled: the baseline of ReMax."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tppo.models.rollout import Rollout, RolloutBatch, Sampling


@dataclass(frozen=True)
class GreedyLast:
    """A rollout whose last response of every `size` is the greedy one, which has no author.

    The rows of one prompt follow each other, `size` of them.  What has no author is rated and read
    with the others, and is not trained on.
    """

    rollout: Rollout
    size: int

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        prefixes: Sequence[Sequence[int]] | None = None,
    ) -> RolloutBatch:
        """One response a prompt.  Errors: ValueError with forced prefixes."""
        if prefixes is not None:
            raise ValueError("prefixes were given, expected None with a greedy baseline, which "
                             "would stand behind one of them alone")  # fmt: skip
        last = [i for i in range(len(prompts)) if i % self.size == self.size - 1]
        others = [i for i in range(len(prompts)) if i % self.size != self.size - 1]
        rows: dict[int, tuple[list[int], str, list[bool]]] = {}
        for index, how in ((others, sampling), (last, replace(sampling, temperature=0.0))):
            if index:
                found = self.rollout.generate([prompts[i] for i in index], how)
                for i, ids, why in zip(index, found.response_ids, found.finish, strict=True):
                    rows[i] = ids, why, [how is sampling] * len(ids)
        order = range(len(prompts))
        return RolloutBatch(
            [[*p] for p in prompts], [rows[i][0] for i in order], None, [rows[i][1] for i in order],
            [rows[i][2] for i in order],
        )  # fmt: skip
