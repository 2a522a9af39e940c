"""The curves of the report: every stage that trains, from its metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from tppo.evaluation.chart import Line, chart
from tppo.stages.journal import METRICS
from tppo.stages.report.found import Found, StageFound


class Curves(NamedTuple):
    """One chart of a stage: the columns of metrics.jsonl that it shows, by what they are called."""

    title: str
    x: str
    x_name: str
    y_name: str
    columns: dict[str, str]
    lowest: float | None = None
    """Points below it are drawn at it: one bad step would leave no room for the others."""


ANSWERS = ("episode", "sampled answers")
PPO = (
    Curves("Reward of an answer", *ANSWERS, "reward an answer",
           {"reward": "objective/scores", "reward less KL": "objective/rlhf_reward"}),
    Curves("KL to the SFT model", *ANSWERS, "nats an answer",
           {"sampled": "objective/kl", "held out": "heldout/kl"}),
    Curves("Length of an answer", *ANSWERS, "tokens", {"length": "response/length"}),
    Curves("Answers of the right form", *ANSWERS, "share",
           {"sampled": "response/format", "held out": "heldout/format"}),
    Curves("What the critic explains", *ANSWERS, "explained variance",
           {"explained variance": "val/explained_variance"}, -1.0),
    Curves("Entropy of the policy", *ANSWERS, "nats a token", {"entropy": "policy/entropy_avg"}),
    Curves("Steps away from the sampling policy", *ANSWERS, "share of tokens clipped",
           {"policy": "policy/clipfrac_avg"}),
    Curves("Losses", *ANSWERS, "loss", {"critic": "loss/value_avg", "policy": "loss/policy_avg"}),
)  # fmt: skip
SFT = (
    Curves("Supervised fine-tuning", "step", "optimiser steps", "loss, nats a token",
           {"training batch": "loss", "held out": "heldout_loss"}),
)  # fmt: skip
REWARD_MODEL = (
    Curves("Reward model", "epoch", "epochs", "loss",
           {"both": "loss", "of tokens": "local_loss", "of answers": "global_loss"}),
)  # fmt: skip
KINDS = {"train": PPO, "sft": SFT, "train-rm": REWARD_MODEL}


def curves(found: Found) -> str:
    """The charts of every stage that has some, PPO first; "" where there are none."""
    parts = []
    for kind in KINDS:
        for stage in found.of(kind):
            drawn = (_of_judge(stage) if kind == "train" else []) + [
                _chart(stage, about) for about in KINDS[kind]
            ]
            if any(drawn):
                name = stage.name if stage.finished else f"{stage.name}, under way"
                parts.append(f"<h3>{name}</h3>" if len(found.of(kind)) > 1 else "")
                parts += drawn
    return f'<div class="charts">\n{"".join(parts)}</div>' if parts else ""


def _of_judge(stage: StageFound) -> list[str]:
    """The figure that weights are kept by, against the answers that it took and against KL."""
    name = next((key.removeprefix("heldout/") for row in stage.rows for key in row
                 if key.startswith("heldout/")), None)  # fmt: skip
    sampled = _line(stage, "sampled answers", "episode", "reward/rule")
    if name is None:
        return [chart([sampled], *ANSWERS[1:], "share", title="Relevant answers")]
    key = f"heldout/{name}"
    lines = [_line(stage, "held-out users", "episode", key)]
    if name == "relevance":
        lines.append(sampled)
    of_kl = _line(stage, "held-out users", "heldout/kl", key)
    title = name.capitalize()
    return [
        chart(lines, ANSWERS[1], name, title=f"{title} against answers"),
        chart([of_kl], "KL to the SFT model, nats an answer", name, title=f"{title} against KL"),
    ]


def _chart(stage: StageFound, about: Curves) -> str:
    lines = [_line(stage, name, about.x, key) for name, key in about.columns.items()]
    ends = None
    if about.lowest is not None:
        values = [v for line in lines for v in line.y]
        low = max(min([0.0, *values]), about.lowest)
        ends = low, max([1.0, *values])
    return chart(lines, about.x_name, about.y_name, title=about.title, y_ends=ends)


def _line(stage: StageFound, name: str, x: str, y: str) -> Line:
    """The rows that have both figures, and the interval of y where it is there."""
    rows = [row for row in stage.rows if _is_number(row.get(x)) and _is_number(row.get(y))]
    ends: Sequence[Any] = [row.get(f"{y}_interval") for row in rows]
    low, high = zip(*ends, strict=True) if ends and all(ends) else ((), ())
    return Line(name, [row[x] for row in rows], [row[y] for row in rows], low, high,
                source=f"{stage.file(METRICS)}#{x},{y}")  # fmt: skip


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
