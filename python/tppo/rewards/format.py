"""What a list of queries loses where it is not the list that was asked for."""

from __future__ import annotations

import torch
from torch import nn

import tppo_kernels as tk
from tppo.labels.queries import SEPARATOR, repeats
from tppo.models.batch import Batch
from tppo.rewards import Answers, Reward, TokenReward

QUERIES = "queries"  # the column that holds how many queries are asked for


class FormatReward(nn.Module):
    """Another reward, less `cost` for each fault of an answer's form, paid where the fault stands.

        r_t -= cost    at the last token of a line that is empty, has the words of an earlier one in
                       any order, or is one more than was asked for
        r_T -= cost    at the last token for each missing line, and where the answer was cut

    A fault in the middle is paid there, and not at the end, from where the blame would be shared by
    all the tokens before it.  An answer without a fault has the format that `has_format` asks for,
    and no other one has it.
    """

    def __init__(self, reward: Reward, cost: float):
        super().__init__()
        self.reward, self.cost = reward, cost

    @torch.no_grad()
    def forward(self, batch: Batch, answers: Answers) -> TokenReward:
        """Rewards [B, T] and the other reward's classes.

        Errors: ValueError where the data has no column `queries`.
        """
        if QUERIES not in answers.columns:
            raise ValueError(
                f"the data has no column {QUERIES!r}, expected how many queries are asked for; "
                "--ppo.format-cost 0 goes on without"
            )
        found = self.reward(batch, answers)
        places = [
            (b, t)
            for b, asked in enumerate(answers.columns[QUERIES])
            for t in self.faults(answers, b, asked)
        ]
        index = torch.tensor(places, dtype=torch.int64, device=found.rewards.device).reshape(-1, 2)
        cost = found.rewards.new_tensor(-self.cost)
        rewards = found.rewards.index_put(tuple(index.T), cost, accumulate=True)  # [B, T]
        return TokenReward(rewards, found.category)

    @staticmethod
    def faults(answers: Answers, b: int, asked: int) -> list[int]:
        """The tokens at which the faults of response b stand, one entry a fault."""
        ids, offsets = answers.response_ids[b], answers.offsets[b]
        lines, last = answers.texts[b].split(SEPARATOR), len(ids) - 1
        found, start = [], 0
        for k, (line, again) in enumerate(zip(lines, repeats(lines), strict=True)):
            if again or k >= asked or not line.strip():
                # An empty line has no character but its separator.
                t = tk.align.last_writer(offsets, start, max(start + len(line), start + 1))
                found.append(last if t is None else t)
            start += len(line) + len(SEPARATOR)
        cut = not ids or ids[-1] not in answers.eos_ids
        return found + [last] * (max(0, asked - len(lines)) + cut)
