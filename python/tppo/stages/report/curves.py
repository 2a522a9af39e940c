"""The curves of the report: every stage that trains, from its metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from tppo.evaluation.chart import Line, chart
from tppo.evaluation.judge import first_figure
from tppo.evaluation.page import figure, markup, number
from tppo.stages.journal import METRICS
from tppo.stages.report.found import ROWS, Found, StageFound


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
GUIDE = (
    Curves("What the guide writes", "step", "PPO steps", "share",
           {"tokens of the guide": "guide/tokens", "steps of AggreVaTeD": "guide/aggrevated",
            "steps without the guide's answer": "guide/skipped"}),
)  # fmt: skip
SER = (
    Curves("Accuracy on held-out answers", "round", "rounds", "share", {"accuracy": "accuracy"}),
    Curves("Relevant above irrelevant tokens, held out", "round", "rounds", "AUC", {"AUC": "auc"}),
    Curves("Labels that the model gave itself", "round", "rounds", "share that is right",
           {"right": "kept_accuracy"}),
    Curves("What a round labelled", "round", "rounds", "pairs, or answers",
           {"kept": "kept", "trained on": "trained_on"}),
)  # fmt: skip
GAP = (
    Curves("Gap model", "epoch", "epochs", "loss",
           {"training": "loss", "held out": "heldout_loss"}),
)  # fmt: skip
IMPROVED = Curves("How much better the gap model finds an answer", "step", "improvements",
                  "gap to the answer before", {"gap": "gap"})  # fmt: skip
OF_FILE = {"sft.jsonl": SFT, "gap.jsonl": GAP}
TOLD = {
    "sentence_labels": "labels of whole answers", "paid_at_end": "the same rewards at the end",
    "sft": "SFT", "gap": "gap model", "stage-0": "stage 0, references of the data",
    "stage-1": "stage 1, references of the policy",
}  # fmt: skip
KINDS = {"train": (*PPO, *GUIDE), "sft": SFT, "train-rm": REWARD_MODEL, "ser": SER,
         "ser-train": PPO, "baselines": PPO, "pit": PPO}  # fmt: skip
JUDGED = ("train", "ser-train", "baselines")


def curves(found: Found) -> str:
    """The charts of every stage that has some, PPO first; "" where there are none."""
    parts = []
    for kind in (*KINDS, "improve"):
        for stage in found.of(kind):
            for part in _parts(found, stage):
                drawn = _drawn(part)
                if any(drawn):
                    more = len(found.of(kind)) > 1 or kind not in ("train", "sft", "train-rm")
                    parts.append(f"<h3>{markup(_called(part))}</h3>" if more else "")
                    parts += drawn
    return f'<div class="charts">\n{"".join(parts)}</div>' if parts else ""


class Part(NamedTuple):
    """Rows of a stage, in one of its files."""

    stage: StageFound
    name: str
    rows: Sequence[dict[str, Any]]


def _parts(found: Found, stage: StageFound) -> list[Part]:
    names = ROWS.get(stage.kind, (METRICS,))
    return [Part(stage, name, stage.rows if name == METRICS else found.rows(stage, name))
            for name in names]  # fmt: skip


def _called(part: Part) -> str:
    name = part.name.partition("/")[0].partition(".")[0]
    told = f": {TOLD[name]}" if name in TOLD else ""
    return f"{part.stage.name}{told}{'' if part.stage.finished else ', under way'}"


def _drawn(part: Part) -> list[str]:
    kind = part.stage.kind
    if kind == "improve":
        return _of_improvements(part)
    drawn = _of_judge(part) if kind in JUDGED else []
    drawn += [_chart(part, about) for about in OF_FILE.get(part.name, KINDS[kind])]
    return [*drawn, _by_true_labels(part)] if kind == "ser" else drawn


def _by_true_labels(part: Part) -> str:
    """What a model reaches that has the true labels, of the same items or of all."""
    told, file = [], part.stage.file("report.json")
    for key, which in (("true_labels", "of the same answers"), ("all_labels", "of all of them")):
        row = part.stage.report.get(key) or {}
        shown = [f"{called} {figure(row[name], number(row[name]), file, key, name)}"
                 for name, called in (("accuracy", "accuracy"), ("auc", "AUC"),
                                      ("trained_on", "trained on"))
                 if _is_number(row.get(name))]  # fmt: skip
        if shown:
            told.append(f"{which}: {', '.join(shown)}")
    return f"<p>A model with the true labels {'; '.join(told)}.</p>" if told else ""


def _of_improvements(part: Part) -> list[str]:
    """The judge's figure after each improvement, and the gap."""
    name = first_figure(part.rows[0]) if part.rows else None
    if name is None:
        return []
    about = Curves(f"{name.capitalize()} of test users' answers", "step", "improvements", name,
                   {name: name})  # fmt: skip
    return [_chart(part, about), _chart(part, IMPROVED)]


def _of_judge(part: Part) -> list[str]:
    """The figure that weights are kept by, against the answers that it took and against KL."""
    name = next((key.removeprefix("heldout/") for row in part.rows for key in row
                 if key.startswith("heldout/")), None)  # fmt: skip
    sampled = _line(part, "sampled answers", "episode", "reward/rule")
    if name is None:
        return [chart([sampled], *ANSWERS[1:], "share", title="Relevant answers")]
    key = f"heldout/{name}"
    lines = [_line(part, "held-out users", "episode", key)]
    if name == "relevance":
        lines.append(sampled)
    of_kl = _line(part, "held-out users", "heldout/kl", key)
    title = name.capitalize()
    return [
        chart(lines, ANSWERS[1], name, title=f"{title} against answers"),
        chart([of_kl], "KL to the SFT model, nats an answer", name, title=f"{title} against KL"),
    ]


def _chart(part: Part, about: Curves) -> str:
    lines = [_line(part, name, about.x, key) for name, key in about.columns.items()]
    ends = None
    if about.lowest is not None:
        values = [v for line in lines for v in line.y]
        low = max(min([0.0, *values]), about.lowest)
        ends = low, max([1.0, *values])
    return chart(lines, about.x_name, about.y_name, title=about.title, y_ends=ends)


def _line(part: Part, name: str, x: str, y: str) -> Line:
    """The rows that have both figures, and the interval of y where it is there."""
    rows = [row for row in part.rows if _is_number(row.get(x)) and _is_number(row.get(y))]
    ends: Sequence[Any] = [row.get(f"{y}_interval") for row in rows]
    low, high = zip(*ends, strict=True) if ends and all(ends) else ((), ())
    return Line(name, [row[x] for row in rows], [row[y] for row in rows], low, high,
                source=f"{part.stage.file(part.name)}#{x},{y}")  # fmt: skip


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
