"""Rewards of tokens from a reward model of whole answers: RED, ABC, and RTO's from a DPO pair.

Each is a `Reward` that redistributes a score over the tokens; the total stays the score (of RTO the
score and a term of its own), so that they are compared with `SentenceModelReward`, which pays the
same score at the last token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tppo.models.batch import Batch, pad
from tppo.rewards import Answers, Reward, TokenReward
from tppo.rewards.implicit import ImplicitReward
from tppo.rewards.sentence_model import SentenceModel

READ = 65_536  # tokens that a model reads at once


class RED(nn.Module):
    """Reward redistribution (Li et al. 2024, "RED", arXiv 2411.08302): what each token changes of
    the score.

        r_t = s(x, y_<=t) - s(x, y_<=t-1)       sum_t r_t = s(x, y)

    s of no token counts as 0, which the paper leaves open: else the sum would lack the score of the
    bare prompt.  model: scores [B] of a batch, such as a `SentenceModel`; it reads every beginning
    of an answer, or, where it has a method `prefixes`, each answer once.
    """

    def __init__(self, model: Callable[[Batch], Tensor], *, max_tokens: int = READ):
        super().__init__()
        self.model, self.max_tokens = model, max_tokens

    @torch.no_grad()
    def forward(self, batch: Batch, answers: Answers) -> TokenReward:
        """Rewards [B, T]; NaN where a score is not finite."""
        scores = batch.in_parts(getattr(self.model, "prefixes", self.beginnings), self.max_tokens)
        earlier = torch.nn.functional.pad(scores, (1, 0))[:, :-1]  # [B, T]
        return TokenReward(torch.where(batch.mask, scores - earlier, 0.0))

    def beginnings(self, batch: Batch) -> Tensor:
        """Scores of all beginnings of the responses, [B, T], each read by itself."""
        pairs = list(zip(batch.prompt_ids, batch.response_ids, strict=True))
        rows = [(p, y[: t + 1]) for p, y in pairs for t in range(len(y))]
        prompts, begun = zip(*rows, strict=True)
        each = Batch(prompts, begun, batch.pad_id, batch.device, batch.prefix)
        scores = each.in_parts(self.model, self.max_tokens)  # [sum of lengths]
        return scores.new_zeros(batch.mask.shape).masked_scatter(batch.mask, scores)


class ABC(nn.Module):
    """Attention-based credit (Chan et al. 2024, "Dense Reward for Free", arXiv 2402.00782): the
    score of an answer in shares of the attention that it was made with.

        r_t = a_t s(x, y),  a_t = mean_h A_h[T, t] / sum_u mean_h A_h[T, u]     t, u in the response

    A_h: attention of head h of the model's last layer, from the answer's last token.  The paper's
    attention on the prompt is left out, by the sum below the line, so that sum_t r_t = s.
    """

    def __init__(self, model: SentenceModel, *, max_tokens: int = READ):
        super().__init__()
        self.model, self.max_tokens = model, max_tokens

    @torch.no_grad()
    def forward(self, batch: Batch, answers: Answers) -> TokenReward:
        """Rewards [B, T].  Errors: ValueError for a trunk that gives no attention."""
        scores = batch.in_parts(self.model, self.max_tokens)  # [B]
        return TokenReward(batch.in_parts(self.shares, self.max_tokens) * scores[:, None])

    def shares(self, batch: Batch) -> Tensor:
        """a_t, [B, T]; 0 where masked."""
        trunk: Any = self.model.trunk
        rows = [[*p, *y] for p, y in zip(batch.prompt_ids, batch.response_ids, strict=True)]
        # Padded on the right alone: padding on the left, which sees nothing, is NaN to some trunks.
        padded = pad([row[:1] for row in rows], [row[1:] for row in rows], batch.pad_id,
                     batch.device)  # fmt: skip
        kept = trunk.config._attn_implementation
        trunk.set_attn_implementation("eager")  # the others keep no attention
        try:
            found = trunk(input_ids=padded.input_ids, attention_mask=padded.attention_mask,
                          position_ids=padded.position_ids, use_cache=False,
                          output_attentions=True).attentions  # fmt: skip
        finally:
            trunk.set_attn_implementation(kept)
        if not found or found[-1] is None:
            raise ValueError(f"{type(trunk).__name__} gave no attention of its last layer, "
                             "expected a transformer whose last layer has attention")  # fmt: skip
        last = torch.tensor([len(row) - 1 for row in rows], device=batch.mask.device)  # [B]
        given = found[-1].mean(1)[torch.arange(len(rows), device=last.device), last]  # [B, P+T]
        first = last + 1 - batch.mask.sum(1)  # [B]
        places = first[:, None] + torch.arange(batch.mask.shape[1], device=last.device)  # [B, T]
        weights = given.gather(1, torch.minimum(places, last[:, None]))
        weights = torch.where(batch.mask, weights, 0.0)
        return weights / weights.sum(1, keepdim=True)


class RTO(nn.Module):
    """The reward of RTO (Zhong et al. 2024, "DPO Meets PPO", arXiv 2404.18922) from a policy that
    DPO has trained.

        r_t = beta (log pi_DPO(y_t | x, y_<t) - log pi_ref(y_t | x, y_<t)) + [t = T] s(x, y)

    tokens: the first term, with its beta.  whole: pays s, such as a `SentenceModelReward`.  The KL
    to the reference, a third term of the paper's, is the one that PPO takes off (`kl_coef`).
    """

    def __init__(self, tokens: ImplicitReward, whole: Reward):
        super().__init__()
        self.tokens, self.whole = tokens, whole

    @torch.no_grad()
    def forward(self, batch: Batch, answers: Answers) -> TokenReward:
        """Rewards [B, T], and the classes of `whole`."""
        found = self.whole(batch, answers)
        return found._replace(rewards=self.tokens(batch, answers).rewards + found.rewards)
