"""Judges: figures of how good answers are, for the closing table and to choose weights by.

A judge is any callable with the signature of `Judge`: the rule, a function of the user.  It gets
texts and columns of the data, never rewards, so that it need not be what the policy is trained on;
where it is the labeller of the reward model's data all the same, the closing table has a line
about it.

This file loads no torch, so that the closing table is printed at once.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, Protocol

from tppo.errors import DataError, short
from tppo.evaluation.page import visible
from tppo.labels.hand import BY_HAND
from tppo.labels.queries import distinct_queries, has_format, parse_answer
from tppo.labels.rule import label_by_rule, relevance_share
from tppo.labels.shares import Z, wilson
from tppo.plain_text import plain_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tppo.rewards import Answers
    from tppo.sessions.session import Session

LARGEST = sys.float_info.max
SESSION = "session"  # the column that holds the sessions whose next queries were asked for
FORMAT = "format"  # the figure that --ppo.min-format bounds, where a judge has it
RULE = "rule"  # the name of the rule, as a judge and as a labeller
TAKEN = {"users", "kl", "length"}  # what stands beside a judge's figures
Figures = Mapping[str, Sequence[float]]


class Judge(Protocol):
    """Figures of answers; `name` is what the table and the log call the judge."""

    @property
    def name(self) -> str:
        """The judge's name."""
        ...

    def __call__(self, answers: Answers) -> Figures:
        """Figures by name, one finite number an answer each; larger is better.

        The first is the one by which PPO keeps weights and the closing table compares.  A figure
        named "format" is the share of answers that have the form asked for.
        """
        ...


@dataclass(frozen=True)
class RuleJudge:
    """The rule against the true next queries of the sessions in the column "session".

    relevance           1 where the rule calls the answer relevant, else 0
    words               share of relevant words
    queries_per_answer  queries of the answer
    distinct_queries    those that repeat no earlier one
    format              1 where the answer ended by itself and has the right number of distinct
                        queries, else 0

    A query that has the words of an earlier one of its answer, in any order, is a repetition: its
    words are irrelevant.
    """

    threshold: float
    """Share of relevant words from which on an answer is relevant."""
    name: str = RULE

    def __call__(self, answers: Answers) -> dict[str, list[float]]:
        """Errors: DataError where the answers have no column of sessions."""
        targets = [session.targets for session in sessions_of(answers, self.name)]
        texts = answers.texts
        labels = [
            label_by_rule(str(i), text, queries, self.threshold)
            for i, (text, queries) in enumerate(zip(texts, targets, strict=True))
        ]
        shares = [relevance_share([relevant for _, relevant in label.words]) for label in labels]
        return {
            "relevance": [label.sentence for label in labels],
            "words": shares,
            "queries_per_answer": [len(parse_answer(text)) for text in texts],
            "distinct_queries": [distinct_queries(text) for text in texts],
            FORMAT: formats(answers, targets),
        }


class CallableJudge:
    """A function of the user, `f(prompts, completions, **columns) -> list of numbers`.

    It is called as a reward function is (`tppo.rewards.user_function.UserFunction`).  Its
    one figure is called "score".
    Errors: DataError where the function cannot be called by name.
    """

    def __init__(self, function: Callable[..., Sequence[float]], name: str) -> None:
        from tppo.rewards.user_function import UserFunction

        self.function, self.name = UserFunction(function, "judge"), name

    def __call__(self, answers: Answers) -> dict[str, list[float]]:
        """Errors: DataError naming the function, and the entry that is no finite number."""
        found, n = self.function(answers), len(answers.response_ids)
        return {"score": _numbers(self.function.name, found, n)}


def judge_answers(judge: Judge, answers: Answers) -> dict[str, Any]:
    """The mean of each figure over the answers, how many there are (`users`), and for the first
    figure its standard error `_se` and 95 % `_interval`: Wilson's where it is 0 or 1 in every
    answer, of a normal distribution elsewhere.

    Errors: DataError naming the judge and the figure that is not one finite number an answer.
    """
    return averaged(each_figure(judge, answers), len(answers.response_ids))


