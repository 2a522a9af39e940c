"""Phase I by an OpenAI-compatible endpoint: a model judges words and answers.

A finished label is on disk before its worker sends the next request: what was paid for is never
asked again. The key is read from an environment variable, and no text of the server's errors, which
may quote it, goes into a message.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Coroutine, Generator, Iterable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from tppo.labels.endpoint.ask import Asker, EndpointError, too_many
from tppo.labels.endpoint.cache import Spent, Work
from tppo.labels.endpoint.config import EndpointConfig, check, need_libraries, prices, without_key
from tppo.labels.endpoint.forms import FORM, LostBy
from tppo.labels.endpoint.prompt import Judgement, LabelItem
from tppo.labels.endpoint.replies import Trouble
from tppo.labels.label import Label
from tppo.labels.queries import without_repeats
from tppo.labels.words import fold
from tppo.progress import Bar, say, status

__all__ = ["Dropped", "EndpointConfig", "EndpointError", "LabelItem", "label"]

HELD = 32  # items held for each request in flight: a slow answer holds up those behind it no sooner
T = TypeVar("T")
Known = Judgement | Trouble | None
"""What is known of an item; None: the run stopped before it was."""


@dataclass(frozen=True)
class Dropped:
    """An item without a label, and why."""

    id: str
    reason: str
    by: LostBy = "item"
    """Who lost it: the endpoint, the judging model, or its own content."""


def label(
    items: Iterable[LabelItem], config: EndpointConfig, cache: Path, total: int | None = None
) -> Generator[Label | Dropped, None, None]:
    """Label every item, from the cache where it holds the answer, else from the endpoint.

    Results come in the order of the items, which are read as they are needed: at most
    `config.concurrency` are with the endpoint, and 32 times as many are held.

    Equal content is asked once. What is done with each form of reply is the table of
    docs/labelling-endpoints.md; an item that is dropped is asked again by the next call.

    `total` is the number of items, for the display, and so that too many lost ones end the run as
    soon as they are.

    Raises ImportError without the libraries, ValueError for a configuration that cannot work, and
    EndpointError for a reply that stops the run, or after more lost items than
    `config.max_dropped` allows; all results that are known are given out before.
    """
    need_libraries()
    check(config)
    work = Work(config, cache)
    return _results(_Live(config, work, Asker(config, work, Spent(prices(config)), total)), items)


@dataclass
class _Live:
    """The items of a run and their questions."""

    config: EndpointConfig
    work: Work
    asker: Asker
    lost: Counter[LostBy] = field(default_factory=Counter)
    reason: str = ""
    """Why the first item was dropped."""
    repeated: int = 0
    """Words of repeated queries that were judged relevant."""
    asked: dict[str, asyncio.Task[Known]] = field(default_factory=dict)
    """By key, what is not answered yet."""
    held: deque[tuple[LabelItem, asyncio.Future[Known]]] = field(default_factory=deque)
    """Items and their answers, in order, that are not given out yet."""
    started: float = field(default_factory=time.monotonic)

    def seconds(self) -> float:
        return time.monotonic() - self.started


def _results(
    live: _Live, items: Iterable[LabelItem]
) -> Generator[Label | Dropped, None, None]:
    """The results as they are needed, of questions that run in a thread of their own: there they
    meet no other event loop (notebooks) and no Ctrl-C."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="labelling", daemon=True)
    thread.start()
    asker, count = live.asker, 0
    with status(f"labelling by {live.config.model}", asker.total) as bar:
        results = _answers(live, items, bar)
        try:
            while (result := _wait(loop, _next(results))) is not None:
                count += 1
                yield result
        finally:
            _wait(loop, _close(live, results))
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()
            if asker.spent.replies:
                say(f"labelling: {asker.spent.replies} replies, {asker.spent.text(live.seconds())}")
            if live.repeated:
                say(f"labelling: {live.repeated} words of repeated queries were judged relevant; "
                    "their labels are 0")  # fmt: skip
            if live.lost:
                say(f"{live.lost.total()} of {count} items got no label; the first: {live.reason}")
    lost = live.lost["endpoint"] + live.lost["judge"]
    if not asker.fatal and lost > live.config.max_dropped * count:
        asker.fatal = too_many(lost, count, live.config, live.reason)
    if asker.fatal:
        kept = f"what was answered is kept in {live.work.path}: the next call asks for the rest"
        raise EndpointError(f"{without_key(asker.fatal, asker.api_key)}; {kept}")


def _wait(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run_coroutine_threadsafe(work, loop).result()


async def _next(results: AsyncGenerator[Label | Dropped, None]) -> Label | Dropped | None:
    return await anext(results, None)


async def _answers(
    live: _Live, items: Iterable[LabelItem], bar: Bar
) -> AsyncGenerator[Label | Dropped, None]:
    """The results in order; after the run has stopped, those that are known by then."""
    asker, held = live.asker, live.held
    free = asyncio.Semaphore(live.config.concurrency)
    for item in chain(items, [None]):
        if item is not None and not asker.fatal:
            held.append((item, _begin(live, item, free)))
        last = item is None or bool(asker.fatal)
        while held and (
            last or held[0][1].done() or len(held) > HELD * live.config.concurrency
        ):
            first, future = held.popleft()
            result = _result(live, first, await future)
            if asker.spent.replies:
                lost = f"; {live.lost.total()} without a label" if live.lost else ""
                bar.note(asker.spent.text(live.seconds()) + lost)
            if result is not None:
                bar.advance()
                yield result
        if asker.fatal and not held:
            return


def _begin(live: _Live, item: LabelItem, free: asyncio.Semaphore) -> asyncio.Future[Known]:
    """The judgement of an item, or the reason that there is none: known, or to be waited for."""
    if not fold(item.response):
        return _known(Trouble(FORM["no words"], FORM["no words"].advice))
    key = live.work.key(item)
    judgement = live.work.get(key)
    if judgement is not None:
        return _known(judgement)
    failure = live.work.failure(key)
    if failure is not None:
        return _known(Trouble(failure, "an equal item got no label before"))
    if not live.config.base_url and len(live.work):
        return _known(Trouble(FORM["unanswered"], FORM["unanswered"].advice))
    if key not in live.asked:
        live.asker.open()
        live.asked[key] = asyncio.ensure_future(_asked(live, key, item, free))
    return live.asked[key]


def _known(value: Known) -> asyncio.Future[Known]:
    future: asyncio.Future[Known] = asyncio.get_running_loop().create_future()
    future.set_result(value)
    return future


async def _asked(live: _Live, key: str, item: LabelItem, free: asyncio.Semaphore) -> Known:
    """Ask when a place is free."""
    try:
        async with free:
            return await live.asker.ask(key, item)
    finally:
        del live.asked[key]


def _result(live: _Live, item: LabelItem, known: Known) -> Label | Dropped | None:
    if known is None:
        return None
    if isinstance(known, Trouble):
        reason, by = without_key(known.reason, live.asker.api_key), known.form.by or "endpoint"
        live.lost[by] += 1
        live.reason = live.reason or reason
        return Dropped(item.id, reason, by)
    judged = [(word.word, word.label) for word in known.words]
    words, changed = without_repeats(item.response, judged)
    live.repeated += changed
    return Label(item.id, item.response, words, known.sentence, live.config.model)


async def _close(live: _Live, results: AsyncGenerator[Label | Dropped, None]) -> None:
    """Give up what still waits (after Ctrl-C the next result too), and the connections."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, *(future for _, future in live.held), return_exceptions=True)
    await results.aclose()
    if live.asker.client is not None:
        await live.asker.client.close()
