"""Two answers to the same history, and one answer held against two histories."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from tppo.evaluation.judge import Judge, judge_answers, sessions_of
from tppo.labels.shares import Z

if TYPE_CHECKING:
    from tppo.rewards import Answers

PAIR = "tppo against sft"  # the pair of policies in result.json


@runtime_checkable
class PairJudge(Protocol):
    """A judge that sees two answers side by side."""

    def prefers(self, first: Answers, second: Answers) -> Sequence[int]:
        """For each question 1 where the first answer is better, -1 where the second is, 0 for a
        tie; the judge's to see to that neither place is an advantage.
        """
        ...


def compare(judge: Judge, first: Answers, second: Answers) -> dict[str, Any]:
    """How often the first policy's answer wins, ties and loses against the second's, question by
    question: by `prefers` of a judge that sees pairs, else by the judge's first figure of each.

        net = win - lose,   its 95 % interval  net -+ z sqrt((win + lose - net^2) / n)

    which is that of the mean of n independent values 1, 0 and -1.
    """
    if isinstance(judge, PairJudge):
        found = list(judge.prefers(first, second))
    else:
        one, other = (next(iter(judge(answers).values())) for answers in (first, second))
        found = [(a > b) - (a < b) for a, b in zip(one, other, strict=True)]
    n = len(found)
    win, tie, lose = (found.count(value) / n if n else 0.0 for value in (1, 0, -1))
    net = win - lose
    half = Z * math.sqrt(max(win + lose - net * net, 0.0) / max(n, 1))
    return {"sessions": n, "win": win, "tie": tie, "lose": lose, "net": net,
            "net_interval": [max(-1.0, net - half), min(1.0, net + half)]}  # fmt: skip


def personal_gap(judge: Judge, answers: Answers, seed: int) -> dict[str, Any]:
    """How much better answers are for the user that they were given to than for another one.

        gap = mean_i (s(answer_i, session_i) - s(answer_i, session_p(i)))

    with the judge's first figure s and a partner p(i) of another user, drawn by `seed`; and its
    95 % interval, of a normal distribution over the paired differences.  Nothing is sampled again:
    the same answers are judged against what another user wanted, so that a policy that gives
    everybody the same popular queries has a gap of 0, however relevant they are.

    Empty where there is only one user.
    """
    partners = other_users([s.user for s in sessions_of(answers, judge.name)], seed)
    if partners is None:
        return {}
    columns = {name: [column[p] for p in partners] for name, column in answers.columns.items()}
    prompts = [answers.prompts[p] for p in partners] if answers.prompts else []
    swapped = type(answers)(
        prompts, answers.response_ids, columns, answers.tokenizer, answers.eos_ids, answers.groups
    )
    vars(swapped)["texts"] = answers.texts
    figures = [judge(given) for given in (answers, swapped)]
    own, other = (next(iter(found.values())) for found in figures)
    gap = judge_answers(_Known([a - b for a, b in zip(own, other, strict=True)]), answers)
    return {"personal_gap": gap["gap"], "personal_gap_interval": gap["gap_interval"]}


def other_users(users: Sequence[str], seed: int) -> list[int] | None:
    """For each row the index of one of another user; None where all are of one user.

    The rows stand shuffled on a circle; a partner is the next one that is of another user.
    """
    if len(set(users)) < 2:
        return None
    n = len(users)
    circle = random.Random(f"{seed}/partners").sample(range(n), n)
    found = [0] * n
    for place, i in enumerate(circle):
        following = (circle[(place + step) % n] for step in range(1, n))
        found[i] = next(j for j in following if users[j] != users[i])
    return found


class _Known:
    """Paired differences as a judge's figure, which get the interval of any other."""

    name = "paired differences"

    def __init__(self, gaps: Sequence[float]) -> None:
        self.gaps = gaps

    def __call__(self, answers: Answers) -> dict[str, Sequence[float]]:
        return {"gap": self.gaps}
