"""The queries of an answer, one per line, and which of them repeat an earlier one."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

from tppo.labels.unspaced import is_unspaced, unspaced_pieces
from tppo.labels.words import fold

SEPARATOR = "\n"

__all__ = [
    "SEPARATOR", "answer_text", "distinct_queries", "has_format", "parse_answer", "query_key",
    "query_text", "repeats", "without_repeats",
]  # fmt: skip


def answer_text(queries: Sequence[str]) -> str:
    """The answer that lists `queries`."""
    return SEPARATOR.join(queries)


def parse_answer(text: str) -> list[str]:
    """The queries of an answer; empty lines are dropped."""
    return [query for line in text.split(SEPARATOR) if (query := line.strip())]


def has_format(text: str, queries: int, finish: str) -> bool:
    """Whether an answer ended by itself and is exactly `queries` non-empty lines, none a repeat.

    A query that repeats an earlier one adds nothing, so an answer with one has fewer queries than
    were asked for.
    """
    lines = text.split(SEPARATOR)
    whole = finish == "eos" and len(lines) == queries and all(line.strip() for line in lines)
    return whole and not any(repeats(lines))


@lru_cache(maxsize=1 << 16)
def query_text(query: str) -> str:
    """A query as it is compared whole: folded, and without spaces in scripts that write none."""
    first, *rest = fold(query).split(" ")
    for word in rest:
        joined = is_unspaced(first[-1:]) or is_unspaced(word[:1])
        first += word if joined else f" {word}"
    return first


@lru_cache(maxsize=1 << 16)
def query_key(query: str) -> tuple[str, ...]:
    """What two queries have in common that hold the same words in any order; () without words.

    In a script without spaces the characters count, because there where a word ends depends on
    what stands around it.
    """
    return tuple(sorted(piece for word in fold(query).split() for piece in unspaced_pieces(word)))


def repeats(queries: Sequence[str]) -> list[bool]:
    """For each query whether an earlier one has the same words, in any order."""
    seen: set[tuple[str, ...]] = set()
    found = []
    for key in map(query_key, queries):
        found.append(key in seen)
        seen.add(key)
    return found


def without_repeats(
    text: str, words: Sequence[tuple[str, int]]
) -> tuple[tuple[tuple[str, int], ...], int]:
    """The labels of all words of an answer, in order, with those of a repeated query 0; and how
    many of them were 1.

    A word may be cut in any way: it belongs to the query that its first character stands in.
    """
    lines = text.split(SEPARATOR)
    repeated = repeats(lines)
    if not any(repeated):
        return tuple(words), 0
    ends = list(accumulate(len(_letters(line)) for line in lines))
    found, changed, start = [], 0, 0
    for word, label in words:
        again = bool(label) and repeated[min(bisect_right(ends, start), len(lines) - 1)]
        found.append((word, 0 if again else label))
        changed += again
        start += len(_letters(word))
    return tuple(found), changed


def _letters(text: str) -> str:
    return fold(text).replace(" ", "")


def distinct_queries(text: str) -> int:
    """The number of queries of an answer that repeat no earlier one."""
    return repeats(parse_answer(text)).count(False)
