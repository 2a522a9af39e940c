"""Labels of several labellers in one file: who gave how many, and where two judged one answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from tppo.labels.hand import BY_HAND
from tppo.labels.label import Label


@dataclass
class Source:
    """What one labeller gave."""

    answers: int = 0
    relevant: int = 0
    """Of the answers, as wholes."""
    words: int = 0
    relevant_words: int = 0


@dataclass
class Sources:
    """Counts of the labels that pass, by labeller."""

    of: dict[str, Source] = field(default_factory=dict)

    def counted(self, labels: Iterable[Label]) -> Iterator[Label]:
        """The labels as they are."""
        for label in labels:
            found = self.of.setdefault(label.labeller, Source())
            values = [value for _, value in label.words if value >= 0]
            found.answers += 1
            found.relevant += label.sentence
            found.words += len(values)
            found.relevant_words += sum(values)
            yield label

    def total(self) -> Source:
        """Of all labellers together."""
        parts = self.of.values()
        return Source(*(sum(getattr(part, name) for part in parts)
                        for name in Source.__dataclass_fields__))  # fmt: skip


def by_hand(labeller: str) -> bool:
    """Whether a label's labeller is a person."""
    return labeller.startswith(BY_HAND)


def mixed(
    hand: Mapping[str, Label], others: Iterable[Label], both: list[tuple[Label, Label]]
) -> Iterator[Label]:
    """Labels by hand in their order, then the others of answers that nobody judged.

    hand: by the id of the answer.  both: gets the pairs of labels of the answers that were judged
    twice, of which the label by hand stands.
    """
    yield from hand.values()
    for label in others:
        if label.id in hand:
            both.append((hand[label.id], label))
        else:
            yield label
