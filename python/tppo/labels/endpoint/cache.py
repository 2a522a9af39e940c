"""The file of what was paid for: judgements by content; and what they cost.

A judgement is on disk, flushed, before anything else is asked.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tppo.labels.endpoint.config import EndpointConfig
from tppo.labels.endpoint.forms import FORMS, Form
from tppo.labels.endpoint.prompt import (
    BadAnswer,
    Judgement,
    LabelItem,
    prompt,
    validated,
)
from tppo.progress import say, status
from tppo.store.fingerprints import Fingerprints
from tppo.store.jsonl import append_line, bounded_lines, is_as_written


@dataclass
class _Entry(Judgement):
    """A line of the cache."""

    key: str


class Work:
    """The judgements on disk, by content-addressed key; in memory are only 8-byte hashes."""

    def __init__(self, config: EndpointConfig, path: Path) -> None:
        self.config, self.path = config, path
        self._offsets = Fingerprints()
        self._failed = Fingerprints()
        """Keys that got no judgement by this object's owner, and by what form of reply."""
        self.hits = 0
        """Judgements given out."""
        self._scan()

    def __len__(self) -> int:
        return len(self._offsets)

    def key(self, item: LabelItem) -> str:
        """The key of an item: it covers model, temperature and the whole message."""
        config = self.config
        content = json.dumps([config.model, config.temperature, prompt(item, config.template)])
        return hashlib.sha256(content.encode()).hexdigest()

    def get(self, key: str) -> Judgement | None:
        """The judgement on disk, or None."""
        offset = self._offsets.get(key)
        if offset is None:
            return None
        with open(self.path, "rb") as file:
            file.seek(offset)
            try:
                entry = _read(file.readline())
            except BadAnswer:  # another process wrote between: asked again, not lost
                return None
        if entry.key != key:
            return None
        self.hits += 1
        return entry

    def fail(self, key: str, form: Form) -> None:
        """Remember that a question got no judgement."""
        self._failed.setdefault(key, FORMS.index(form))

    def failure(self, key: str) -> Form | None:
        """The form of reply that a question failed by before."""
        place = self._failed.get(key)
        return None if place is None else FORMS[place]

    def finish(self, key: str, judgement: Judgement) -> None:
        """Keep a judgement, on disk first."""
        words = [{"word": word.word, "label": word.label} for word in judgement.words]
        entry = {"key": key, "words": words, "sentence": judgement.sentence}
        self._offsets.setdefault(key, append_line(self.path, entry))

    def _scan(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return
        damaged = offset = 0
        with open(self.path, "rb") as file, status(f"reading {self.path.name}"):
            for line in bounded_lines(file, self.path):
                try:
                    if line.strip():
                        self._offsets.setdefault(_read(line).key, offset)
                except BadAnswer:
                    damaged += 1
                offset += len(line)
        if damaged:
            lost = f"{damaged} damaged lines are passed over; their items are asked again"
            say(f"{self.path}: {lost}")


def _read(line: bytes) -> _Entry:
    """A line of the cache.  Errors: BadAnswer for one that is none, or has changed since."""
    if not is_as_written(line):
        raise BadAnswer("cache: the line is not the one that was written")
    return validated(_Entry, line, "cache")


@dataclass
class Spent:
    """Tokens as the server counted them, and what they cost at the given prices."""

    prices: tuple[float, float] | None
    """Of a million tokens read and a million written; None: no cost is shown."""
    replies: int = 0
    uncounted: int = 0
    read: int = 0
    written: int = 0

    def add(self, body: Any) -> None:
        """Count one reply; one without `usage` is counted as such, and nothing is guessed."""
        usage = body.get("usage") if isinstance(body, dict) else None
        counts: dict[str, Any] = usage if isinstance(usage, dict) else {}
        read, written = counts.get("prompt_tokens"), counts.get("completion_tokens")
        self.replies += 1
        if type(read) is int and type(written) is int and min(read, written) >= 0:
            self.read, self.written = self.read + read, self.written + written
        else:
            self.uncounted += 1

    def text(self, seconds: float) -> str:
        """`9,120 tokens read, 1,204 written (310/s), cost 0.0123`"""
        if self.uncounted == self.replies:
            return "tokens unknown: the server counts none"
        rate = f" ({(self.read + self.written) / seconds:,.0f}/s)" if seconds > 0 else ""
        parts = [f"{self.read:,} tokens read", f"{self.written:,} written{rate}"]
        if self.prices is not None:
            cost = (self.read * self.prices[0] + self.written * self.prices[1]) / 1e6
            parts.append(f"cost {cost:.4f}")
        if self.uncounted:
            parts.append(f"{self.uncounted} of {self.replies} replies not counted in this")
        return ", ".join(parts)


def chat_request(
    config: EndpointConfig, messages: list[dict[str, str]], form: dict[str, Any] | None
) -> dict[str, Any]:
    """The body of a chat completion.  form: `response_format`, None where none is asked for."""
    limit, newer = config.max_tokens, config.max_completion_tokens
    options = {
        "temperature": config.temperature,
        "max_tokens": limit if newer is None else None,
        "max_completion_tokens": newer,
        "response_format": form,
    }
    given = {name: value for name, value in options.items() if value is not None}
    return {"model": config.model, "messages": messages, **given}