def each_figure(judge: Judge, answers: Answers) -> dict[str, list[float]]:
    """The judge's figures, a finite number an answer each.

    Errors: DataError naming the judge and the figure that is not one finite number an answer.
    """
    n, figures = len(answers.response_ids), judge(answers)
    if not isinstance(figures, Mapping) or not figures:
        raise DataError(f"judge {judge.name!r} gave {short(figures)}, expected at least one figure "
                        "by its name: {'score': [a number an answer]}")  # fmt: skip
    if taken := TAKEN.intersection(figures):
        raise DataError(f"judge {judge.name!r} gave a figure {min(taken)!r}, expected another "
                        f"name than {', '.join(sorted(TAKEN))}: every judge has these")  # fmt: skip
    return {name: _numbers(f"figure {name!r} of judge {judge.name!r}", given, n)
            for name, given in figures.items()}  # fmt: skip


def averaged(figures: Mapping[str, Sequence[float]], n: int) -> dict[str, Any]:
    """What `judge_answers` gives, of the figures of n answers."""
    result: dict[str, Any] = {"users": n}
    for i, (name, values) in enumerate(figures.items()):
        mean = result[name] = sum(values) / n if n else 0.0
        if i == 0:
            binary = set(values) <= {0, 1}
            spread = mean * (1 - mean) if binary else sum((v - mean) ** 2 for v in values) / n
            error = result[f"{name}_se"] = math.sqrt(spread / max(n, 1))
            interval = wilson(mean, n) if binary else (mean - Z * error, mean + Z * error)
            result[f"{name}_interval"] = list(interval)
    return result


def first_figure(row: Mapping[str, Any]) -> str | None:
    """The name of the figure that `judge_answers` gave an interval, None without one."""
    return next((name for name in row if f"{name}_interval" in row), None)


SPOKEN = {RULE: "the rule", "intent": "the latent intent", "next-query": "the true next query"}


def spoken(name: str | Sequence[str]) -> str:
    """A judge's or labeller's name within a sentence, or those of several labellers."""
    if not isinstance(name, str):
        return " and ".join(map(spoken, name))
    if name.startswith(BY_HAND):
        return f"{visible(name.removeprefix(BY_HAND))} by hand"
    return SPOKEN.get(name, name)


def sessions_of(answers: Answers, judge: str) -> Sequence[Session]:
    """The sessions that answers belong to.  Errors: DataError where their column is not there."""
    if SESSION not in answers.columns:
        raise DataError(
            f"the columns of the answers were {sorted(answers.columns)}, expected {SESSION!r}: "
            f"{spoken(judge)} judges against the true next queries of a session"
        )
    return answers.columns[SESSION]


def formats(answers: Answers, targets: Sequence[Sequence[str]]) -> list[float]:
    """1 where an answer ended by itself and has as many distinct queries as truly came, else 0."""
    return [
        has_format(text, len(queries), end)
        for text, queries, end in zip(answers.texts, targets, finish(answers), strict=True)
    ]


def finish(answers: Answers) -> list[str]:
    """How each answer ended: "eos", or "length" where it was cut."""
    ends = set(answers.eos_ids)
    return ["eos" if ids and ids[-1] in ends else "length" for ids in answers.response_ids]


def written(
    texts: Sequence[str],
    prompts: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
    tokenizer: PreTrainedTokenizerBase,
) -> Answers:
    """Answers that no model sampled, to be judged like the others: each one ended by itself."""
    from tppo.rewards import Answers

    end = tokenizer.eos_token_id
    ids = [[*plain_text(tokenizer).ids(text), end] for text in texts]
    answers = Answers(prompts, ids, columns, tokenizer, [end], range(len(texts)))
    vars(answers)["texts"] = list(texts)  # not every tokenizer gives back what it has encoded
    return answers


def _numbers(who: str, found: Any, n: int) -> list[float]:
    """The figures as numbers; arrays and tensors, and lists of those that hold one, are taken."""
    found = found.tolist() if hasattr(found, "tolist") else list(found)
    if len(found) != n:
        raise DataError(f"{who} gave {len(found)} entries, expected {n}: one an answer")
    values = [value.item() if getattr(value, "ndim", None) == 0 else value for value in found]
    for i, value in enumerate(values):
        size: Any = abs(value) if isinstance(value, Real) else math.nan
        if not size <= LARGEST:
            raise DataError(f"{who}: entry {i} was {short(value)}, expected a finite number")
    return values
