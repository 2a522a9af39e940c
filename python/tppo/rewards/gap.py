"""The reward of PIT: by how much an answer is better than the reference in its prompt."""

from __future__ import annotations

import torch
from torch import nn

import tppo_kernels as tk
from tppo.models.batch import Batch
from tppo.models.part_size import PartSize
from tppo.rewards import Answers, TokenReward
from tppo.rewards.mark import weights_mark
from tppo.rewards.sentence_model import SentenceModel


class GapReward(nn.Module):
    """r_gap(x, y, y_ref) of a gap model, which reads x and y_ref as the prompt of y.

        r_T = scale r_gap                                   paid at the last token
        r_t = scale r_gap,t,  r_gap = sum_t r_gap,t         tokens: each token's part, at the token

    max_tokens: tokens of prompts and responses that the model reads at once.
    Errors: ValueError where `tokens` is on and the model does not pool by the mean.
    """

    def __init__(
        self, model: SentenceModel, *, tokens: bool = False, scale: float = 1.0,
        max_tokens: int = 65_536,
    ):  # fmt: skip
        super().__init__()
        if tokens and model.pooling != "mean":
            raise ValueError(f"model.pooling was {model.pooling!r}, expected 'mean' for rewards of "
                             "tokens: the score has to be a sum over them")  # fmt: skip
        self.model, self.tokens, self.scale = model, tokens, scale
        self.part_size = PartSize(max_tokens)

    def extra_repr(self) -> str:
        """With a mark of the weights, as `SentenceModelReward` has."""
        return f"tokens={self.tokens}, scale={self.scale:g}, weights={weights_mark(self.model)}"

    @torch.no_grad()
    def forward(self, batch: Batch, answers: Answers) -> TokenReward:
        """Rewards [B, T]."""
        if self.tokens:
            parts = self.part_size.read(batch, self.model.of_tokens).float()  # [B, T]
            return TokenReward(self.scale * parts)
        gaps = self.part_size.read(batch, self.model).float()  # [B]
        return TokenReward(tk.place_rewards(batch.mask, terminal=self.scale * gaps).rewards)
