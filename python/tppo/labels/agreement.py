"""How far two labellers agree: on words, on answers, and beyond chance (Cohen, 1960)."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

from tppo.errors import DataError, short
from tppo.labels.label import Label, read_labels
from tppo.labels.shares import wilson
from tppo.labels.words import NONE, NOT_LABELLED, map_labels, word_spans


@dataclass(frozen=True)
class Rate:
    """Pairs of 0/1 labels of one kind."""

    pairs: int
    agreement: float | None
    """Share of equal pairs; None without pairs."""
    kappa: float | None
    """(agreement - chance) / (1 - chance); None where chance alone agrees fully."""


@dataclass(frozen=True)
class Agreement:
    """Two labellers compared on the answers that the second one labelled."""

    answers: int
    words: Rate
    sentences: Rate
    unpaired_words: int
    """Words that only one of the two judged."""


def compare(labels: Iterable[Label], others: Iterable[Label]) -> Agreement:
    """Agreement of a run's labels with others, over every id of the others.

    The words are those of the response itself, so that the labellers may have cut it differently.

    Errors: DataError for an id that is there twice or that the run lacks, and for another response.
    """
    of_run, of_file = _by_id(labels, "the run's labels"), _by_id(others, "the file")
    missing = [id for id in of_file if id not in of_run]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(of_file)} ids of the file are not among the run's "
            f"{len(of_run)} labels, the first: {missing[0]!r}"
        )
    words: Counter[tuple[int, int]] = Counter()
    sentences: Counter[tuple[int, int]] = Counter()
    for id, other in of_file.items():
        own = of_run[id]
        if own.response != other.response:
            raise DataError(
                f"id {id!r}: the response of the file was {short(other.response)}, "
                f"expected that of the run, {short(own.response)}"
            )
        sentences[own.sentence, other.sentence] += 1
        words.update(zip(_judged(own), _judged(other), strict=True))
    unpaired = sum(n for pair, n in words.items() if pair.count(NONE) == 1)
    paired = Counter({pair: n for pair, n in words.items() if NONE not in pair})
    return Agreement(len(of_file), _rate(paired), _rate(sentences), unpaired)


@dataclass(frozen=True)
class Pair:
    """Two labellers who labelled the same answers, and how far they agree on those."""

    one: str
    two: str
    result: Agreement


def pairwise(labels: Iterable[Label]) -> list[Pair]:
    """Every two labellers with answers that both labelled, in the order in which they come; of a
    labeller's labels of one answer the last one counts.

    Errors: as of `compare`.
    """
    of: dict[str, dict[str, Label]] = {}
    for label in labels:
        of.setdefault(label.labeller, {})[label.id] = label
    found = []
    for one, two in combinations(of, 2):
        both = of[one].keys() & of[two].keys()
        if both:
            result = compare([of[one][id] for id in both], [of[two][id] for id in both])
            found.append(Pair(one, two, result))
    return found


def _judged(label: Label) -> list[int]:
    """The category of every word of the response, 0 where it was not judged."""
    found = map_labels(label.response, label.words, word_spans(label.response))
    return [NONE if category == NOT_LABELLED else category for category in found]


def compare_files(labels: str | os.PathLike[str], others: str | os.PathLike[str]) -> str:
    """The agreement of two label files, as a table."""
    return shown(compare(read_labels(labels), read_labels(others)))


def shown(result: Agreement) -> str:
    """The agreement as a table, with Wilson's 95 % intervals."""
    rows = [("", "pairs", "agreement", "95 %", "kappa")]
    for name, rate in (("words", result.words), ("answers", result.sentences)):
        agreement = interval = "-"
        if rate.agreement is not None:
            agreement = f"{rate.agreement:.2%}"
            interval = "-".join(f"{100 * end:.1f}" for end in wilson(rate.agreement, rate.pairs))
        kappa = "-" if rate.kappa is None else f"{rate.kappa:.3f}"
        rows.append((name, str(rate.pairs), agreement, interval, kappa))
    lines = [f"{a:<8}{b:>8}{c:>11}{d:>12}{e:>8}" for a, b, c, d, e in rows]
    if result.unpaired_words:
        lines.append(
            f"{result.unpaired_words} words that only one of the two labelled are left out"
        )
    return "\n".join(lines)


def _by_id(labels: Iterable[Label], source: str) -> dict[str, Label]:
    found: dict[str, Label] = {}
    for label in labels:
        if label.id in found:
            raise DataError(f"id {label.id!r} is there twice in {source}, expected once")
        found[label.id] = label
    return found


def _rate(pairs: Counter[tuple[int, int]]) -> Rate:
    n = pairs.total()
    if not n:
        return Rate(0, None, None)
    equal = sum(count for (a, b), count in pairs.items() if a == b)
    first, second = Counter[int](), Counter[int]()
    for (a, b), count in pairs.items():
        first[a] += count
        second[b] += count
    by_chance = sum(first[value] * second[value] for value in first)  # times n * n
    kappa = None if by_chance == n * n else (n * equal - by_chance) / (n * n - by_chance)
    return Rate(n, equal / n, kappa)
