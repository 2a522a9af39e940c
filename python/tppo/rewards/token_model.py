"""The reward of token-level PPO (Ouyang et al., EMNLP 2025): a frozen model of three classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import tppo_kernels as tk
from tppo.models.batch import Batch
from tppo.models.part_size import PartSize
from tppo.rewards import Answers, TokenReward
from tppo.rewards.mark import weights_mark

SUGGESTED_LENGTH = "suggested_length"  # the column that holds it, in tokens


class TokenModelReward(nn.Module):
    """The reward of each token's class, times the length penalty: `tk.token_rewards`.

    model: gives class logits [B, T, 3] of a batch, at the policy's tokens.
    mode: "argmax" or "expected".  values: the reward of each class.
    length_alpha: steepness of the length penalty; None: no penalty.  With a penalty the data needs
    a column `suggested_length`.
    max_tokens: tokens of prompts and responses that the model reads at once.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        mode: str = "expected",
        values: Sequence[float] = (0.0, -0.5, 0.5),
        length_alpha: float | None = 2.0,
        max_tokens: int = 65_536,
    ):
        super().__init__()
        self.model, self.mode, self.values = model, mode, values
        self.length_alpha, self.part_size = length_alpha, PartSize(max_tokens)

    def extra_repr(self) -> str:
        """With a mark of the weights, as `SentenceModelReward` has."""
        return (f"mode={self.mode}, values={list(self.values)}, length_alpha={self.length_alpha}, "
                f"weights={weights_mark(self.model)}")  # fmt: skip

    @torch.no_grad()
    def forward(self, batch: Batch, answers: Answers) -> TokenReward:
        """Rewards and classes [B, T]; a reward is NaN where a class logit is not finite.

        Errors: ValueError where the length penalty is on and the column is not there.
        """
        logits = self.logits(batch)  # [B, T, 3]
        length = None if self.length_alpha is None else self._suggested(answers, logits)
        found = tk.token_rewards(
            logits,
            batch.mask,
            mode=self.mode,
            suggested_length=length,
            alpha=self.length_alpha or 0.0,
            values=self.values,
        )
        # An infinite logit has a finite argmax: it must stop the training all the same.
        broken = batch.mask & ~logits.isfinite().all(-1)  # [B, T]
        return TokenReward(found.rewards.masked_fill(broken, torch.nan), found.category)

    def logits(self, batch: Batch) -> Tensor:
        """Class logits of a batch, read in parts, [B, T, 3]; 0 where masked."""
        return self.part_size.read(batch, self.model)

    def _suggested(self, answers: Answers, like: Tensor) -> Tensor:
        if SUGGESTED_LENGTH not in answers.columns:
            raise ValueError(
                f"the data has no column {SUGGESTED_LENGTH!r}, expected tokens after which the "
                "length penalty bites; --ppo.length-alpha None goes on without a penalty"
            )
        lengths = answers.columns[SUGGESTED_LENGTH]
        return torch.tensor(lengths, dtype=torch.float32, device=like.device)  # [B]
