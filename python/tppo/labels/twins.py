"""Answers with a repeated query, made from labelled answers without one.

A model that was trained on true next queries seldom repeats itself, so its answers hardly show a
reward model what a repetition is; PPO then finds that returning one relevant query three times
pays three times.  What a repetition is worth needs no labeller: its words are irrelevant by
definition.
"""

from __future__ import annotations

import random
import re
from typing import NamedTuple

from tppo.labels.label import Label
from tppo.labels.queries import SEPARATOR, repeats
from tppo.labels.words import IRRELEVANT, NONE, RELEVANT, map_labels, word_spans


class Twin(NamedTuple):
    """A labelled answer with one query replaced by another of its own."""

    text: str
    categories: list[int]  # 0 none, 1 irrelevant, 2 relevant, of each character
    sentence: int  # 0 or 1


def repeating_twin(label: Label, threshold: float, rng: random.Random) -> Twin | None:
    """The answer with a later query replaced by an earlier one, half the time one of the two in
    another order.

    The answer stays relevant only if it was and `threshold` of its words still are. None for an
    answer with fewer than two queries, with a repetition, or without a labelled word.
    """
    lines = label.response.split(SEPARATOR)
    if len(lines) < 2 or not label.words or any(repeats(lines)) or not all(map(str.strip, lines)):
        return None
    each = [(i, i + 1) for i in range(len(label.response))]
    categories = map_labels(label.response, label.words, each)
    parts, start = [], 0
    for line in lines:
        parts.append((line, categories[start : start + len(line)]))
        start += len(line) + len(SEPARATOR)
    first, second = sorted(rng.sample(range(len(lines)), 2))
    again, other = parts[first], _reordered(*parts[first], rng)
    # An odd order of words must not give a repetition away: as often the earlier query has it.
    parts[first], parts[second] = rng.choice(
        [(again, again), (again, again), (again, other), (other, again)]
    )
    parts[second] = (parts[second][0], _irrelevant(parts[second][0]))
    text = SEPARATOR.join(line for line, _ in parts)
    merged = parts[0][1] + [c for _, part in parts[1:] for c in (NONE, *part)]
    spans = word_spans(text)
    relevant = sum(RELEVANT in merged[a:b] for a, b in spans)
    return Twin(text, merged, int(label.sentence and relevant >= threshold * len(spans)))


def _reordered(line: str, categories: list[int], rng: random.Random) -> tuple[str, list[int]]:
    """The words of a query in another order, each with what was known of its characters."""
    pieces = [match.span() for match in re.finditer(r"\S+", line)]
    rng.shuffle(pieces)
    text = " ".join(line[a:b] for a, b in pieces)
    moved = [categories[a:b] for a, b in pieces]
    return text, moved[0] + [c for piece in moved[1:] for c in (NONE, *piece)]


def _irrelevant(line: str) -> list[int]:
    categories = [NONE] * len(line)
    for start, end in word_spans(line):
        categories[start:end] = [IRRELEVANT] * (end - start)
    return categories
