"""A language model behind an OpenAI-compatible endpoint as the judge.

It is asked as the labeller is, with the same tries, checks and cache, but by a configuration of its
own: that who judges is not who labelled is the user's choice of another model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tppo.errors import DataError
from tppo.evaluation.judge import FORMAT, formats, sessions_of
from tppo.labels.endpoint.config import EndpointConfig, api_key, check, need_libraries
from tppo.labels.endpoint.live import Dropped, EndpointError, LabelItem, label
from tppo.labels.label import Label
from tppo.labels.queries import parse_answer, query_key
from tppo.labels.rule import relevance_share
from tppo.progress import say
from tppo.sessions.prompts import history_lines
from tppo.sessions.session import Session

if TYPE_CHECKING:
    from tppo.rewards import Answers

ENDPOINT = "endpoint"
_FLAG, _OWN_FLAG = "--label.endpoint.", "--eval.endpoint."


class EndpointJudge:
    """The verdicts of a model about answers to sessions.

    relevance  1 where the model calls the answer relevant, else 0
    words      share of relevant words, with the template "words"; a repeated query's are not
    format     as the rule has it

    An answer without words is not relevant, unasked.  One whose verdict is lost, at most
    `max_dropped` of all, counts as not relevant, and a line says how many these are.

    config: `--eval.endpoint`.  cache: the file of what was answered; nothing is asked twice.
    Errors: ImportError without the libraries; DataError for a configuration with which nothing can
    be asked, and, where nothing is in the cache, for a key that is not there.
    """

    def __init__(self, config: EndpointConfig, cache: Path) -> None:
        need_libraries()
        try:
            check(config)
            if not cache.exists():
                api_key(config)
        except ValueError as error:
            raise DataError(f"{_OWN_FLAG}*: {error}") from None
        self.config, self.cache, self.name = config, cache, config.model

    def __call__(self, answers: Answers) -> dict[str, list[float]]:
        """Errors: EndpointError where the endpoint stops, or loses too many answers."""
        sessions = sessions_of(answers, self.name)
        pairs = zip(sessions, answers.texts, strict=True)
        found = self._ask([_item(str(i), *pair) for i, pair in enumerate(pairs)], self.config)
        figures: dict[str, list[float]] = {
            "relevance": [0.0 if verdict is None else verdict.sentence for verdict in found]
        }
        if self.config.template == "words":
            figures["words"] = [
                0.0 if verdict is None else relevance_share([value for _, value in verdict.words])
                for verdict in found
            ]
        return figures | {FORMAT: formats(answers, [session.targets for session in sessions])}

    def prefers(self, first: Answers, second: Answers) -> list[int]:
        """For two answers to each session: 1 where the first is better, -1 where the second is, 0
        for a tie.

        The model sees both orders.  One is better where it is so in both; where the verdicts
        contradict each other, place decides and not the answers, or one verdict is lost: a tie.
        Answers of the same queries tie, and one without words loses, unasked.
        """
        sessions = sessions_of(first, self.name)
        given = list(zip(sessions, first.texts, second.texts, strict=True))
        found = [_unasked(one, other) for _, one, other in given]
        open_ = [i for i, verdict in enumerate(found) if verdict is None]
        items = []
        for i in open_:
            session, one, other = given[i]
            items += [_item(f"{i}/{one_first}", session, a, b)
                      for one_first, a, b in ((1, one, other), (0, other, one))]  # fmt: skip
        verdicts = self._ask(items, replace(self.config, template="sentence"))
        for i, straight, swapped in zip(open_, verdicts[::2], verdicts[1::2], strict=True):
            same = straight is not None and swapped is not None
            if same and straight.sentence != swapped.sentence:  # type: ignore[union-attr]
                found[i] = 1 if straight.sentence == 0 else -1  # type: ignore[union-attr]
        return [verdict or 0 for verdict in found]

    def _ask(self, items: Sequence[LabelItem], config: EndpointConfig) -> list[Label | None]:
        """A verdict an item, None where there is none."""
        try:
            found = list(label(items, config, self.cache, len(items)))
        except EndpointError as error:
            text = str(error).replace(_FLAG, _OWN_FLAG)
            raise EndpointError(f"judge {self.name}: {text}") from None
        lost = sum(isinstance(each, Dropped) and each.by != "item" for each in found)
        if lost:
            say(f"judge {self.name}: {lost} of {len(items)} verdicts are lost and count as nothing")
        return [None if isinstance(each, Dropped) else each for each in found]


def _item(id: str, session: Session, response: str, other: str | None = None) -> LabelItem:
    return LabelItem(id, history_lines(session), list(session.targets), response, other)


def _unasked(one: str, other: str) -> int | None:
    """What is known of two answers without a judge."""
    keys = [list(filter(None, map(query_key, parse_answer(text)))) for text in (one, other)]
    if keys[0] == keys[1]:
        return 0
    return None if all(keys) else 1 if keys[0] else -1
