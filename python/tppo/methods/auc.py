"""The area under the ROC curve of a reward model's scores, and how sure it is.

    AUC = P(score of a relevant token > score of an irrelevant one), ties a half

Tokens of an answer are not independent of each other, so that its interval comes of drawing whole
groups of answers, with replacement (the cluster bootstrap).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tppo.methods.config import RewardModelConfig
from tppo.models.guards import GuardError
from tppo.progress import say

DRAWS = 2_000
FEWEST, MOST = 5, 1_000  # groups that an interval is drawn of


class Rated(NamedTuple):
    """What a reward model says of the labelled tokens of some answers."""

    score: Tensor  # [N], the larger the more relevant
    relevant: Tensor  # [N] bool
    answer: Tensor  # [N] int64, the answer's number

    def of(self, answers: Sequence[int]) -> Rated:
        """The part of it that is of these answers."""
        chosen = torch.isin(self.answer, torch.tensor([*answers], dtype=torch.int64))
        return Rated(self.score[chosen], self.relevant[chosen], self.answer[chosen])


def area_under_curve(score: Tensor, positive: Tensor) -> float | None:
    """P(score of a positive > score of a negative), ties a half; None without both classes."""
    n_pos, n_neg = int(positive.sum()), int((~positive).sum())
    if not n_pos or not n_neg:
        return None
    _, rank, tied = score.double().unique(return_inverse=True, return_counts=True)
    mean_rank = tied.cumsum(0) - (tied - 1) / 2  # 1-based, ties share their mean
    rank_sum = mean_rank[rank][positive].sum().item()
    return (rank_sum - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg)


def drawn_aucs(rated: Sequence[Rated], groups: Sequence[Hashable]) -> Tensor | None:
    """The AUC of several models in 2,000 draws of as many groups as there are, with replacement;
    [models, draws], every draw the same for all models, those left out that have one class alone.

        AUC(c) = sum_ij c_i c_j W_ij / (sum_i c_i P_i  sum_j c_j N_j)

    c: how often a draw has each group.  P, N: its relevant and irrelevant tokens.  W_ij: pairs of a
    relevant token of group i and an irrelevant one of j in which the first has the larger score.

    rated: of the same tokens.  groups: of each answer, what is drawn together, such as its session.
    None with fewer than 5 groups, of which draws say nothing, with more than 1,000, of which the
    AUC alone says enough, and where most draws have one class alone.
    """
    names = {name: k for k, name in enumerate(dict.fromkeys(groups))}
    of_answer = torch.tensor([names[name] for name in groups], dtype=torch.int64)
    k = len(names)
    if not FEWEST <= k <= MOST:
        return None
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(k, (DRAWS, k), generator=generator)  # [draws, K]
    times = torch.zeros(DRAWS, k, dtype=torch.float64).scatter_add_(
        1, picks, torch.ones(DRAWS, k, dtype=torch.float64)
    )
    found = []
    for one in rated:
        won, positives, negatives = _pairs(one, of_answer[one.answer], k)
        pairs = (times @ positives) * (times @ negatives)  # [draws]
        found.append(((times @ won) * times).sum(1) / pairs)
    aucs = torch.stack(found)
    aucs = aucs[:, aucs.isfinite().all(0)]
    return aucs if aucs.shape[1] > DRAWS / 2 else None


def _pairs(rated: Rated, group: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """W [K, K], P [K] and N [K] of `drawn_aucs`."""
    score, positive = rated.score.double(), rated.relevant
    negatives, of_negative = score[~positive], group[~positive]
    won = torch.zeros(k, k, dtype=torch.float64)
    for i in range(k):
        own = score[positive & (group == i)]
        above = (own[:, None] > negatives).double() + 0.5 * (own[:, None] == negatives)
        won[i].index_add_(0, of_negative, above.sum(0))
    return (won, group[positive].bincount(minlength=k).double(),
            of_negative.bincount(minlength=k).double())  # fmt: skip


def interval(values: Tensor) -> tuple[float, float]:
    """The middle 95 % of draws."""
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high


def auc_interval(rated: Rated, groups: Sequence[Hashable]) -> tuple[float, float] | None:
    """The 95 % interval of an AUC, by draws of groups; None where `drawn_aucs` says nothing."""
    draws = drawn_aucs([rated], groups)
    return None if draws is None else interval(draws[0])


def check_auc(report: dict[str, Any], config: RewardModelConfig) -> None:
    """Stop before PPO optimises a reward that cannot tell relevant from irrelevant.

    With fewer than `min_auc_sessions` labelled sessions the AUC on few held-out ones may be low by
    chance: it stops only where its whole 95 % interval is below `min_auc`, and warns where the AUC
    is and the interval is not.
    Errors: GuardError below `min_auc`.
    """
    auc, sessions = report["auc"], report["sessions"]
    if auc is not None and auc >= config.min_auc:
        return
    few = sessions < config.min_auc_sessions
    between = report.get("auc_interval") if few else None
    problem = (
        f"the reward model's AUC is {shown_auc(auc, between)}, expected at least {config.min_auc}"
    )
    if not few or between is not None and between[1] < config.min_auc:
        raise GuardError(
            f"{problem}: PPO would raise this reward without raising relevance. Label more answers "
            "or train longer; --reward-model.min-auc lowers the bound"
        )
    chance = (
        "its interval reaches above that, so that it may be chance" if between is not None else
        "too few of them are held out for an interval"
    )  # fmt: skip
    say(
        f"WARNING: {problem}. Only {sessions} sessions are labelled (fewer than "
        f"{config.min_auc_sessions}), and {chance}: PPO runs, but do not trust its reward; label "
        "more answers"
    )


def shown_auc(auc: float | None, between: Sequence[float] | None) -> str:
    """An AUC with its interval, as a sentence has it."""
    if auc is None:
        return "unknown (the held-out labels are all alike)"
    return f"{auc:.3f}" + (f" (95 % {between[0]:.3f} to {between[1]:.3f})" if between else "")


def calibration(probability: Tensor, positive: Tensor, bins: int = 10) -> list[dict[str, float]]:
    """How often what has a probability comes true: for each of `bins` equal parts of 0 to 1 that
    is not empty its ends, how many tokens are in it, their mean probability and the share of them
    that is positive.

    probability, positive: [N], of which the second is bool.
    """
    found = []
    place = (probability * bins).long().clamp(max=bins - 1)
    for k in range(bins):
        chosen = place == k
        if n := int(chosen.sum()):
            found.append({
                "low": k / bins, "high": (k + 1) / bins, "tokens": n,
                "predicted": probability[chosen].mean().item(),
                "relevant": int(positive[chosen].sum()) / n,
            })  # fmt: skip
    return found
