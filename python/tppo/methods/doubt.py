"""How unsure the token reward model is of an answer, which nobody has to have labelled."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import softplus

from tppo.methods.config import RewardModelConfig
from tppo.methods.reward_model import (
    IRRELEVANT,
    RELEVANT,
    LabelledAnswer,
    Reader,
    class_logits_of,
    part_size,
)


def answer_doubts(
    reader: Reader, answers: Sequence[LabelledAnswer], config: RewardModelConfig
) -> list[float]:
    """The mean over an answer's tokens of the entropy of "relevant or not", in nats.

        h(p_t) = -p_t log p_t - (1 - p_t) log(1 - p_t)       p_t = P(2 | 1 or 2) at token t

    The labels of the answers are not read.  An answer without tokens has none of it.
    """
    found, size = list[float](), part_size(config)
    for first in range(0, len(answers), config.batch_size):
        rows = answers[first : first + config.batch_size]
        found += doubts_of(*class_logits_of(reader, rows, size))
    return found


def doubts_of(logits: Tensor, mask: Tensor) -> list[float]:
    """The same of class logits [B, T, 3] and the mask [B, T] of the answers' tokens."""
    entropy = _entropy(logits[..., RELEVANT] - logits[..., IRRELEVANT]) * mask  # [B, T]
    return (entropy.sum(1) / mask.sum(1).clamp(min=1)).tolist()


def _entropy(score: Tensor) -> Tensor:
    """h(sigmoid(score)) = softplus(score) - score sigmoid(score)."""
    return softplus(score) - score * score.sigmoid()
