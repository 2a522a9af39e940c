"""Rows of answers that are sampled, and their table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RolloutRow:
    """What one engine took for the answers to one set of prompts.

    tokens: of all answers, without what fills a batch behind their ends.  excused: answers that
    leave those of `generate` where two tokens are as likely as each other.
    """

    model: str
    device: str
    prompts: int
    response: int  # cap of an answer in tokens
    engine: str
    tokens: int | None
    seconds: float | None  # median
    tokens_s: float | None
    speed_up: float | None  # over `generate`
    excused: int = 0
    note: str = ""


def rollout_table(rows: list[RolloutRow]) -> str:
    """The rows as text."""
    head = ("model", "prompts", "cap", "engine", "tokens", "s", "tokens/s", "over generate",
            "excused", "note")
    body = [(r.model, str(r.prompts), str(r.response), r.engine, _number(r.tokens, ",d"),
             _number(r.seconds, ".2f"), _number(r.tokens_s, ",.0f"),
             "-" if r.speed_up is None else f"{r.speed_up:.2f}x", str(r.excused), r.note)
            for r in rows]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
                     for line in [head, *body])


def _number(x: float | None, form: str) -> str:
    return "-" if x is None else format(x, form)
