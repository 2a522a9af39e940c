"""The token reward model behind a server: vLLM reads the answers, and rewards are made here.

What becomes of the class logits that the server gives, `TokenModelReward` says as it does for a
model of this process.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

import tppo_kernels as tk
from tppo.models.batch import Batch, pad_rows
from tppo.models.config import RewardServerConfig
from tppo.rewards import Answers, TokenReward
from tppo.rewards.server import RewardServer
from tppo.rewards.token_model import TokenModelReward


class ServedReward(TokenModelReward):
    """`TokenModelReward` whose class logits a server gives.

        reward = tppo.ServedReward("http://127.0.0.1:8000", "runs/demo/train-rm/model")

    server: its address, or a `tppo.RewardServerConfig`.  folder: the export of the reward model,
    of which only the tokenizer and `reward_probe.json` are read here; with LoRA the server has the
    merged model, and this may still be the adapter's folder.  The rest is as in
    `TokenModelReward`.

    Errors: DataError for an address or folder that cannot be; RewardServerError where nobody
    answers there, or with another model or tokenizer.
    """

    def __init__(
        self, server: str | RewardServerConfig, folder: str | Path, **options: Any
    ) -> None:
        config = RewardServerConfig(base_url=server) if isinstance(server, str) else server
        super().__init__(RewardServer(config, folder), **options)
        self._read: PreTrainedTokenizerBase | None = None

    def extra_repr(self) -> str:
        """Without the address: a training may go on with the same model at another server."""
        return (f"mode={self.mode}, values={list(self.values)}, length_alpha={self.length_alpha}, "
                f"weights={self.server.mark}")  # fmt: skip

    @property
    def server(self) -> RewardServer:
        """Who is asked."""
        assert isinstance(self.model, RewardServer)
        return self.model

    def forward(self, batch: Batch, answers: Answers) -> TokenReward:
        """As `TokenModelReward` does.  Errors: also those of `RewardServer`."""
        if answers.tokenizer is not self._read:
            self.server.check_policy(answers.tokenizer)
            self._read = answers.tokenizer
        return super().forward(batch, answers)

    def rewards(
        self,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        masks: Sequence[Sequence[int]] | None = None,
        suggested_lengths: Sequence[float] | None = None,
    ) -> list[list[float]]:
        """A reward for each token of each response, 0 where a token is not the policy's: what
        `TokenRewardModel.rewards` of tppo_kernels.integrations gives, for workers of SkyRL or verl.

        prompts, responses: token ids.  masks: 1 at tokens that the policy has written; None: all.
        suggested_lengths: one a response, in tokens; None: no length penalty.
        """
        rows = [i for i, response in enumerate(responses) if len(response)]
        paid: list[list[float]] = [[] for _ in responses]
        if not rows:
            return paid
        batch = Batch([prompts[i] for i in rows], [responses[i] for i in rows], 0)
        mask = batch.mask if masks is None else pad_rows(
            [masks[i] for i in rows], batch.mask.float()).bool()  # fmt: skip
        lengths = None
        if suggested_lengths is not None and self.length_alpha is not None:
            lengths = torch.tensor([float(suggested_lengths[i]) for i in rows])  # [B]
        found = tk.token_rewards(
            self.logits(batch), mask, mode=self.mode, suggested_length=lengths,
            alpha=self.length_alpha or 0.0, values=self.values,
        ).rewards.tolist()  # fmt: skip
        for i, row in zip(rows, found, strict=True):
            paid[i] = row[: len(responses[i])]
        return paid

    def logits(self, batch: Batch) -> Tensor:
        """Class logits of a batch, [B, T, 3]; requests of `RewardServerConfig.max_tokens`."""
        found: Tensor = self.server(batch)
        return found


def check_served(reward: Any, tokenizer: PreTrainedTokenizerBase, longest: int) -> None:
    """Before the first step: whoever a reward asks, itself or inside, reads what the policy writes.

    longest: tokens of the longest prompt and answer.
    Errors: DataError where a server cannot read so many, or its model reads other tokens.
    """
    for module in reward.modules() if isinstance(reward, nn.Module) else ():
        if isinstance(module, RewardServer):
            module.check_policy(tokenizer)
            module.check_length(longest)
