"""A reward of whole responses from any reward of tokens: the baseline that pays at the end."""

from __future__ import annotations

import torch
from torch import nn

import tppo_kernels as tk
from tppo.models.batch import Batch
from tppo.rewards import Answers, Reward, TokenReward


class TerminalReward(nn.Module):
    """The total of another reward, paid at the last token of each response: `tk.place_rewards`.

        r_T = sum_t R_t,  r_t = 0 before

    Without discount the return of a response stays as it is; what changes is where it is paid.
    Classes of the other reward are kept.
    """

    def __init__(self, reward: Reward):
        super().__init__()
        self.reward = reward

    @torch.no_grad()
    def forward(self, batch: Batch, answers: Answers) -> TokenReward:
        """Rewards [B, T], 0 but at the last tokens; not finite where a token's reward was not."""
        found = self.reward(batch, answers)
        totals = found.rewards.sum(1, dtype=torch.float32)  # [B]
        return TokenReward(tk.place_rewards(batch.mask, terminal=totals).rewards, found.category)
