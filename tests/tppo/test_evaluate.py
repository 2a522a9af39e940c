"""The rule labeller and the figures of the closing table, on cases counted by hand."""

import pytest
from judged import score_answers

from tppo.evaluation.metrics import distinct_n, repeat_last_query
from tppo.labels.label import Label
from tppo.labels.rule import label_by_rule
from tppo.labels.words import map_labels
from tppo.sessions.session import Event, Session


def session(targets, history=()):
    return Session("s", "u", "made", (), tuple(history), tuple(targets))


def test_the_rule_judges_words_against_the_true_queries():
    label = label_by_rule("x", "Red SHOES\nblue hat", ["red shoes", "cap"], 0.6)
    assert label == Label(
        "x", "Red SHOES\nblue hat", (("Red", 1), ("SHOES", 1), ("blue", 0), ("hat", 0)), 0, "rule"
    )


@pytest.mark.parametrize("again", ["red shoes", "SHOES red", "“red” ｓｈｏｅｓ", "red, shoes!"])
def test_a_repeated_query_is_irrelevant_in_any_order(again):
    label = label_by_rule("x", f"red shoes\n{again}\nred hat", ["red shoes hat"], 0.6)
    assert [relevant for _, relevant in label.words] == [1, 1, 0, 0, 1, 1]
    assert label.sentence == 1  # four of six
    three = "\n".join(["red shoes", again, again])
    assert label_by_rule("x", three, ["red shoes hat"], 0.6).sentence == 0  # two of six


def test_fewer_or_more_words_are_no_repetition():
    label = label_by_rule("x", "red shoes\nred\nred red shoes\n\n", ["red shoes"], 0.6)
    assert [relevant for _, relevant in label.words] == [1] * 6


FOLDINGS = [
    ("wifi router", "wi-fi router"),
    ("wi-fi router", "wifi router"),
    ("ｗｉｆｉ router", "wifi router"),
    ("straße", "STRASSE"),
    ("cafe\u0301", "CAFÉ"),
    ("ｶﾞｽ料金", "ガス料金"),
    ("東京 ホテル", "東京ホテル"),
    ("東京ホテル", "東京 ホテル"),
    ("北京 大学 2024", "北京大学2024"),
    ("กาแฟ ร้าน", "กาแฟร้าน"),
    ("don’t 1，000", "DON'T 1,000"),
]


@pytest.mark.parametrize(("answer", "target"), FOLDINGS)
def test_rule_exact_match_mapping_and_repetition_fold_alike(answer, target):
    figures = score_answers([session([target])], [answer], ["eos"], 0.6)
    assert figures["relevance"] == figures["words"] == figures["exact_match"] == 1.0
    twice = score_answers([session([target] * 2)], [f"{answer}\n{target}"], ["eos"], 0.6)
    assert twice["distinct_queries"] == 1.0 and twice["format"] == 0.0
    # The rule's words are words to the mapping too: every letter gets their label.
    label = label_by_rule("x", answer, [target], 0.6)
    letters = [(i, i + 1) for i, c in enumerate(answer) if c.isalpha() and c not in "\uff9e"]
    assert set(map_labels(answer, label.words, letters)) == {2}


def test_a_word_of_a_script_without_spaces_counts_by_itself():
    label = label_by_rule("x", "大阪のホテル", ["東京ホテル"], 0.6)
    assert dict(label.words) == {"大阪": 0, "の": 0, "ホテル": 1} and label.sentence == 0


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
    # The second query repeats the first: two of four words are relevant, fewer than 60 %.
    assert figures["relevance"] == 0.0 and figures["words"] == 0.25
    assert figures["exact_match"] == pytest.approx(1 / 3)  # of three true queries one is returned
    assert figures["exact_match_new"] == 0.5  # "blue hat" stands in the history
    assert figures["distinct_2"] == 0.5  # "red shoes" twice
    assert figures["queries_per_answer"] == 1.5 and figures["distinct_queries"] == 1.0
    assert figures["format"] == 0.0 and figures["users"] == 2
    assert 0 < figures["chrf"] < 100


def test_half_of_the_answers_are_relevant():
    sessions = [session(["red shoes", "blue hat"]), session(["green tea"])]
    figures = score_answers(sessions, ["red shoes\nhat", "coffee"], ["eos", "eos"], 0.6)
    assert figures["relevance"] == 0.5 and figures["relevance_se"] == pytest.approx(0.125**0.5)
    assert figures["relevance_interval"] == pytest.approx([0.0945, 0.9055], abs=1e-4)  # Wilson
    assert figures["format"] == 1.0 and figures["distinct_queries"] == 1.5


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
