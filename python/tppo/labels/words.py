"""Phase II: word labels become token categories, by character offsets.

Token-level PPO (Ouyang et al., EMNLP 2025), figure 3: every sub-token of a word copies the word's
category, without averaging; tokens of no labelled word get 0.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from tppo.labels.unspaced import dictionary_borders, is_unspaced

NONE, IRRELEVANT, RELEVANT = 0, 1, 2
NOT_LABELLED = -1  # label and category of a word that the labeller did not judge
NOT_LABELLED = -1  # in place of a category: of a word that nobody judged

_REMEMBERED = 1 << 16  # words and characters of a log come again and again
_ZWJ, _KEYCAP = "\u200d", "\u20e3"
_JOINED = "\u200d\uff9e\uff9f"  # also the sound marks of Katakana in half width
_VARIATION = "\ufe0e\ufe0f"
_APOSTROPHES = "'\u2019\u02bc"
_BETWEEN_DIGITS = ".,:/"
_SEPARATORS = ',;:|<>()[]{}"\u201c\u201d\u201e\u00ab\u00bb\u3001\u3002\uff0c\uff1b\u2026\u200b'


def word_spans(text: str) -> list[tuple[int, int]]:
    """Half-open character spans of the words of a text, in order.

    A word is a maximal run of letters, digits, symbols or emoji, in whole grapheme clusters. One
    punctuation mark between two of them belongs to it ("t-shirt", "3.5", "don't"), a separator such
    as a comma only between digits; a run of emoji is a word of its own. In a script without spaces
    the words are those of ICU's dictionaries (Unicode's word boundaries, UAX #29).
    """
    spans: list[tuple[int, int]] = []
    previous: _Unit | None = None
    borders = dictionary_borders(text) if is_unspaced(text) else frozenset()
    for unit in _units(text, frozenset()):
        joined = previous is not None and not unit.spaced and unit.emoji == previous.emoji
        if joined and (unit.bound or unit.start not in borders):
            spans[-1] = (spans[-1][0], unit.end)
        else:
            spans.append((unit.start, unit.end))
        previous = unit
    return spans


def count_words(text: str) -> int:
    """The number of words of a text."""
    if is_unspaced(text):
        return len(word_spans(text))
    return sum(map(_count_part, text.split()))


@lru_cache(maxsize=_REMEMBERED)
def _count_part(part: str) -> int:
    return len(word_spans(part))


@lru_cache(maxsize=_REMEMBERED)
def fold(text: str) -> str:
    """The words of a text as they are compared everywhere: case-folded, NFKC, without punctuation,
    single spaces.
    """
    parts = text.split()
    if not all(_begins_cluster(part[0]) for part in parts):  # an accent upon a space
        return _content(text).key
    return " ".join(filter(None, map(_fold_part, parts)))


def _fold_part(part: str) -> str:
    return part.lower() if part.isascii() and part.isalnum() else _fold_any_part(part)


@lru_cache(maxsize=_REMEMBERED)
def _fold_any_part(part: str) -> str:
    return _Content(part, frozenset()).key


@lru_cache(maxsize=_REMEMBERED)
def _begins_cluster(character: str) -> bool:
    return not _extends(f" {character}", 0, 1)


def map_labels(
    text: str,
    words: Sequence[tuple[str, int]],
    offsets: Sequence[tuple[int, int]],
    special: Sequence[bool] | None = None,
) -> list[int]:
    """The category of every token: 0 none, 1 irrelevant, 2 relevant; -1 not judged.

    `words` are (word, 0 or 1, or -1 for one that was not judged) in the order of the text; case,
    Unicode form and punctuation need not agree. A word listed once gets its label at each of its
    occurrences; labels of one word that differ go to its occurrences in order. `offsets` are
    half-open character spans of the tokens in `text`, as a fast tokenizer's `offset_mapping` gives
    them; (s, s) is a token without characters. A token over several words takes the category of
    most of its labelled characters, at a tie that of the last. `special` marks tokens whose
    characters the labeller did not see: a word goes on across them, and they get 0.

    Raises ValueError for a word that the text does not have, for labels of one word that differ
    and that order cannot tell apart, and for a label or an offset out of range.
    """
    for word, label in words:
        if label not in (0, 1, NOT_LABELLED):
            raise ValueError(f"label of word {word!r} was {label!r}, expected 0 or 1, or -1 where "
                             "it was not judged")  # fmt: skip
    for start, end in offsets:
        if not 0 <= start <= end <= len(text):
            raise ValueError(
                f"offset was ({start}, {end}), expected 0 <= start <= end <= {len(text)}"
            )
    marked = zip(offsets, special, strict=True) if special is not None else ()
    unseen = frozenset(i for (start, end), out in marked if out for i in range(start, end))
    content = _Content(text, unseen) if unseen else _content(text)
    categories = [NONE] * len(text)
    for first, last, label in _claims(content, words):
        for i in content.characters(first, last):
            if i not in unseen:
                categories[i] = IRRELEVANT + label if label >= 0 else NOT_LABELLED
    return token_categories(categories, offsets)


def token_categories(
    characters: Sequence[int], offsets: Sequence[tuple[int, int]]
) -> list[int]:
    """The category of every token from those of its characters: see `map_labels`."""
    return [_majority(characters[start:end]) for start, end in offsets]


def _majority(categories: Sequence[int]) -> int:
    labelled = [category for category in categories if category > NONE]
    if not labelled:
        return min(categories, default=NONE)  # of a word that was not judged, if there is one
    if len(set(labelled)) < 2:
        return labelled[0]
    counts = Counter(labelled)
    return max(reversed(labelled), key=lambda category: counts[category])


def _claims(content: _Content, words: Sequence[tuple[str, int]]) -> list[tuple[int, int, int]]:
    """(first unit, last unit, label) for every occurrence of every labelled word."""
    keys = [fold(word) for word, _ in words]  # "" for punctuation alone
    in_order = _match_in_order(content, keys, pieces=False)
    in_order = in_order or _match_in_order(content, keys, pieces=True)
    claims = [(*match, words[i][1]) for i, match in in_order.items()]
    taken = {unit for first, last, _ in claims for unit in range(first, last + 1)}
    if in_order and len(taken) == len(content.units):  # every word is listed
        return claims
    occurrences: dict[str, list[tuple[str, int]]] = {}
    for key, listed_word in zip(keys, words, strict=True):
        occurrences.setdefault(key, []).append(listed_word)
    # The longest first, so that "sea" does not take a piece of "sea food".
    for key in sorted(filter(None, occurrences), key=len, reverse=True):
        listed = occurrences[key]
        labels = [label for _, label in listed]
        everywhere = list(content.matches(key)) or list(content.matches(key, pieces=True))
        if not everywhere:
            raise ValueError(f"no word {listed[0][0]!r} in the response {_short(content.text)}")
        free = [m for m in everywhere if taken.isdisjoint(range(m[0], m[1] + 1))]
        if len(set(labels)) == 1:
            labels = labels[:1] * len(free)
        elif free and (in_order or len(free) != len(labels)):
            raise ValueError(
                f"word {listed[0][0]!r} is listed {len(labels)} times with labels that differ, but "
                f"occurs {len(everywhere)} times in the response {_short(content.text)}"
            )
        for (first, last), label in zip(free, labels, strict=False):
            claims.append((first, last, label))
            taken.update(range(first, last + 1))
    return claims


def _match_in_order(
    content: _Content, keys: Sequence[str], *, pieces: bool
) -> dict[int, tuple[int, int]]:
    """Each listed word at its first place after the one before it; nothing if one has none."""
    found: dict[int, tuple[int, int]] = {}
    position = 0
    for i, key in enumerate(keys):
        if key:
            match = next(content.matches(key, position, pieces=pieces), None)
            if match is None:
                return {}
            found[i], position = match, match[1] + 1
    return found


@dataclass(slots=True)
class _Unit:
    """One grapheme cluster of content: a letter with its accents, a whole emoji, a digit."""

    start: int
    end: int
    key: str
    emoji: bool
    spaced: bool
    """Something that separates words stands before it."""
    bound: bool
    """It cannot belong to another word than the unit before it."""
    glued: bool
    """Punctuation makes it one word with the unit before it."""


class _Content:
    """A text as matching sees it: folded, without punctuation, words apart by single spaces."""

    def __init__(self, text: str, unseen: frozenset[int]) -> None:
        self.text = text
        self.units = list(_units(text, unseen))
        self.key: str = ""
        self._begins: dict[int, int] = {}  # index into key -> the unit that begins there
        self._ends: dict[int, int] = {}  # index into key -> the unit that ends there
        for index, unit in enumerate(self.units):
            self.key += " " if unit.spaced and index else ""
            self._begins[len(self.key)] = index
            self.key += unit.key
            self._ends[len(self.key)] = index

    def matches(
        self, key: str, start: int = 0, *, pieces: bool = False
    ) -> Iterator[tuple[int, int]]:
        """(first unit, last unit) of the key as whole words, none overlapping, from `start` on.

        `pieces` counts the parts of "t-shirt" as words too.
        """
        at = self.key.find(key)
        while at >= 0:
            first, last = self._begins.get(at, -1), self._ends.get(at + len(key), -1)
            if first >= start and last >= 0 and self._is_whole(first, last, pieces):
                yield first, last
                start = last + 1
            at = self.key.find(key, at + 1)

    def characters(self, first: int, last: int) -> Iterator[int]:
        """Indices into the text of some units and of the punctuation inside a word of them."""
        for index in range(first, last + 1):
            unit = self.units[index]
            joined = index > first and not unit.spaced
            yield from range(self.units[index - 1].end if joined else unit.start, unit.end)

    def _is_whole(self, first: int, last: int, pieces: bool) -> bool:
        edges = [self.units[first], *self.units[last + 1 : last + 2]]
        return not any(edge.bound or (edge.glued and not pieces) for edge in edges)


@lru_cache(maxsize=64)  # a label is checked where it is read, and mapped right after
def _content(text: str) -> _Content:
    return _Content(text, frozenset())


def _units(text: str, unseen: frozenset[int]) -> Iterator[_Unit]:
    """The content of a text; what stands between is recorded in `spaced` and `bound` only."""
    previous: _Unit | None = None
    between = ""
    for start, end in _clusters(text):
        base = text[start]
        if start in unseen or _is_passed_over(base):
            continue
        if not _is_content(base):
            between += _plain(base)
            continue
        cluster = text[start:end]
        key, emoji = _fold(cluster), _is_emoji(cluster)
        if not key:  # a variation selector that varies nothing
            continue
        if previous is None:
            spaced, bound = True, False
        else:
            spaced, bound = _joint(text[previous.start], between, base)
            bound = bound and not (spaced or emoji or previous.emoji)
        unit = _Unit(start, end, key, emoji, spaced, bound, bool(between) and not spaced)
        yield unit
        previous, between = unit, ""


def _joint(before: str, between: str, after: str) -> tuple[bool, bool]:
    """Whether words end where `between` stands, and whether none can end there."""
    return (_short_joint if len(between) < 2 else _any_joint)(before, between, after)


def _any_joint(before: str, between: str, after: str) -> tuple[bool, bool]:
    sides = (before, after)
    return _is_spaced(sides, between), _is_bound(sides, between)


_short_joint = lru_cache(maxsize=_REMEMBERED)(_any_joint)


def _clusters(text: str) -> Iterator[tuple[int, int]]:
    """Spans of characters that a reader sees as one: accents, emoji sequences, flags, jamo."""
    if text.isascii():
        yield from ((i, i + 1) for i in range(len(text)))
        return
    start = 0
    for i in range(1, len(text) + 1):
        if i == len(text) or not _extends(text, start, i):
            yield start, i
            start = i


def _extends(text: str, start: int, i: int) -> bool:
    """Whether character i goes on with the cluster that began at `start`."""
    code, category = ord(text[i]), unicodedata.category(text[i])
    if category.startswith("M") or text[i] in _JOINED or 0x1160 <= code <= 0x11FF:
        return True
    if 0x1F3FB <= code <= 0x1F3FF or 0xE0020 <= code <= 0xE007F:  # skin tones, tags of a flag
        return True
    if text[i - 1] == _ZWJ:
        return _is_emoji(text[i])
    return i - start == 1 and _is_flag_half(text[start]) and _is_flag_half(text[i])


@lru_cache(maxsize=_REMEMBERED)
def _fold(cluster: str) -> str:
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", cluster).casefold())
    return "".join(
        character
        for character in folded
        if character not in _VARIATION and unicodedata.category(character)[0] not in "PZ"
    )


@lru_cache(maxsize=_REMEMBERED)
def _plain(base: str) -> str:
    return unicodedata.normalize("NFKC", base)


@lru_cache(maxsize=_REMEMBERED)
def _is_passed_over(base: str) -> bool:
    return unicodedata.category(base) == "Cf" and base not in _SEPARATORS


@lru_cache(maxsize=_REMEMBERED)
def _is_content(base: str) -> bool:
    return (
        unicodedata.category(base)[0] in "LMNS" and base not in _SEPARATORS or _is_unassigned(base)
    )


def _is_unassigned(base: str) -> bool:
    """A letter or an emoji that is newer than Python's tables, or of private use."""
    return unicodedata.category(base) in ("Cn", "Co")


@lru_cache(maxsize=_REMEMBERED)
def _is_emoji(cluster: str) -> bool:
    return unicodedata.category(cluster[0]) == "So" or _KEYCAP in cluster


def _is_flag_half(character: str) -> bool:
    return 0x1F1E6 <= ord(character) <= 0x1F1FF


def _is_spaced(sides: tuple[str, str], between: str) -> bool:
    """Whether words end where `between` stands."""
    if len(between) != 1 or _both_digits(sides) and between in _BETWEEN_DIGITS:
        return len(between) > 1
    return between in _SEPARATORS or not unicodedata.category(between).startswith("P")


def _is_bound(sides: tuple[str, str], between: str) -> bool:
    """Whether no word can end where `between` stands."""
    if any(is_unspaced(side) or unicodedata.category(side) == "Sc" for side in sides):
        return False
    return (
        not between
        or _both_digits(sides)
        or (between in _APOSTROPHES and all(side.isalpha() for side in sides))
    )


def _both_digits(sides: tuple[str, str]) -> bool:
    return all(side.isnumeric() for side in sides)


def _short(text: str, limit: int = 200) -> str:
    return repr(text) if len(text) <= limit else repr(text[:limit]) + "..."
