"""Phase I by an OpenAI-compatible endpoint: a model judges words and answers.

A finished label is on disk before its worker sends the next request: what was paid for is never
asked again. The key is read from an environment variable, and no text of the server's errors, which
may quote it, goes into a message.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tppo.label_prompt import BadAnswer, Judgement, LabelItem, parse, prompt, validated
from tppo.labels import Label
from tppo.mapping import fold
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

    Equal content is asked once. An item whose request fails for good, or whose answer is not a
    judgement of exactly its words, is dropped with the reason, and asked again by the next call.

    Raises ImportError without the libraries, ValueError for a configuration that cannot work, and
    EndpointError when the endpoint cannot be reached or refuses key or model.
    """
    _need_libraries()
    api_key = _api_key(config)
    work = _Work(config, cache)
    keys = [work.add(item) for item in items]
    if work.waiting:
        _run(work, api_key)
    labels, dropped = [], []
    for item, key in zip(items, keys, strict=True):
        judgement = work.judged.get(key)
        if judgement is None:
            reason = work.failed[key].replace(api_key, "***")
            dropped.append(Dropped(item.id, reason))
        else:
            words = tuple((word.word, word.label) for word in judgement.words)
            labels.append(Label(item.id, item.response, words, judgement.sentence, config.model))
    if dropped:
        say(f"{len(dropped)} of {len(items)} items got no label; the first: {dropped[0].reason}")
    return LabelRun(labels, dropped)


@dataclass
class _Entry(Judgement):
    """A line of the cache."""

    key: str


@dataclass
class _Work:
    """What is known, what is still to be asked, what failed: by content-addressed key."""

    config: EndpointConfig
    path: Path
    judged: dict[str, Judgement] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    waiting: dict[str, LabelItem] = field(default_factory=dict)
    fatal: str = ""

    def __post_init__(self) -> None:
        self.cached = _read_cache(self.path)

    def add(self, item: LabelItem) -> str:
        """Take an item up; its key covers model, temperature and the whole message."""
        message = prompt(item)
        content = json.dumps([self.config.model, self.config.temperature, message])
        key = hashlib.sha256(content.encode()).hexdigest()
        if not fold(item.response):
            self.failed[key] = "the response has no words"
        elif key in self.cached:
            self.judged[key] = self.cached[key]
        else:
            self.waiting[key] = item
        return key

    def finish(self, key: str, judgement: Judgement) -> None:
        """Keep a judgement, on disk first."""
        words = [{"word": word.word, "label": word.label} for word in judgement.words]
        entry = {"key": key, "words": words, "sentence": judgement.sentence}
        with open(self.path, "ab+") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            torn = file.read(1) not in (b"", b"\n")  # a process was killed while it wrote
            line = json.dumps(entry, ensure_ascii=False) + "\n"
            file.write(("\n" if torn else "").encode() + line.encode())
            file.flush()
            os.fsync(file.fileno())
        self.judged[key] = judgement


def _read_cache(path: Path) -> dict[str, Judgement]:
    path.parent.mkdir(parents=True, exist_ok=True)
    entries: dict[str, Judgement] = {}
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    damaged = 0
    for line in filter(None, lines):
        try:
            entry = validated(_Entry, line, "cache")
        except BadAnswer:
            damaged += 1
        else:
            entries[entry.key] = entry
    if damaged:
        say(f"{path}: {damaged} damaged lines are passed over; their items are asked again")
    return entries


def _run(work: _Work, api_key: str) -> None:
    """Ask for everything that waits; in a thread where an event loop runs already (notebooks)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(_ask_all(work, api_key))
    else:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(asyncio.run, _ask_all(work, api_key)).result()
    if work.fatal:
        raise EndpointError(work.fatal.replace(api_key, "***"))


async def _ask_all(work: _Work, api_key: str) -> None:
    import openai

    config = work.config
    queue = iter(list(work.waiting.items()))
    async with openai.AsyncOpenAI(
        api_key=api_key,
        base_url=config.base_url,
        timeout=config.timeout_s,
        max_retries=config.max_retries,
    ) as client:
        with status(f"labelling by {config.model}", total=len(work.waiting)) as bar:
            workers = [_worker(work, client, queue, bar) for _ in range(config.concurrency)]
            await asyncio.gather(*workers)


async def _worker(
    work: _Work, client: openai.AsyncOpenAI, queue: Iterator[tuple[str, LabelItem]], bar: Bar
) -> None:
    for key, item in queue:
        if work.fatal:
            return
        try:
            work.finish(key, parse(await _ask(work, client, prompt(item)), item.response))
        except BadAnswer as error:
            work.failed[key] = str(error)
            bar.note(f"{len(work.failed)} without a label")
        bar.advance()


async def _ask(work: _Work, client: openai.AsyncOpenAI, message: str) -> str:
    """The text of the model's answer. No error text of the server goes on: it may quote the key."""
    import openai

    config = work.config
    options: dict[str, Any] = {"temperature": config.temperature, "max_tokens": config.max_tokens}
    try:
        completion = await client.chat.completions.create(
            model=config.model,
            messages=[{"role": "user", "content": message}],
            **{name: value for name, value in options.items() if value is not None},
        )
    except openai.APITimeoutError:
        reason = f"no answer within {config.timeout_s:g} s, {config.max_retries + 1} times"
    except openai.APIConnectionError:
        reason = work.fatal = f"{config.base_url} cannot be reached"
    except openai.APIStatusError as error:
        reason = f"HTTP {error.status_code} from {config.base_url}"
        if error.status_code in (401, 403):
            source = config.api_key_env or "no variable (api_key_env is None)"
            work.fatal = f"{reason}: the key, from {source}, is refused"
        elif error.status_code == 404:
            work.fatal = f"{reason}: no such path, or no model {config.model!r}"
    except (openai.OpenAIError, ValueError):
        reason = "the server's reply is not a chat completion"
    else:
        choices = getattr(completion, "choices", None) or []
        if not (choices and choices[0].message and choices[0].message.content):
            raise BadAnswer("the server's reply holds no text")
        if choices[0].finish_reason == "length":
            raise BadAnswer("the answer was cut at the server's limit of tokens")
        return choices[0].message.content
    raise BadAnswer(reason)


def _need_libraries() -> None:
    try:
        import openai  # noqa: F401
        import pydantic  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"labelling by an endpoint needs {error.name}: pip install tppo-kernels[label]"
        ) from None


def _api_key(config: EndpointConfig) -> str:
    """The key, after a look at the whole configuration."""
    if not re.match(r"https?://[^/@\s]+(/|$)", config.base_url):
        shown = re.sub(r"//[^/@\s]*@", "//***@", config.base_url)
        raise ValueError(f"base_url was {shown!r}, expected http(s)://HOST/v1 without credentials")
    if not config.model.strip():
        raise ValueError(f"model was {config.model!r}, expected its name at the endpoint")
    if config.concurrency < 1 or config.max_retries < 0 or not config.timeout_s > 0:
        raise ValueError(
            f"concurrency, max_retries, timeout_s were {config.concurrency}, {config.max_retries}, "
            f"{config.timeout_s}, expected >= 1, >= 0, > 0"
        )
    if config.api_key_env is None:
        return "no-key"
    key = os.environ.get(config.api_key_env, "").strip()
    if not key:
        raise ValueError(
            f"environment variable {config.api_key_env} was empty, expected the endpoint's key "
            "(set api_key_env to None for a server that asks for none)"
        )
    return key
