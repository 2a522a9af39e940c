"""Ask an endpoint for judgements: tries, waits and stops by the table of replies.

What concerns the endpoint as a whole ends all of it: no further request is sent, and replies that
are on their way are still taken, because they are paid for.
"""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from tppo.labels.endpoint.cache import Spent, Work, chat_request
from tppo.labels.endpoint.config import EndpointConfig, api_key
from tppo.labels.endpoint.forms import FORM, Action
from tppo.labels.endpoint.http import exchange, new_client
from tppo.labels.endpoint.prompt import REPAIR, Judgement, LabelItem, prompt, response_format
from tppo.labels.endpoint.replies import Reply, Trouble, outcome
from tppo.labels.endpoint.retry import persistently
from tppo.progress import say

if TYPE_CHECKING:
    import openai

FEW = 3  # items lost by an endpoint that has answered none: enough to stop
MANY = 20  # items lost in a row, where more are lost than is allowed: enough to stop
POLL_S = 0.02  # between two checks whether an item that was begun is answered
LONG_WAIT_S = 10.0  # a wait that is worth a line


# Schemas that are asked for, each with the next simpler one: one that names the words of the item,
# one of the form alone, none.
Level = Literal["words", "any", "none"]
LEVELS: tuple[Level, ...] = ("words", "any", "none")
SIMPLER: dict[Level, Level] = {"words": "any", "any": "none"}
REFUSED: dict[Level, str] = {
    "any": "a JSON schema that names the words: from now on asked with a general one",
    "none": "a JSON schema: from now on asked without",
}


class EndpointError(RuntimeError):
    """The run of questions ended early or lost too much; the message has reason and remedy."""


class _Stopped(Exception):
    """A request was not sent, because the run has stopped."""


