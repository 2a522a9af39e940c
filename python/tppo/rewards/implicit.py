"""The reward that a policy trained on preferences stands for, of answers and of their tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tppo.models.batch import Batch
from tppo.models.part_size import PartSize
from tppo.models.policy import policy_logprobs
from tppo.rewards import Answers, TokenReward
from tppo.rewards.mark import weights_mark


class ImplicitScore(nn.Module):
    """The score of answers whose differences DPO trains (Rafailov et al. 2023, eq. 7).

        s = sum_t r_t,  r_t = beta (log policy(y_t | x, y_<t) - log ref(y_t | x, y_<t))

    ref: frozen here, and none of this module's own weights.
    """

    def __init__(self, policy: PreTrainedModel, ref: PreTrainedModel, beta: float = 0.1):
        super().__init__()
        self.policy, self.beta = policy, beta
        self._ref = (ref.requires_grad_(False),)  # in a tuple: not trained, copied or moved

    @property
    def ref(self) -> PreTrainedModel:
        """The reference."""
        return self._ref[0]

    def tokens(self, batch: Batch) -> Tensor:
        """r_t, [B, T]; 0 where masked."""
        with torch.no_grad():
            ref, _ = policy_logprobs(self.ref, batch, 1.0)  # [B, T]
        own, _ = policy_logprobs(self.policy, batch, 1.0)  # [B, T]
        return self.beta * torch.where(batch.mask, own - ref, 0.0)

    def forward(self, batch: Batch) -> Tensor:
        """Scores of the responses, [B]."""
        return self.tokens(batch).sum(1)


class ImplicitReward(nn.Module):
    """r_t of an `ImplicitScore` at every token: the dense reward of RTO (Zhong et al. 2024).

    RTO starts PPO from SFT with it; its further reward of the whole answer is another `Reward`.
    max_tokens: tokens of prompts and responses that the models read at once.
    """

    def __init__(self, model: ImplicitScore, *, max_tokens: int = 65_536):
        super().__init__()
        self.model, self.part_size = model, PartSize(max_tokens)

    def extra_repr(self) -> str:
        """With a mark of the weights of both models."""
        marks = [weights_mark(model) for model in (self.model.policy, self.model.ref)]
        return f"beta={self.model.beta:g}, weights={'-'.join(marks)}"

    @torch.no_grad()
    def forward(self, batch: Batch, answers: Answers) -> TokenReward:
        """Rewards [B, T]."""
        return TokenReward(self.part_size.read(batch, self.model.tokens).float())
