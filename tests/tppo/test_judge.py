"""Judges: the rule, a function of the user, and what is said of either."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from judged import answers_of

from tppo.errors import DataError
from tppo.evaluation.judge import CallableJudge, RuleJudge, judge_answers
from tppo.evaluation.table import findings, judge_line, print_table
from tppo.sessions.session import Session

SESSIONS = [
    Session("a", "u", "made", (), (), ("red shoes", "blue hat")),
    Session("b", "v", "made", (), (), ("green tea",)),
]
TEXTS = ["red shoes\nblue hat", "coffee\ncoffee"]
ANSWERS = answers_of(SESSIONS, TEXTS, ["eos", "length"], prompts=["one", "two"])


def test_the_rule_gives_a_number_an_answer():
    assert RuleJudge(0.6)(ANSWERS) == {
        "relevance": [1, 0], "words": [1.0, 0.0], "queries_per_answer": [2, 2],
        "distinct_queries": [2, 1], "format": [True, False],
    }  # fmt: skip
    with pytest.raises(DataError, match=r"\['suggested_length'\], expected 'session'"):
        RuleJudge(0.6)(ANSWERS.__class__([], [[1]], {"suggested_length": [2.0]}, None, [0], [0]))


def lengths(prompts, completions, session, **columns):
    assert prompts == ["one", "two"] and session == SESSIONS
    assert set(columns) == {"completion_ids"}
    return [len(text) for text in completions]


def test_a_function_judges_texts_with_columns_by_name():
    judge = CallableJudge(lengths, "letters")
    assert judge(ANSWERS) == {"score": [18, 13]}
    assert CallableJudge(lambda completions: np.array([1.5, 2]), "x")(ANSWERS) == {
        "score": [1.5, 2.0]
    }


@pytest.mark.parametrize(
    "given", [torch.tensor([0.5, 1]), [torch.tensor(0.5), np.float32(1)], np.array([0.5, 1])]
)
def test_figures_may_be_arrays_and_tensors(given):
    assert judge_answers(Judge({"good": given}), ANSWERS)["good"] == 0.75
    assert CallableJudge(lambda completions: given, "x")(ANSWERS) == {"score": [0.5, 1.0]}
    verdicts = [np.bool_(True), torch.tensor(False)]
    assert CallableJudge(lambda completions: verdicts, "x")(ANSWERS) == {"score": [1, 0]}


def test_a_function_judges_chats_as_messages():
    chats = [[{"role": "user", "content": "one"}], [{"role": "user", "content": "two"}]]
    answers = answers_of(SESSIONS, TEXTS, ["eos", "eos"], prompts=chats)

    def seen(prompts, completions):
        assert prompts == chats
        assert completions[1] == [{"role": "assistant", "content": TEXTS[1]}]
        return [0, 1]

    assert CallableJudge(seen, "x")(answers) == {"score": [0, 1]}


def unusable(completions):
    return unusable.value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0], "judge unusable returned 1 entries, expected 2: one an answer"),
        (None, "judge unusable returned None, a NoneType, expected a list with one entry"),
        ("ab", "judge unusable returned 'ab', a str, expected a list"),
        ([1.0, None], "judge unusable: entry 1 was None, expected a finite number"),
        ([math.nan, 1.0], "judge unusable: entry 0 was nan, expected a finite number"),
        ([1.0, math.inf], "judge unusable: entry 1 was inf, expected a finite number"),
        ([1.0, 10**400], "judge unusable: entry 1 was 1000.*expected a finite number"),
        ([1.0, "2"], "judge unusable: entry 1 was '2', expected a finite number"),
        (torch.tensor([0.5, math.nan]), "judge unusable: entry 1 was nan"),
    ],
)
def test_what_a_function_may_not_return_is_named(value, message):
    unusable.value = value
    with pytest.raises(DataError, match=message):
        CallableJudge(unusable, "mine")(ANSWERS)


class Judge(NamedTuple):
    """A judge of somebody else's, which nothing has checked yet."""

    figures: dict
    name: str = "theirs"

    def __call__(self, answers):
        return self.figures


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        ({}, "judge 'theirs' gave {}, expected at least one figure"),
        ([1.0, 2.0], r"judge 'theirs' gave \[1.0, 2.0\], expected at least one figure by its name"),
        ({"kl": [1.0, 2.0]}, "gave a figure 'kl', expected another name than kl, length, users"),
        ({"good": [1, 2], "fine": [1]}, "figure 'fine' of judge 'theirs' gave 1 entries"),
        ({"good": [1, math.nan]}, "figure 'good' of judge 'theirs': entry 1 was nan"),
    ],
)
def test_the_figures_of_any_judge_are_checked(figures, message):
    with pytest.raises(DataError, match=message):
        judge_answers(Judge(figures), ANSWERS)


def test_the_interval_of_scores_is_a_normal_ones_and_of_shares_wilsons():
    found = judge_answers(Judge({"score": [1.0, 4.0], "format": [0, 1]}), ANSWERS)
    error = 1.5 / math.sqrt(2)  # of the mean of 1 and 4
    assert found == {
        "users": 2, "score": 2.5, "score_se": pytest.approx(error), "format": 0.5,
        "score_interval": pytest.approx([2.5 - 1.959964 * error, 2.5 + 1.959964 * error]),
    }  # fmt: skip
    shares = judge_answers(Judge({"won": [0, 1]}), ANSWERS)
    assert shares["won_interval"] == pytest.approx([0.0945, 0.9055], abs=1e-4)


TEST = {"judge": "judge-1", "labeller": "rule", "threshold": 0.6}


def test_the_table_names_the_judge_and_says_where_it_is_the_labeller(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    row = judge_answers(Judge({"score": [1.0, 4.0]}), ANSWERS) | {"kl": 1.0, "length": 3.0}
    result = {"sft": row, "tppo": row, "test": TEST, "findings": []}
    print_table(result, "t")
    said = " ".join(capsys.readouterr().out.split())
    assert "score 95 %" in said and "2.500 .421-4.579" in said and "relevance" not in said
    assert "score: judged by judge-1 (not by the rule, which labelled the reward model's" in said
    same = judge_line(TEST | {"labeller": "judge-1"}, "score")
    assert "judged by judge-1 (which also labelled the reward model's data)" in same


def test_findings_compare_the_judges_figure():
    def row(mean, half):
        return {"users": 9, "score": mean, "score_interval": [mean - half, mean + half], "kl": 1.0}

    training = {"auc": 0.9, "relevant_share": 0.3, "first_reward": 1.0, "last_reward": 3.0,
                "qualified": True, "sessions": 40}  # fmt: skip
    case = {"sft": row(2.0, 0.3), "training": training}
    assert findings(case | {"tppo": row(2.5, 0.3)}) == []  # 0.5 above by 0.424 at most by chance
    (chance,) = findings(case | {"tppo": row(2.4, 0.3)})
    assert chance.startswith("PPO did not help beyond chance (score 2.400 against 2.000 of SFT)")
    (worse,) = findings(case | {"tppo": row(1.5, 0.1)})
    assert worse.startswith("PPO made the answers worse (score 1.500 against 2.000 of SFT)")