@dataclass
class Asker:
    """One run of questions to an endpoint."""

    config: EndpointConfig
    work: Work
    spent: Spent
    total: int | None = None
    """Items of the run, if known: then too many lost ones stop it early."""
    api_key: str = ""
    client: openai.AsyncOpenAI | None = None
    """Made for the first question: a full cache needs neither key nor server."""
    level: Level = field(init=False)
    """By what JSON schema the form of an answer is asked for: until the server refuses it."""
    works: set[Level] = field(default_factory=set)
    """Those that it has answered to."""
    answered: bool = False
    """Whether the endpoint has given an answer, of whatever worth, in this run."""
    fatal: str = ""
    """Why the run has stopped."""
    lost: int = 0
    """Questions lost by endpoint or judge."""
    in_a_row: int = 0
    """How many of them since the newest judgement."""
    unheard: int = 0
    """Questions lost by the endpoint."""
    newest: str = ""
    """Why the newest was lost."""
    begun: int = 0
    """Items of which a request is with the endpoint, or was and is to be tried again."""
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    resume_at: float = 0.0
    """Until then the server has asked everybody to wait."""

    def __post_init__(self) -> None:
        exact = self.config.template == "words"
        self.level = ("words" if exact else "any") if self.config.schema else "none"

    async def ask(self, key: str, item: LabelItem) -> Judgement | Trouble | None:
        """The judgement of an item, on disk before it is returned; or what is wrong; or None, where
        the run stopped before it was known."""
        try:
            await self._wait_for_a_sign()
            self.begun += 1
            try:
                result = await self._judge(item)
            finally:
                self.begun -= 1
        except _Stopped:
            return None
        try:
            if isinstance(result, Judgement):
                self.work.finish(key, result)
                self.in_a_row = 0
            else:
                self._lose(key, result)
        except (OSError, RuntimeError) as error:  # DiskFull and NotWritable are of the second
            # Before this item's turn comes the others would be asked, paid and not kept.
            self.stop(f"an answer could not be kept: {error}")
            raise
        return result

    def open(self) -> None:
        """Make the client, if there is none.  Raises ValueError for key or proxy."""
        if self.client is None:
            self.api_key = api_key(self.config)
            self.client = new_client(self.config, self.api_key)

    def stop(self, reason: str) -> None:
        """Send nothing more."""
        self.fatal = self.fatal or reason
        self.stopping.set()

    def _lose(self, key: str, trouble: Trouble) -> None:
        self.work.fail(key, trouble.form)
        if trouble.form.by == "item":
            return
        self.lost, self.in_a_row, self.newest = self.lost + 1, self.in_a_row + 1, trouble.reason
        self.unheard += trouble.form.by == "endpoint"
        allowed = self.config.max_dropped * (self.total or math.inf)
        if self.in_a_row >= MANY and self.lost > allowed:
            self.stop(too_many(self.lost, self.total or 0, self.config, trouble.reason))

    async def _judge(self, item: LabelItem) -> Judgement | Trouble:
        """The judgement of an item: with a simpler schema, and then without, where the server
        refuses that, and sent back once where the answer holds none."""
        template = self.config.template
        messages = [{"role": "user", "content": prompt(item, template)}]
        level = self.level
        result, action = await self._send(messages, item, level)
        while action == "plain" and level != "none":
            level = max(SIMPLER[level], self.level, key=LEVELS.index)
            result, action = await self._send(messages, item, level)
            if level in self.works and LEVELS.index(level) > LEVELS.index(self.level):
                self.level = level
                say(f"{self.config.base_url} refuses {REFUSED[level]}")
        if action == "repair" and isinstance(result, Trouble):
            repair = {"role": "user", "content": REPAIR.format(reason=result.reason)}
            messages += [{"role": "assistant", "content": result.text}, repair]
            result, action = await self._send(messages, item, self.level)
        if action == "stop" and isinstance(result, Trouble):
            self.stop(result.reason)
            raise _Stopped
        return result

    async def _send(
        self, messages: list[dict[str, str]], item: LabelItem, level: Level
    ) -> tuple[Judgement | Trouble, Action]:
        """One request, tried again where the table demands it, and what to do with its reply."""
        client = self.client
        assert client is not None
        form = None
        if level != "none":
            exact = level == "words" and item.other is None
            form = response_format(self.config.template, item.response if exact else None)
        request = chat_request(self.config, messages, form)

        async def attempt() -> tuple[Judgement | Trouble, Action]:
            await self._ready()
            reply = await exchange(client, request)
            asked = level != "none" and level not in self.works
            result = outcome(reply, self.config, item.response, asked)
            return result, self._action(reply, result, level)

        return await persistently(attempt, self.config, self._pause)

    def _action(self, reply: Reply, result: Judgement | Trouble, level: Level) -> Action:
        """The table's action for a reply; an answer is counted first, because it was paid for."""
        form = FORM["verdict"] if isinstance(result, Judgement) else result.form
        if reply.status == 200 and (form.name == "verdict" or form.by in ("judge", "item")):
            self.spent.add(reply.body)
            self.answered = True
            self.works.add(level)
        return form.action(self.answered)

    async def _wait_for_a_sign(self) -> None:
        """After the first few losses begin no item until those that are begun tell whether the
        endpoint answers anything: refusals come sooner than answers."""
        while not self.fatal and self.unheard >= FEW and not (self.answered or self.work.hits):
            if not self.begun:
                self.stop(f"the first {self.unheard} items all failed: {self.newest}")
            await self._sleep(POLL_S)

    async def _ready(self) -> None:
        """Wait until a request may be sent.  Raises _Stopped where none will be."""
        while not self.fatal and (wait := self.resume_at - time.monotonic()) > 0:
            await self._sleep(wait)
        if self.fatal:
            raise _Stopped

    async def _pause(self, seconds: float, trouble: Trouble) -> None:
        """Wait after a try; where the server asks for it, then with everybody else."""
        if trouble.wait_s is None:
            await self._sleep(seconds)
            return
        now = time.monotonic()
        if seconds >= LONG_WAIT_S and self.resume_at < now:
            say(f"labelling: the server asks to wait {seconds:.0f} s")
        self.resume_at = max(self.resume_at, now + seconds)

    async def _sleep(self, seconds: float) -> None:
        """Sleep, but not longer than the run lasts."""
        try:
            await asyncio.wait_for(self.stopping.wait(), seconds)
        except asyncio.TimeoutError:
            pass


def too_many(lost: int, total: int, config: EndpointConfig, reason: str) -> str:
    """The message where more items are lost than the configuration allows."""
    return (
        f"{lost} of {total} items got no label, more than the {config.max_dropped:.3%} of "
        f"--label.endpoint.max-dropped; one of them: {reason}"
    ).replace(".000%", " %")
