"""Agreement of two labellers against figures worked out by hand."""

import pytest

from tppo.labels.agreement import compare, compare_files
from tppo.labels.label import Label, write_labels
from tppo.store.jsonl import DataError


def labelled(id, response, labels, sentence=1):
    words = tuple(zip(response.split(), labels, strict=True))
    return Label(id, response, words, sentence, "x")


def test_cohens_example():
    """50 answers; yes/yes 20, yes/no 5, no/yes 10, no/no 15: 70 % agree, kappa 0.4."""
    pairs = [(1, 1)] * 20 + [(1, 0)] * 5 + [(0, 1)] * 10 + [(0, 0)] * 15
    own, theirs = (
        [labelled(f"s{i}", "red", [1 - pair[side]], pair[side]) for i, pair in enumerate(pairs)]
        for side in (0, 1)
    )
    result = compare(own, reversed(theirs))
    assert result.answers == 50 and result.unpaired_words == 0
    for rate in (result.words, result.sentences):
        assert (rate.pairs, rate.agreement) == (50, 0.7)
        assert rate.kappa == pytest.approx(0.4, abs=1e-12)


def test_words_are_those_of_the_response_however_they_were_cut():
    own = [Label("a", "Red shoes, blue hat", (("red shoes", 1), ("blue", 0), ("hat", 0)), 1, "x")]
    theirs = [Label("a", "Red shoes, blue hat", (("Red", 1), ("shoes", 0), ("blue", 0)), 1, "y")]
    result = compare(own, theirs)
    assert (result.words.pairs, result.words.agreement) == (3, 2 / 3)
    assert result.unpaired_words == 1
    assert result.words.kappa == pytest.approx((2 / 3 - 4 / 9) / (1 - 4 / 9))
    assert result.sentences.agreement == 1.0 and result.sentences.kappa is None


def test_opposite_labellers_and_labellers_without_words():
    own = [labelled("a", "red hat", [1, 0]), labelled("b", "x", [1])]
    theirs = [labelled("a", "red hat", [0, 1])]
    assert compare(own, theirs).words.kappa == -1.0  # the run may have labelled more
    nothing = compare([Label("a", "red", (), 1, "x")], [Label("a", "red", (), 1, "y")])
    assert nothing.words.pairs == 0 and nothing.words.agreement is None


ONE = labelled("a", "red hat", [1, 0])


@pytest.mark.parametrize(
    ("own", "theirs", "message"),
    [
        ([ONE], [ONE, labelled("b", "x", [1])], "1 of 2 ids of the file are not .* first: 'b'"),
        ([ONE], [ONE, ONE], "id 'a' is there twice in the file"),
        ([ONE, ONE], [ONE], "id 'a' is there twice in the run's labels"),
        ([ONE], [labelled("a", "red cap", [1, 0])], "id 'a': .* was 'red cap', .* 'red hat'"),
    ],
)
def test_labels_that_do_not_belong_together_are_named(own, theirs, message):
    with pytest.raises(DataError, match=message):
        compare(own, theirs)


def test_the_table_of_two_files(tmp_path):
    write_labels(tmp_path / "own.jsonl", [ONE, labelled("b", "red hat", [1, 1], 0)])
    write_labels(tmp_path / "file.jsonl", [ONE, labelled("b", "red hat", [1, 0], 0)])
    table = compare_files(tmp_path / "own.jsonl", tmp_path / "file.jsonl").splitlines()
    assert [line.split() for line in table] == [
        ["pairs", "agreement", "95", "%", "kappa"],
        ["words", "4", "75.00%", "30.1-95.4", "0.500"],
        ["answers", "2", "100.00%", "34.2-100.0", "1.000"],
    ]
