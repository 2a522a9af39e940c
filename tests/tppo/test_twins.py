"""Labelled answers with one query repeated: what the reward model learns repetition from."""

import random

import pytest

from tppo.labels.label import Label
from tppo.labels.queries import parse_answer, repeats
from tppo.labels.rule import label_by_rule
from tppo.labels.twins import repeating_twin


def by_rule(response, targets=("red shoes", "blue hat")):
    return label_by_rule("x", response, targets, 0.6)


def test_a_repeated_query_is_irrelevant_and_the_rest_keeps_its_labels():
    label = by_rule("red shoes\nblue cap\ngreen hat")
    for seed in range(40):
        twin = repeating_twin(label, 0.6, random.Random(seed))
        assert sum(repeats(parse_answer(twin.text))) == 1
        again = by_rule(twin.text)  # the rule says of the twin what the twin says of itself
        position = 0
        for word, relevant in again.words:
            position = twin.text.index(word, position)
            span = twin.categories[position : position + len(word)]
            assert span == [1 + relevant] * len(word), (seed, twin.text, word)
            position += len(word)
        assert twin.sentence == again.sentence
        assert twin.categories[twin.text.index("\n")] == 0


def test_an_odd_order_of_words_does_not_tell_the_repetition_from_the_query():
    """A reward model that had only seen later queries out of order took the order for the fault."""
    label = by_rule("red wool shoes for men\nblue cap")
    first, *_ = lines = label.response.split("\n")
    odd = {"earlier": 0, "later": 0}
    for seed in range(400):
        twin = repeating_twin(label, 0.6, random.Random(seed))
        earlier, later = twin.text.split("\n")
        assert first in (earlier, later) and sorted(earlier.split()) == sorted(later.split())
        odd["earlier"] += earlier != first
        odd["later"] += later != first
        for word in lines[0].split():
            start = twin.text.index(word)
            relevant = word in ("red", "shoes")
            assert twin.categories[start : start + len(word)] == [1 + relevant] * len(word)
    assert all(70 < count < 130 for count in odd.values()), odd


def test_a_twin_is_never_better_than_its_answer():
    label = Label("x", "red shoes\nblue hat", (("red", 1), ("shoes", 1), ("blue", 1)), 0, "judge")
    assert repeating_twin(label, 0.0, random.Random(0)).sentence == 0
    good = Label(*label.__dict__.values())
    object.__setattr__(good, "sentence", 1)
    assert repeating_twin(good, 0.5, random.Random(0)).sentence == 1  # two of four words
    assert repeating_twin(good, 0.6, random.Random(0)).sentence == 0


@pytest.mark.parametrize("response", ["red shoes", "red\n\nblue", "red hat\nhat red\nblue", "a\n"])
def test_answers_that_have_no_twin(response):
    assert repeating_twin(by_rule(response), 0.6, random.Random(0)) is None
    assert repeating_twin(Label("x", "a\nb", (), 0, "judge"), 0.6, random.Random(0)) is None
