"""A greedy answer beside those that are sampled: the baseline of ReMax."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tppo.models.rollout import Rollout, RolloutBatch, Sampling, together


@dataclass(frozen=True)
class GreedyLast:
    """A rollout whose last response of every `size` is the greedy one, which has no author.

    The rows of one prompt follow each other, `size` of them.  What has no author is rated and read
    with the others, and is not trained on.
    """

    shares_out = True
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
        rows: dict[int, tuple[list[int], list[float], str, list[bool]]] = {}
        for index, how in ((others, sampling), (last, replace(sampling, temperature=0.0))):
            if index:
                found = together(self.rollout, [prompts[i] for i in index], how)
                told = found.logprobs or [[]] * len(index)
                for i, ids, one, why in zip(index, found.response_ids, told, found.finish,
                                              strict=True):  # fmt: skip
                    rows[i] = ids, one, why, [how is sampling] * len(ids)
        every = [rows[i] for i in range(len(prompts))]
        probs = [row[1] for row in every]
        return RolloutBatch([[*p] for p in prompts], [row[0] for row in every],
                            probs if any(probs) else None, [row[2] for row in every],
                            [row[3] for row in every])  # fmt: skip
