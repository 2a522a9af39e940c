"""Phase I by an OpenAI-compatible endpoint: a model judges words and answers.

A finished label is on disk before its worker sends the next request: what was paid for is never
asked again. The key is read from an environment variable, and no text of the server's errors, which
may quote it, goes into a message.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tppo.label_cache import Spent, Work, answer_text, chat_request, judgement_in
from tppo.label_prompt import REPAIR, RESPONSE_FORMAT, BadAnswer, Judgement, LabelItem, prompt
from tppo.labels import Label
from tppo.progress import Bar, say, status

if TYPE_CHECKING:
    import openai

__all__ = ["Dropped", "EndpointConfig", "EndpointError", "LabelItem", "LabelRun", "label"]


class EndpointError(RuntimeError):
    """The endpoint as a whole does not work: there is no point in asking on."""


@dataclass(frozen=True)
class EndpointConfig:
    """An OpenAI-compatible endpoint."""

    base_url: str = ""
    """Such as http://127.0.0.1:8000/v1."""
    model: str = ""
    """The model's name at the endpoint."""
    api_key_env: str | None = "OPENAI_API_KEY"
    """Environment variable that holds the key; None for a server that asks for none."""
    concurrency: int = 8
    """Requests in flight."""
    max_retries: int = 5
    """Further tries of a request after 408, 409, 429, 5xx or a time-out, ever longer apart."""
    timeout_s: float = 120.0
    """Limit of one try, in seconds."""
    temperature: float | None = 0.0
    """None leaves it to the server; some models refuse any value."""
    max_tokens: int | None = 4096
    """Cap of an answer, in tokens; None leaves it to the server."""
    price_read: float | None = None
    """Price of a million prompt tokens, in any currency; with both prices the cost is shown."""
    price_written: float | None = None
    """Price of a million answer tokens."""


@dataclass(frozen=True)
class Dropped:
    """An item without a label, and why."""

    id: str
    reason: str


@dataclass(frozen=True)
class LabelRun:
    """Labels in the order of the items, and the items that got none."""

    labels: list[Label]
    dropped: list[Dropped]


def label(items: Sequence[LabelItem], config: EndpointConfig, cache: Path) -> LabelRun:
    """Label every item, from the cache where it holds the answer, else from the endpoint.

    Equal content is asked once. An answer that is not a judgement of exactly its words is sent
    back once with the reason. An item whose request fails for good, or whose second answer is no
    judgement either, is dropped with the reason, and asked again by the next call.

    Raises ImportError without the libraries, ValueError for a configuration that cannot work, and
    EndpointError when the endpoint cannot be reached or refuses key or model.
    """
    need_libraries()
    check(config)
    work = Work(config.model, config.temperature, cache)
    keys = [work.add(item) for item in items]
    if work.waiting:
        _run(_Live(config, _api_key(config), work, Spent(_prices(config))))
    labels, dropped = [], []
    for item, key in zip(items, keys, strict=True):
        judgement = work.judged.get(key)
        if judgement is None:
            dropped.append(Dropped(item.id, work.failed[key]))
        else:
            words = tuple((word.word, word.label) for word in judgement.words)
            labels.append(Label(item.id, item.response, words, judgement.sentence, config.model))
    if dropped:
        say(f"{len(dropped)} of {len(items)} items got no label; the first: {dropped[0].reason}")
    return LabelRun(labels, dropped)


@dataclass
class _Live:
    """One run of questions to an endpoint."""

    config: EndpointConfig
    api_key: str
    work: Work
    spent: Spent
    schema: bool = True
    """Whether a JSON schema is asked for: until the server turns out to refuse it."""
    fatal: str = ""
    started: float = field(default_factory=time.monotonic)

    def seconds(self) -> float:
        return time.monotonic() - self.started


