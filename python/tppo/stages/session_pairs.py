"""Pairs of generated answers to one history: what preferences are in a run of stages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tppo.errors import DataError
from tppo.labels.label import Label, iter_labels
from tppo.labels.words import NOT_LABELLED
from tppo.methods.ser import Doubtful
from tppo.stages.answer_pairs import AnswerPair, answer_pairs, round_of
from tppo.store.jsonl import is_text, read_jsonl

_REMEDY = (
    "expected at least two sessions with two answers each: `tppo generate --round 2`, then `tppo "
    "label --round 2` and `tppo map --round 2`, write and label a second answer to each history, "
    "which `--round 2` of this command reads"
)


def session_pairs(
    answers: Sequence[Path], labels: Sequence[Path]
) -> tuple[dict[str, list[Doubtful]], list[Doubtful]]:
    """Pairs by session, and those that nobody has labelled.

    answers, labels: files of the stages generate and label, one a round.  The better one is
    relevant where the other is not, else has the larger share of relevant words; pairs of equals
    are left out.
    Errors: DataError where fewer than two sessions have a labelled pair.
    """
    known = {(round_of(path), label.id): label for path in labels for label in iter_labels(path)}
    labelled: dict[str, list[Doubtful]] = {}
    others: list[Doubtful] = []
    for pair in answer_pairs(answers):
        label = known.get((pair.rounds[0], pair.first.id))
        other = known.get((pair.rounds[1], pair.second.id))
        if label is None or other is None:
            others.append(_doubtful(pair, None))
        elif worth(label) != worth(other):
            better = int(worth(other) > worth(label))
            labelled.setdefault(pair.first.session, []).append(_doubtful(pair, better))
    if len(labelled) < 2:
        raise DataError(f"{answers[-1].parent}: {len(labelled)} sessions have two answers of which "
                        f"one is better, {_REMEDY}")  # fmt: skip
    return labelled, others


def preferred_pairs(
    answers: Sequence[Path], preferred: Path, equal: Path
) -> tuple[dict[str, list[Doubtful]], list[Doubtful]]:
    """The same by what people have said of pairs, whatever labels the answers have.

    preferred, equal: of the stage prefer; pairs without a better answer are left out.
    Errors: DataError where fewer than two sessions have a pair with a better answer, or a row is of
    other answers.
    """
    better: dict[str, int | None] = {}
    pairs = {pair.id: pair for pair in answer_pairs(answers)}
    for path in filter(Path.exists, (preferred, equal)):
        for line in read_jsonl(path):
            pair = pairs.get(line.get("id", is_text, "a text"))
            texts = [] if pair is None else [pair.first.text, pair.second.text]
            given = [line.values.get(name) for name in ("chosen", "rejected")]
            given = line.values.get("answers", given)
            if pair is None or given not in (texts, texts[::-1]):
                raise line.error("id", line.values["id"], "one of two answers that are generated; "
                                 "`tppo prefer` reads them anew")  # fmt: skip
            better[pair.id] = texts.index(given[0]) if path == preferred else None
    labelled: dict[str, list[Doubtful]] = {}
    others: list[Doubtful] = []
    for pair in pairs.values():
        if pair.id not in better:
            others.append(_doubtful(pair, None))
        elif better[pair.id] is not None:
            of_session = labelled.setdefault(pair.first.session, [])
            of_session.append(_doubtful(pair, better[pair.id]))
    if len(labelled) < 2:
        raise DataError(f"{preferred}: {len(labelled)} sessions have a pair of which one is "
                        "better, expected at least two: `tppo prefer` with a larger "
                        "--label.hand.pairs asks for more")  # fmt: skip
    return labelled, others


def worth(label: Label) -> tuple[int, float]:
    """What pairs are ordered by: the verdict on the whole, then the share of relevant words."""
    judged = [value for _, value in label.words if value != NOT_LABELLED]
    return label.sentence, sum(judged) / max(len(judged), 1)


def _doubtful(pair: AnswerPair, better: int | None) -> Doubtful:
    return Doubtful(pair.first.prompt_ids, pair.first.response_ids, pair.second.response_ids,
                    better)  # fmt: skip
