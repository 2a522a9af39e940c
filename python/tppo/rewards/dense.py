"""Rewards of tokens from a reward model of whole answers: RED, ABC, and RTO's from a DPO pair.

Each is a `Reward` that redistributes a score over the tokens; the total stays the score (of RTO the
score and a term of its own), so that they are compared with `SentenceModelReward`, which pays the
same score at the last token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tppo.models.batch import Batch
from tppo.models.part_size import PartSize
from tppo.rewards import Answers, Reward, TokenReward
from tppo.rewards.implicit import ImplicitReward
from tppo.rewards.mark import weights_mark
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
        self.model, self.part_size = model, PartSize(max_tokens)

    def extra_repr(self) -> str:
        """With a mark of the weights of a model that has some."""
        return f"weights={weights_mark(self.model)}" if isinstance(self.model, nn.Module) else ""

    @torch.no_grad()
    def forward(self, batch: Batch, answers: Answers) -> TokenReward:
        """Rewards [B, T]; NaN where a score is not finite."""
        scores = self.part_size.read(batch, getattr(self.model, "prefixes", self.beginnings))
        earlier = torch.nn.functional.pad(scores, (1, 0))[:, :-1]  # [B, T]
        return TokenReward(torch.where(batch.mask, scores - earlier, 0.0))

    def beginnings(self, batch: Batch) -> Tensor:
        """Scores of all beginnings of the responses, [B, T], each read by itself."""
        pairs = list(zip(batch.prompt_ids, batch.response_ids, strict=True))
        rows = [(p, y[: t + 1]) for p, y in pairs for t in range(len(y))]
        prompts, begun = zip(*rows, strict=True)
        each = Batch(prompts, begun, batch.pad_id, batch.device, batch.prefix)
        scores = each.in_parts(self.model, self.part_size.tokens)  # [sum of lengths]
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
        self.model, self.part_size = model, PartSize(max_tokens)

    def extra_repr(self) -> str:
        """With a mark of the weights, as `SentenceModelReward` has."""
        return f"weights={weights_mark(self.model)}"

    @torch.no_grad()
    def forward(self, batch: Batch, answers: Answers) -> TokenReward:
        """Rewards [B, T].  Errors: ValueError for a trunk that gives no attention."""
        scores = self.part_size.read(batch, self.model)  # [B]
        weights = self.part_size.read(batch, self.model.attention)  # [B, T]
        return TokenReward(weights / weights.sum(1, keepdim=True) * scores[:, None])


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
