"""The judge who knows what the user of a generated session is after, which no labeller is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tppo.errors import DataError
from tppo.evaluation.judge import FORMAT, formats, sessions_of
from tppo.labels.queries import parse_answer, repeats
from tppo.labels.words import fold
from tppo.sessions.session import Session
from tppo.sessions.synthetic import PARTS

if TYPE_CHECKING:
    from tppo.rewards import Answers

INTENT = "intent"  # the name of the judge


class IntentJudge:
    """Whether answers recover the latent intents of generated sessions: see `intent_figures`."""

    name = INTENT

    def __call__(self, answers: Answers) -> dict[str, list[float]]:
        """Errors: DataError naming a session whose intent nobody knows."""
        sessions = sessions_of(answers, self.name)
        figures = intent_figures(sessions, answers.texts)
        return figures | {FORMAT: formats(answers, [session.targets for session in sessions])}


def intent_figures(
    sessions: Sequence[Session], texts: Sequence[str]
) -> dict[str, list[float]]:
    """How much of the latent intent one answer a session recovers.

    A query names a part of the intent (topic, brand, need) where it has the part's word and no
    other word of the same kind: a query with two brands names none.

    intent          the largest share of the intent's parts that a single query names
    intent_topic    1 where a query names the topic, else 0; likewise intent_brand, intent_need
    intent_queries  mean over the queries of the share of parts that each one names; a query that
                    has the words of an earlier one counts as naming none

    Errors: DataError naming the first session that has no intent of these parts.
    """
    figures: dict[str, list[float]] = {"intent": []}
    figures |= {f"intent_{part}": [] for part in PARTS} | {"intent_queries": []}
    for session, text in zip(sessions, texts, strict=True):
        intent = dict(session.intent)
        if intent.keys() != PARTS.keys():
            raise DataError(
                f"session {session.id!r} has the latent intent {intent}, expected one with "
                f"{', '.join(PARTS)}: only generated sessions have it"
            )
        queries = parse_answer(text)
        named = [{part for part in PARTS if _names(query, part, intent[part])} for query in queries]
        shares = [len(parts) / len(PARTS) for parts in named]
        new = [not again for again in repeats(queries)]
        figures["intent"].append(max(shares, default=0.0))
        for part in PARTS:
            figures[f"intent_{part}"].append(float(any(part in parts for parts in named)))
        paid = sum(share for share, counts in zip(shares, new, strict=True) if counts)
        figures["intent_queries"].append(paid / len(queries) if queries else 0.0)
    return figures


def _names(query: str, part: str, word: str) -> bool:
    return PARTS[part].intersection(fold(query).split()) == {word}
