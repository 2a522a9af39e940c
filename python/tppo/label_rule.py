"""The rule labeller: words and answers judged against the true next queries."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from tppo.labels import Label
from tppo.mapping import word_spans


def label_by_rule(id: str, response: str, targets: Sequence[str], threshold: float) -> Label:
    """A word is relevant (1) if it stands in a true next query, compared case-folded in NFKC; the
    answer is relevant (1) if it has words and at least `threshold` of them are.
    """
    truth = {word for query in targets for word in _words(query)}
    words = tuple(
        (response[a:b], int(_fold(response[a:b]) in truth)) for a, b in word_spans(response)
    )
    share = relevance_share([relevant for _, relevant in words])
    return Label(id, response, words, int(share >= threshold), "rule")


def relevance_share(words: Sequence[int]) -> float:
    """Share of relevant words; 0 for an answer without words."""
    return sum(words) / len(words) if words else 0.0


@lru_cache(maxsize=1 << 16)
def _words(query: str) -> frozenset[str]:
    return frozenset(_fold(query[a:b]) for a, b in word_spans(query))


def _fold(word: str) -> str:
    return unicodedata.normalize("NFKC", word).casefold()
