"""What labels are known and what is still to be asked, by content; the file of what was paid for.

A judgement is on disk, flushed, before anything else is asked.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tppo.label_prompt import BadAnswer, Judgement, LabelItem, parse, prompt, validated
from tppo.mapping import fold
from tppo.progress import say


@dataclass
class _Entry(Judgement):
    """A line of the cache."""

    key: str


@dataclass
class Work:
    """What is known, what is still to be asked, what failed: by content-addressed key."""

    model: str
    temperature: float | None
    path: Path
    judged: dict[str, Judgement] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    waiting: dict[str, LabelItem] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cached = _read_cache(self.path)

    def add(self, item: LabelItem) -> str:
        """Take an item up; its key covers model, temperature and the whole message."""
        content = json.dumps([self.model, self.temperature, prompt(item)])
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


def chat_request(config: Any, messages: list[dict[str, str]]) -> dict[str, Any]:
    """The body of a chat completion without the form of its answer."""
    options = {"temperature": config.temperature, "max_tokens": config.max_tokens}
    given = {name: value for name, value in options.items() if value is not None}
    return {"model": config.model, "messages": messages, **given}


def answer_text(body: Any) -> str:
    """The text of a chat completion; raises BadAnswer for one without."""
    try:
        text = body["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        text = None
    if not isinstance(text, str) or not text.strip():
        raise BadAnswer("the server's reply holds no text")
    return text


def judgement_in(body: Any, response: str) -> Judgement:
    """The judgement in a chat completion; raises BadAnswer with the reason that there is none."""
    text = answer_text(body)
    if body["choices"][0].get("finish_reason") == "length":
        raise BadAnswer("the answer was cut at the server's limit of tokens")
    return parse(text, response)
