"""Two policies on the same histories, and answers held against another user's history."""

import math
from dataclasses import replace

import pytest
from judged import answers_of

from tppo.evaluation.compare import PAIR, compare, other_users, personal_gap
from tppo.evaluation.judge import CallableJudge, RuleJudge
from tppo.evaluation.table import pair_line
from tppo.sessions.session import Session

QUERIES = ["red shoes", "blue hat", "green tea", "cap"]
SESSIONS = [
    Session(f"s{i}", f"u{i}", "made", (), (), (query,)) for i, query in enumerate(QUERIES)
]


def given(texts, sessions=SESSIONS, prompts=()):
    return answers_of(sessions, texts, ["eos"] * len(texts), prompts)


def test_wins_ties_and_losses_by_the_figure_of_any_judge():
    one, other = given(["red shoes", "x", "green tea", "cap"]), given(["x", "y", "cup", "cap"])
    found = compare(RuleJudge(0.6), one, other)
    half = 1.959964 * math.sqrt((0.5 - 0.25) / 4)
    assert found == {
        "sessions": 4, "win": 0.5, "tie": 0.5, "lose": 0.0, "net": 0.5,
        "net_interval": pytest.approx([0.5 - half, 0.5 + half]),
    }  # fmt: skip
    back = compare(RuleJudge(0.6), other, one)
    assert (back["win"], back["lose"], back["net"]) == (0.0, 0.5, -0.5)
    assert pair_line(PAIR, found) == (
        "tppo against sft, session by session: wins 0.500, ties 0.500, loses 0.000; wins less "
        "losses +0.500 (+0.010 to +0.990)"
    )
    scores = CallableJudge(lambda completions: [len(text) for text in completions], "length")
    one, other = (given(texts, prompts=QUERIES) for texts in (QUERIES, ["x", "y", "z", "long cap"]))
    found = compare(scores, one, other)
    assert (found["win"], found["lose"]) == (0.75, 0.25)


class Taste:
    """A judge that sees pairs; its figures must not be asked for."""

    name = "taste"

    def __call__(self, answers):
        raise AssertionError

    def prefers(self, first, second):
        return [1, 1, 0, -1]


def test_a_judge_that_sees_pairs_is_asked_for_pairs():
    found = compare(Taste(), given(QUERIES), given(QUERIES))
    assert (found["win"], found["tie"], found["lose"]) == (0.5, 0.25, 0.25)
    assert found["net_interval"][0] == pytest.approx(
        0.25 - 1.959964 * math.sqrt((0.75 - 0.25**2) / 4)
    )


def test_the_gap_is_that_between_the_own_and_another_users_history():
    own = personal_gap(RuleJudge(0.6), given(QUERIES), 0)
    assert own["personal_gap"] == 1.0 and own["personal_gap_interval"][1] == 1.0
    popular = [replace(session, targets=(*session.targets, "news")) for session in SESSIONS]
    same = personal_gap(RuleJudge(0.6), given(["news"] * 4, popular), 0)
    assert same["personal_gap"] == 0.0  # relevant to everybody, and to nobody in particular
    one = [replace(session, user="u") for session in SESSIONS]
    assert personal_gap(RuleJudge(0.6), given(QUERIES, one), 0) == {}


def test_a_function_sees_the_other_users_prompt_and_columns_with_the_same_answer():
    seen = []

    def judge(prompts, completions, session):
        seen.append(list(zip(prompts, completions, [s.id for s in session], strict=True)))
        return [float(p == c) for p, c in zip(prompts, completions, strict=True)]

    found = personal_gap(CallableJudge(judge, "x"), given(QUERIES, prompts=QUERIES), 1)
    assert found["personal_gap"] == 1.0
    straight, swapped = seen
    assert [row[1] for row in straight] == [row[1] for row in swapped] == QUERIES
    for prompt, completion, session in swapped:
        assert prompt != completion and QUERIES[int(session[1:])] == prompt


@pytest.mark.parametrize("users", ["abc", "aab", "aaab", "abababab", "aaaabc"])
def test_partners_are_of_other_users(users):
    for seed in range(5):
        partners = other_users(list(users), seed)
        assert all(users[i] != users[p] for i, p in enumerate(partners))
        assert partners == other_users(list(users), seed)
    assert other_users(["a", "a"], 0) is None
