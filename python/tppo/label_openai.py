"""Phase I by an OpenAI-compatible endpoint: a model judges words and answers.

A finished label is on disk before its worker sends the next request: what was paid for is never
asked again. The key is read from an environment variable, and no text of the server's errors, which
may quote it, goes into a message.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Coroutine, Generator, Iterable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tppo.label_cache import Spent, Work, answer_text, chat_request, judgement_in
from tppo.label_config import EndpointConfig, api_key, check, need_libraries, prices
from tppo.label_prompt import REPAIR, BadAnswer, Judgement, LabelItem, prompt, response_format
from tppo.labels import Label
from tppo.mapping import fold
from tppo.progress import Bar, say, status

if TYPE_CHECKING:
    import openai

__all__ = ["Dropped", "EndpointConfig", "EndpointError", "LabelItem", "label"]

HELD = 32  # items held for each request in flight: a slow answer holds up those behind it no sooner
T = TypeVar("T")


class EndpointError(RuntimeError):
    """The endpoint as a whole does not work: there is no point in asking on."""


@dataclass(frozen=True)
class Dropped:
    """An item without a label, and why."""

    id: str
    reason: str


def label(
    items: Iterable[LabelItem], config: EndpointConfig, cache: Path, total: int | None = None
) -> Generator[Label | Dropped, None, None]:
    """Label every item, from the cache where it holds the answer, else from the endpoint.

    Results come in the order of the items, which are read as they are needed: at most
    `config.concurrency` are with the endpoint, and 32 times as many are held.

    Equal content is asked once. An answer that is not a judgement of exactly its words is sent
    back once with the reason. An item whose request fails for good, or whose second answer is no
    judgement either, is dropped with the reason, and asked again by the next call.

    `total` is the number of items, for the display.

    Raises ImportError without the libraries, ValueError for a configuration that cannot work, and
    EndpointError when the endpoint cannot be reached or refuses key or model.
    """
    need_libraries()
    check(config)
    return _results(_Live(config, Work(config, cache), Spent(prices(config))), items, total)


@dataclass
class _Live:
    """One run of questions to an endpoint."""

    config: EndpointConfig
    work: Work
    spent: Spent
    api_key: str = ""
    client: openai.AsyncOpenAI | None = None
    """Made for the first question: a full cache needs neither key nor server."""
    schema: bool = True
    """Whether a JSON schema is asked for: until the server turns out to refuse it."""
    fatal: str = ""
    lost: int = 0
    reason: str = ""
    """Why the first item was dropped."""
    asked: dict[str, asyncio.Task[Judgement | str]] = field(default_factory=dict)
    """By key, what is not answered yet."""
    held: deque[tuple[LabelItem, asyncio.Future[Judgement | str]]] = field(default_factory=deque)
    """Items and their answers, in order, that are not given out yet."""
    started: float = field(default_factory=time.monotonic)

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def without_key(self, text: str) -> str:
        return text.replace(self.api_key, "***") if self.api_key else text


def _results(
    live: _Live, items: Iterable[LabelItem], total: int | None
) -> Generator[Label | Dropped, None, None]:
    """The results as they are needed, of questions that run in a thread of their own: there they
    meet no other event loop (notebooks) and no Ctrl-C."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="labelling", daemon=True)
    thread.start()
    count = 0
    with status(f"labelling by {live.config.model}", total) as bar:
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
            if live.spent.replies:
                say(f"labelling: {live.spent.replies} replies, {live.spent.text(live.seconds())}")
            if live.lost:
                say(f"{live.lost} of {count} items got no label; the first: {live.reason}")
    if live.fatal:
        raise EndpointError(live.without_key(live.fatal))


