"""Rows of a whole PPO step, and their table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepRow:
    """What one way of one shape took. tokens: that the policy reads in an update, forward."""

    model: str
    device: str
    groups: int  # prompts of an update
    prompt: int  # P
    response: int  # R
    group: int  # G
    prefix: str
    tokens: int
    update_ms: float  # median
    rollout_ms: float
    peak_mb: float  # of an update, beyond weights and optimiser
    speed_up: float  # of the update, over dense
    rollout_speed_up: float
    trl_ms: float | None = None  # an update of TRL 1.12's trainer, where it is importable
    over_trl: float | None = None


def step_table(rows: list[StepRow]) -> str:
    """The rows as text."""
    head = ("model", "prompts", "P", "R", "G", "prefix", "tokens", "update ms", "over dense",
            "peak MB", "rollout ms", "over dense", "TRL 1.12 ms", "over TRL")
    body = [(r.model, str(r.groups), str(r.prompt), str(r.response), str(r.group), r.prefix,
             f"{r.tokens:,}", f"{r.update_ms:,.0f}", f"{r.speed_up:.1f}x", f"{r.peak_mb:,.0f}",
             f"{r.rollout_ms:,.0f}", f"{r.rollout_speed_up:.1f}x",
             "-" if r.trl_ms is None else f"{r.trl_ms:,.0f}",
             "-" if r.over_trl is None else f"{r.over_trl:.1f}x") for r in rows]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
                     for line in [head, *body])
