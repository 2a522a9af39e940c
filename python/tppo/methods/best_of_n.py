"""Best of n: no training, the answer that a reward prefers of several samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from tppo.models.batch import Batch
from tppo.models.config import Prefix
from tppo.models.rollout import Rollout, Sampling
from tppo.rewards import Answers, Questions, Reward


class BestOfN(NamedTuple):
    """One answer a question, and what was paid for all n samples of each."""

    answers: Answers
    totals: list[list[float]]  # [questions][n]


def best_of_n(
    rollout: Rollout,
    reward: Reward,
    questions: Questions,
    n: int,
    sampling: Sampling,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    pad_id: int,
    eos_ids: Sequence[int],
    device: torch.device | str = "cpu",
    prefix: Prefix = "shared",
) -> BestOfN:
    """The sample of n whose total reward is the largest, for each question; the first of equals.

    Errors: ValueError where n is below 1, or a total is not finite.
    """
    if n < 1:
        raise ValueError(f"n was {n}, expected at least 1")
    rows = questions.rows([i for i in range(len(questions)) for _ in range(n)])
    sampled = rollout.generate(rows.ids, sampling)
    batch = Batch(sampled.prompt_ids, sampled.response_ids, pad_id, device, prefix)
    groups = [i // n for i in range(len(rows))]
    answers = Answers(
        rows.prompts, sampled.response_ids, rows.columns, tokenizer,  # type: ignore[arg-type]
        eos_ids, groups,
    )  # fmt: skip
    with torch.no_grad():
        totals = reward(batch, answers).rewards.sum(1)  # [B]
    if not totals.isfinite().all():
        row = int((~totals.isfinite()).nonzero()[0])
        raise ValueError(f"the reward paid {totals[row].item()} for sample {row % n} of question "
                         f"{row // n}, expected a finite number")  # fmt: skip
    by_question = totals.unflatten(0, (len(questions), n)).tolist()
    best = [i * n + row.index(max(row)) for i, row in enumerate(by_question)]
    return BestOfN(answers.rows(best), by_question)


def kl_bound(n: int) -> float:
    """The most that best-of-n is from the policy, in nats a response: log n - (n - 1) / n.

    It is an upper bound (Beirami et al. 2024), close where no two answers have the same reward and
    none of them is likely.
    """
    return math.log(n) - (n - 1) / n
