"""Direct preference optimisation: a policy from pairs of answers, without a reward model.

Of a search log the true next queries are the better answer, and what the SFT model writes to the
same history is the worse one.  What DPO has trained is also a reward of tokens
(`tppo.rewards.implicit`), which RTO pays in PPO.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from tppo.methods.config import RewardModelConfig
from tppo.methods.sentence_model import Pair, SentenceReader, train_sentence_model
from tppo.models.config import Prefix
from tppo.rewards.implicit import ImplicitScore


def preferences(
    prompts: Sequence[Sequence[int]],
    chosen: Sequence[Sequence[int]],
    rejected: Sequence[Sequence[int]],
) -> list[Pair]:
    """Pairs of the better and the worse answer to each prompt; those that are alike say nothing and
    are left out.
    """
    rows = zip(prompts, chosen, rejected, strict=True)
    return [Pair(p, c, r) for p, c, r in rows if [*c] != [*r]]


def train_dpo(
    policy: PreTrainedModel,
    ref: PreTrainedModel,
    train: Sequence[Pair],
    heldout: Sequence[Pair],
    config: RewardModelConfig,
    *,
    pad_id: int,
    seed: int,
    beta: float = 0.1,
    prefix: Prefix = "shared",
) -> list[dict[str, float]]:
    """Train the policy on pairs (Rafailov et al. 2023, eq. 7); a row of losses an epoch.

        L = -mean log sigmoid(s(x, y_chosen) - s(x, y_rejected))
        s(x, y) = beta sum_t (log policy(y_t | x, y_<t) - log ref(y_t | x, y_<t))

    It is the loss of Bradley and Terry over the scores that the policy stands for, and is trained
    as a sentence model is: of `config` are used epochs, batch_size (pairs), lr, grad_norm and
    max_tokens; with held-out pairs it stops an epoch past the best.
    """
    score = ImplicitScore(policy, ref, beta)
    reader = SentenceReader(score, pad_id, prefix, config.max_tokens)
    return train_sentence_model(reader, train, heldout, config, seed=seed, name="DPO")
