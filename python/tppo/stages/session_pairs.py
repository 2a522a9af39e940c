"""Pairs of generated answers to one history: what preferences are in a run of stages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tppo.errors import DataError
from tppo.labels.label import Label, iter_labels
from tppo.labels.words import NOT_LABELLED
from tppo.methods.ser import Doubtful
from tppo.stages.answers import Answer, answer_of
from tppo.store.jsonl import read_jsonl

_REMEDY = (
    "expected at least two sessions with two answers each: `tppo generate --round 2`, then `tppo "
    "label --round 2` and `tppo map --round 2`, write and label a second answer to each history, "
    "which `--round 2` of this command reads"
)


def session_pairs(
    answers: Sequence[Path], labels: Sequence[Path]
) -> tuple[dict[str, list[Doubtful]], list[Doubtful]]:
    """Pairs by session, and those that nobody has labelled.

    answers, labels: files of the stages generate and label, one a round.  The answers of a session
    are paired as they come, each once.  The better one is relevant where the other is not, else has
    the larger share of relevant words; pairs of equals are left out.
    Errors: DataError where fewer than two sessions have a labelled pair.
    """
    known = {(_round(path), label.id): label for path in labels for label in iter_labels(path)}
    of_session: dict[str, list[tuple[Answer, Label | None]]] = {}
    for path in answers:
        for answer in map(answer_of, read_jsonl(path)):
            label = known.get((_round(path), answer.id))
            of_session.setdefault(answer.session, []).append((answer, label))
    labelled: dict[str, list[Doubtful]] = {}
    others: list[Doubtful] = []
    for session, found in of_session.items():
        for (one, label), (two, other) in zip(found[::2], found[1::2], strict=False):
            if [*one.response_ids] == [*two.response_ids]:
                continue
            if label is None or other is None:
                others.append(_pair(one, two, None))
            elif worth(label) != worth(other):
                better = int(worth(other) > worth(label))
                labelled.setdefault(session, []).append(_pair(one, two, better))
    if len(labelled) < 2:
        raise DataError(f"{answers[-1].parent}: {len(labelled)} sessions have two answers of which "
                        f"one is better, {_REMEDY}")  # fmt: skip
    return labelled, others


def worth(label: Label) -> tuple[int, float]:
    """What pairs are ordered by: the verdict on the whole, then the share of relevant words."""
    judged = [value for _, value in label.words if value != NOT_LABELLED]
    return label.sentence, sum(judged) / max(len(judged), 1)


def _pair(one: Answer, two: Answer, better: int | None) -> Doubtful:
    return Doubtful(one.prompt_ids, one.response_ids, two.response_ids, better)


def _round(path: Path) -> int:
    found = re.search(r"-(\d+)$", path.parent.name)
    return int(found[1]) if found else 1
