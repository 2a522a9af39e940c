"""The rule labeller: words and answers judged against the true next queries."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

from tppo.labels.label import Label
from tppo.labels.queries import SEPARATOR, repeats
from tppo.labels.unspaced import is_unspaced
from tppo.labels.words import fold, word_spans

RULE = 2  # goes up when the rule's verdicts change: finished stages that used the old one run again


def label_by_rule(id: str, response: str, targets: Sequence[str], threshold: float) -> Label:
    """A word is relevant (1) if it stands in a true next query, both folded, and its own query is
    not the repetition of an earlier one; the answer is relevant (1) if it has words and at least
    `threshold` of them are.

    In a script without spaces a word stands in a query also as a part of a longer run, because
    there where a word ends depends on what stands around it.
    """
    truth = {word for query in targets for word in _words(query)}
    runs = [fold(query).replace(" ", "") for query in targets]
    lines = response.split(SEPARATOR)
    starts = list(accumulate((len(line) + len(SEPARATOR) for line in lines), initial=0))
    repeated = repeats(lines)

    def relevant(start: int, end: int) -> bool:
        if repeated[bisect_right(starts, start) - 1]:
            return False
        word = fold(response[start:end])
        if word in truth:
            return True
        return is_unspaced(word) and any(word in run for run in runs)

    words = tuple((response[a:b], int(relevant(a, b))) for a, b in word_spans(response))
    share = relevance_share([label for _, label in words])
    return Label(id, response, words, int(share >= threshold), "rule")


def relevance_share(words: Sequence[int]) -> float:
    """Share of relevant words; 0 for an answer without words."""
    return sum(words) / len(words) if words else 0.0


@lru_cache(maxsize=1 << 16)
def _words(query: str) -> frozenset[str]:
    return frozenset(fold(query[a:b]) for a, b in word_spans(query))