def _wait(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run_coroutine_threadsafe(work, loop).result()


async def _next(results: AsyncGenerator[Label | Dropped, None]) -> Label | Dropped | None:
    return await anext(results, None)


async def _answers(
    live: _Live, items: Iterable[LabelItem], bar: Bar
) -> AsyncGenerator[Label | Dropped, None]:
    """The results in order, until an error that concerns the endpoint as a whole."""
    free = asyncio.Semaphore(live.config.concurrency)
    held = live.held
    for item in chain(items, [None]):
        if item is not None:
            held.append((item, _begin(live, item, free)))
        while held and (
            item is None or held[0][1].done() or len(held) > HELD * live.config.concurrency
        ):
            first, future = held.popleft()
            result = _result(live, first, await future)
            if live.fatal:
                await asyncio.gather(*live.asked.values())  # what was asked is paid for
                return
            if live.spent.replies:
                lost = f"; {live.lost} without a label" if live.lost else ""
                bar.note(live.spent.text(live.seconds()) + lost)
            bar.advance()
            yield result


def _begin(
    live: _Live, item: LabelItem, free: asyncio.Semaphore
) -> asyncio.Future[Judgement | str]:
    """The judgement of an item, or the reason that there is none: known, or to be waited for."""
    if not fold(item.response):
        return _known("the response has no words")
    key = live.work.key(item)
    judgement = live.work.get(key)
    if judgement is not None:
        return _known(judgement)
    if key in live.work.failed:
        return _known("an equal item got no label before")
    if key not in live.asked:
        live.client = live.client or _new_client(live)
        live.asked[key] = asyncio.ensure_future(_asked(live, live.client, key, item, free))
    return live.asked[key]


def _known(value: Judgement | str) -> asyncio.Future[Judgement | str]:
    future: asyncio.Future[Judgement | str] = asyncio.get_running_loop().create_future()
    future.set_result(value)
    return future


def _result(live: _Live, item: LabelItem, judgement: Judgement | str) -> Label | Dropped:
    if isinstance(judgement, str):
        reason = live.without_key(judgement)
        live.lost, live.reason = live.lost + 1, live.reason or reason
        return Dropped(item.id, reason)
    words = tuple((word.word, word.label) for word in judgement.words)
    return Label(item.id, item.response, words, judgement.sentence, live.config.model)


async def _asked(
    live: _Live, client: openai.AsyncOpenAI, key: str, item: LabelItem, free: asyncio.Semaphore
) -> Judgement | str:
    """Ask when a place is free; a judgement is on disk before the place is free again."""
    try:
        async with free:
            if live.fatal:
                return live.fatal
            judgement = await _judge(live, client, item)
            live.work.finish(key, judgement)
            return judgement
    except BadAnswer as error:
        live.work.failed.add(key)
        return str(error)
    finally:
        del live.asked[key]


async def _close(live: _Live, results: AsyncGenerator[Label | Dropped, None]) -> None:
    """Give up what still waits (after Ctrl-C the next result too), and the connections."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, *(future for _, future in live.held), return_exceptions=True)
    await results.aclose()
    if live.client is not None:
        await live.client.close()


def _new_client(live: _Live) -> openai.AsyncOpenAI:
    import openai

    config = live.config
    live.api_key = api_key(config)
    return openai.AsyncOpenAI(
        api_key=live.api_key,
        base_url=config.base_url,
        timeout=config.timeout_s,
        max_retries=config.max_retries,
        http_client=_http_client(config.timeout_s),
    )


def _http_client(limit_s: float) -> Any:
    """A client whose limit holds for a whole try: the usual one starts anew with every byte."""
    import openai

    # httpx or its successor, whichever this release of openai is built on.
    package = openai.DefaultAsyncHttpxClient.__mro__[1].__module__.partition(".")[0]
    timeout = importlib.import_module(package).ReadTimeout

    class Limited(openai.DefaultAsyncHttpxClient):
        async def send(self, *arguments: Any, **options: Any) -> Any:
            try:
                return await asyncio.wait_for(super().send(*arguments, **options), limit_s)
            except asyncio.TimeoutError:
                raise timeout("the whole reply took too long") from None

    return Limited()


async def _judge(live: _Live, client: openai.AsyncOpenAI, item: LabelItem) -> Judgement:
    """The judgement of an item: an answer that gives none is sent back once, with the reason."""
    template = live.config.template
    messages = [{"role": "user", "content": prompt(item, template)}]
    body = await _ask(live, client, messages)
    text = answer_text(body)
    try:
        return judgement_in(body, item.response, template)
    except BadAnswer as error:
        repair = REPAIR.format(reason=error)
    messages += [{"role": "assistant", "content": text}, {"role": "user", "content": repair}]
    return judgement_in(await _ask(live, client, messages), item.response, template)


async def _ask(live: _Live, client: openai.AsyncOpenAI, messages: list[dict[str, str]]) -> Any:
    """The server's reply; a refusal is asked again without the schema, which may be its cause."""
    if live.schema:
        try:
            form = {"response_format": response_format(live.config.template)}
            return await _send(live, client, messages, form)
        except _Refused:
            reply = await _send(live, client, messages, {})
            if live.schema:
                say(f"{live.config.base_url} refuses a JSON schema: from now on asked without")
            live.schema = False
            return reply
    return await _send(live, client, messages, {})


class _Refused(BadAnswer):
    """The server holds the request itself for wrong."""


async def _send(
    live: _Live, client: openai.AsyncOpenAI, messages: list[dict[str, str]], form: dict[str, Any]
) -> Any:
    """One request. No error text of the server goes on: it may quote the key."""
    import openai

    config, kind = live.config, BadAnswer
    create: Any = client.chat.completions.with_raw_response.create
    try:
        reply = await create(**chat_request(config, messages), **form)
        body = json.loads(reply.content)
    except openai.APITimeoutError:
        reason = f"no answer within {config.timeout_s:g} s, {config.max_retries + 1} times"
    except openai.APIConnectionError as error:
        if "Connect" in type(error.__cause__).__name__:  # httpx, or whatever openai is built on
            reason = live.fatal = f"{config.base_url} cannot be reached"
        else:
            reason = f"the connection broke off, {config.max_retries + 1} times"
    except openai.APIStatusError as error:
        reason = f"HTTP {error.status_code} from {config.base_url}"
        if error.status_code in (401, 403):
            source = config.api_key_env or "no variable (api_key_env is None)"
            live.fatal = f"{reason}: the key, from {source}, is refused"
        elif error.status_code == 404:
            live.fatal = f"{reason}: no such path, or no model {config.model!r}"
        elif error.status_code in (400, 422):
            kind = _Refused
    except (openai.OpenAIError, ValueError, RecursionError):
        reason = "the server's reply is not a chat completion"
    else:
        live.spent.add(body)
        return body
    raise kind(reason)
