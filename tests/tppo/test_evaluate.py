"""The rule labeller and the figures of the closing table, on cases counted by hand."""

import pytest

from tppo.evaluate import distinct_n, print_table, repeat_last_query, score_answers
from tppo.label_rule import label_by_rule
from tppo.labels import Label
from tppo.sessions import Event, Session


def session(targets, history=()):
    return Session("s", "u", "made", (), tuple(history), tuple(targets))


def test_the_rule_judges_words_against_the_true_queries():
    label = label_by_rule("x", "Red SHOES\nblue hat", ["red shoes", "cap"], 0.6)
    assert label == Label(
        "x", "Red SHOES\nblue hat", (("Red", 1), ("SHOES", 1), ("blue", 0), ("hat", 0)), 0, "rule"
    )


def test_the_rule_calls_an_answer_relevant_from_its_threshold_on():
    assert label_by_rule("x", "a b c\nd e", ["a b", "c"], 0.6).sentence == 1
    assert label_by_rule("x", "a b c\nd e", ["a b"], 0.6).sentence == 0
    assert label_by_rule("x", "", ["a b"], 0.6).sentence == 0
    # A word counts whole: "sho" is not in "shoes".
    assert label_by_rule("x", "sho", ["shoes"], 0.6).words == (("sho", 0),)


def test_figures_counted_by_hand():
    sessions = [
        session(["red shoes", "blue hat"], [Event("search", "Blue hat")]),
        session(["green tea"]),
    ]
    figures = score_answers(sessions, ["red shoes\nRED shoes", "coffee"], ["eos", "length"], 0.6)
    assert figures["relevance"] == 0.5 and figures["relevance_se"] == pytest.approx(0.125**0.5)
    assert figures["words"] == 0.5
    assert figures["exact_match"] == pytest.approx(1 / 3)  # of three true queries one is returned
    assert figures["exact_match_new"] == 0.5  # "blue hat" stands in the history
    assert figures["distinct_2"] == 0.5  # "red shoes" twice
    assert figures["queries_per_answer"] == 1.5 and figures["distinct_queries"] == 1.0
    assert figures["format"] == 0.5 and figures["users"] == 2
    assert 0 < figures["chrf"] < 100


def test_perfect_answers():
    figures = score_answers([session(["red shoes"])], ["red shoes"], ["eos"], 0.6)
    assert figures["chrf"] == pytest.approx(100) and figures["exact_match"] == 1


def test_distinct_n_without_any_ngram():
    assert distinct_n(["one", ""], 2) == 0.0


def test_the_last_query_is_a_search_where_there_is_one():
    events = [Event("search", "old"), Event("search", "new"), Event("click", "page")]
    assert repeat_last_query(session(["x"], events)) == "new"
    assert repeat_last_query(session(["x"], [Event("utterance", "hi")])) == "hi"
    assert repeat_last_query(session(["x"])) == ""


def test_the_table_fits_80_columns(capsys):
    row = score_answers([session(["red shoes"])], ["red shoes"], ["eos"], 0.6)
    print_table({"tppo_transfer": row | {"kl": 4.25, "length": 15.04}}, "title")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "1.000±0.000" in lines[-1] and "15.0" in lines[-1] and "…" not in "".join(lines)
