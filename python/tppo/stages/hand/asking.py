"""Asking several people at once: what is on whose screen, what is kept, skipped and taken back."""

from __future__ import annotations

import hashlib
import heapq
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from tppo.labels.journal import Journal, Said, Without
from tppo.progress import say
from tppo.store.disk import DiskFull, NotWritable, space_for

LEFT_S = 900.0  # a client that asks nothing for so long has gone
LAST = 20  # answers of which is said how long they took, and how well they were foretold


class NotKept(ValueError):
    """What a person said is not on the disk; the question stays on the screen, to be said again."""


class Question(Protocol):
    """What may be on a screen."""

    @property
    def id(self) -> str:
        """What it is about."""

    @property
    def shown(self) -> float:
        """Since when, by the monotonic clock."""


class Timed(Said, Protocol):
    """What a person said, and how long it took."""

    @property
    def seconds(self) -> float:
        """How long it was on the screen."""


Asked = TypeVar("Asked", bound=Question)
Answered = TypeVar("Answered", bound=Timed)
Item = TypeVar("Item")


@dataclass
class _Client(Generic[Asked]):
    """A tab of a browser, or a terminal."""

    item: Asked | None = None
    asked: float = 0.0


class Asking(Generic[Asked, Answered]):
    """What all who label share; every method may be called by any thread.

    wanted: so many are to be judged.  guidance: the sentence by which is judged.
    """

    def __init__(self, labels: Journal[Answered], wanted: int, guidance: str) -> None:
        self.labels, self.wanted, self.guidance = labels, wanted, guidance
        self.lock = threading.RLock()
        self.clients: dict[str, _Client[Asked]] = {}

    def count(self) -> int:
        """Questions that somebody has answered."""
        return len({found.id for found in self.labels})

    def next(self, client: str, annotator: str) -> Asked | None:
        """What a client is to judge, the same until it is judged; None: enough is."""
        with self.lock:
            state = self._state(client)
            if state.item is not None:
                return state.item
            if self.count() < self.wanted:
                state.item = self._choose(annotator)
            return state.item

    def leave(self, client: str) -> None:
        """Give back what is on a client's screen: somebody else sits there."""
        with self.lock:
            self._state(client).item = None

    def skip(self, client: str, annotator: str, id: str) -> None:
        """Leave out what is on a client's screen."""
        with self.lock:
            self._on_screen(client, id)
            self._keep(client, Without(id, annotator, "skipped"))

    def undo(self, client: str, annotator: str) -> tuple[Asked, Answered] | None:
        """Take back what a person judged last, and show it again; None: there is nothing."""
        with self.lock:
            mine = [found for found in self.labels if found.annotator == annotator]
            again = self._again(mine[-1]) if mine else None
            if again is None:
                return None
            self._keep(client, Without(mine[-1].id, annotator, "undone"))
            self._state(client).item = again
            return again, mine[-1]

    def progress(self) -> dict[str, Any]:
        """What the page says of the work: counts and pace."""
        with self.lock:
            done = list(self.labels)
            seconds = [found.seconds for found in done[-LAST:]]
            return {
                "labelled": self.count(),
                "wanted": self.wanted,
                "annotators": dict(Counter(found.annotator for found in done)),
                "seconds": statistics.median(seconds) if seconds else None,
            }

    def _choose(self, annotator: str) -> Asked | None:
        """The next question for a person."""
        raise NotImplementedError

    def _again(self, said: Answered) -> Asked | None:
        """The question that somebody has answered; None where it is not asked any more."""
        raise NotImplementedError

    def _state(self, client: str) -> _Client[Asked]:
        state = self.clients.setdefault(client, _Client())
        state.asked = time.monotonic()
        return state

    def _on_screen(self, client: str, id: str) -> Asked:
        item = self._state(client).item
        if item is None or item.id != id:
            raise ValueError(f"id was {id!r}, expected that of the answer on the screen; reload it")
        return item

    def _on_screens(self) -> set[str]:
        """What somebody sits before; a client that has gone gives back what it had."""
        now = time.monotonic()
        for state in self.clients.values():
            if now - state.asked > LEFT_S:
                state.item = None
        return {state.item.id for state in self.clients.values() if state.item is not None}

    def _keep(self, client: str, entry: Answered | Without) -> None:
        """Keep it, on disk first; the screen is free then.

        Errors: NotKept where the disk is full or read-only.
        """
        remedy = "Make room, and say it again."
        try:
            with space_for(self.labels.path.parent, "what you said", remedy):
                self.labels.add(entry)
        except (DiskFull, NotWritable) as error:
            say(f"WARNING: not kept: {error}")
            raise NotKept(f"not kept: {error}") from None
        self._state(client).item = None


def spread(
    items: Iterable[Item],
    id_of: Callable[[Item], str],
    user_of: Callable[[Item], str],
    n: int,
    seed: int,
) -> list[Item]:
    """n of the items in an order that looks random, the first of every user first.

    A larger n only adds to them, at the end of each user's.
    """
    def key(item: Item) -> bytes:
        return hashlib.sha256(f"{seed}/hand/{id_of(item)}".encode()).digest()

    found = heapq.nsmallest(n, items, key=key)
    turn: Counter[str] = Counter()
    places = []
    for place, item in enumerate(found):
        user = user_of(item)
        places.append((turn[user], place))
        turn[user] += 1
    return [found[place] for _, place in sorted(places)]