def _run(live: _Live) -> None:
    """Ask for everything that waits; in a thread where an event loop runs already (notebooks)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(_ask_all(live))
    else:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(asyncio.run, _ask_all(live)).result()
    if live.spent.replies:
        say(f"labelling: {live.spent.replies} replies, {live.spent.text(live.seconds())}")
    failed = live.work.failed
    failed.update({key: why.replace(live.api_key, "***") for key, why in failed.items()})
    if live.fatal:
        raise EndpointError(live.fatal.replace(live.api_key, "***"))


async def _ask_all(live: _Live) -> None:
    import openai

    config, waiting = live.config, live.work.waiting
    queue = iter(list(waiting.items()))
    async with openai.AsyncOpenAI(
        api_key=live.api_key,
        base_url=config.base_url,
        timeout=config.timeout_s,
        max_retries=config.max_retries,
        http_client=_http_client(config.timeout_s),
    ) as client:
        with status(f"labelling by {config.model}", total=len(waiting)) as bar:
            workers = [_worker(live, client, queue, bar) for _ in range(config.concurrency)]
            await asyncio.gather(*workers)


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


async def _worker(
    live: _Live, client: openai.AsyncOpenAI, queue: Iterator[tuple[str, LabelItem]], bar: Bar
) -> None:
    work = live.work
    for key, item in queue:
        if live.fatal:
            return
        try:
            work.finish(key, await _judge(live, client, item))
        except BadAnswer as error:
            work.failed[key] = str(error)
        if live.spent.replies:
            lost = f"; {len(work.failed)} without a label" if work.failed else ""
            bar.note(live.spent.text(live.seconds()) + lost)
        bar.advance()


async def _judge(live: _Live, client: openai.AsyncOpenAI, item: LabelItem) -> Judgement:
    """The judgement of an item: an answer that gives none is sent back once, with the reason."""
    messages = [{"role": "user", "content": prompt(item)}]
    body = await _ask(live, client, messages)
    text = answer_text(body)
    try:
        return judgement_in(body, item.response)
    except BadAnswer as error:
        repair = REPAIR.format(reason=error)
    messages += [{"role": "assistant", "content": text}, {"role": "user", "content": repair}]
    return judgement_in(await _ask(live, client, messages), item.response)


async def _ask(live: _Live, client: openai.AsyncOpenAI, messages: list[dict[str, str]]) -> Any:
    """The server's reply; a refusal is asked again without the schema, which may be its cause."""
    if live.schema:
        try:
            return await _send(live, client, messages, {"response_format": RESPONSE_FORMAT})
        except _Refused:
            reply = await _send(live, client, messages, {})
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
    except openai.APIConnectionError:
        reason = live.fatal = f"{config.base_url} cannot be reached"
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


def need_libraries() -> None:
    """Raise ImportError, with what to install, where a library of labelling is missing."""
    try:
        import openai  # noqa: F401
        import pydantic  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"labelling by an endpoint needs {error.name}: pip install tppo-kernels[label]"
        ) from None


def check(config: EndpointConfig) -> None:
    """Raise ValueError for a configuration with which no request can be made."""
    if not config.model.strip():
        raise ValueError(f"model was {config.model!r}, expected its name at the endpoint")
    if config.concurrency < 1 or config.max_retries < 0 or not config.timeout_s > 0:
        raise ValueError(
            f"concurrency, max_retries, timeout_s were {config.concurrency}, {config.max_retries}, "
            f"{config.timeout_s}, expected >= 1, >= 0, > 0"
        )
    prices = (config.price_read, config.price_written)
    given = [price for price in prices if price is not None]
    if len(given) == 1 or not all(0 <= price < math.inf for price in given):
        raise ValueError(
            f"price_read, price_written were {prices[0]}, {prices[1]}, expected both >= 0, or none"
        )


def _prices(config: EndpointConfig) -> tuple[float, float] | None:
    if config.price_read is None or config.price_written is None:
        return None
    return config.price_read, config.price_written


def _api_key(config: EndpointConfig) -> str:
    """The key, after a look at the address it goes to."""
    if not re.match(r"https?://[^/@\s]+(/|$)", config.base_url):
        shown = re.sub(r"//[^/@\s]*@", "//***@", config.base_url)
        raise ValueError(f"base_url was {shown!r}, expected http(s)://HOST/v1 without credentials")
    if config.api_key_env is None:
        return "no-key"
    key = os.environ.get(config.api_key_env, "").strip()
    if not key:
        raise ValueError(
            f"environment variable {config.api_key_env} was empty, expected the endpoint's key "
            "(set api_key_env to None for a server that asks for none)"
        )
    return key
