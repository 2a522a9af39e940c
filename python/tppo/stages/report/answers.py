"""Answers in the report: SFT and TPPO side by side token by token, and samples over training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from tppo.evaluation.heat import HeatRow, heat_section
from tppo.evaluation.page import figure, markup, number
from tppo.stages.artifacts import HEAT_ROWS
from tppo.stages.journal import SAMPLES
from tppo.stages.report.found import Found, StageFound
from tppo.stages.report.outcome import called

GROUPS = {
    "best": "Where TPPO gained most over SFT",
    "worst": "Where TPPO gained least or lost most",
    "random": "Drawn at random from the others",
}
READING = """Each line is a query, each box a token; a gap stands where a new word begins, ∎ is the
end of the answer. ✓ and ✗ are what the reward model takes the token for, the number is what it
pays for it. “Value” is what the critic expected from there on, “Advantage” how much better the
token turned out than expected, whitened over the answers of each model: PPO makes tokens in blue
likelier and those in orange rarer. Both answers are scored by the same reward model, and by the
critic as it was at the end of training, with KL to the SFT model taken off on the way."""
QUESTIONS = 4  # whose samples are shown
MOST_STEPS = 8  # of a question; of more evaluations the first, the last and some between


def side_by_side(found: Found) -> str:
    """The heat map of the newest heat stage; "" where there is none."""
    for stage in reversed(found.of("heat")):
        name = HEAT_ROWS.name
        lines = found.rows(stage, name)
        if not lines:
            continue
        rows = [HeatRow(**{key: line[key] for key in HeatRow.__dataclass_fields__}
                        | {"name": called(line["name"])}) for line in lines]  # fmt: skip
        heading = {next(group)["id"]: f"<h3>{GROUPS[why]}</h3>"
                   for why, group in groupby(lines, lambda row: row["chosen"])}  # fmt: skip
        return f"<p>{READING}</p>{heat_section(rows, heading, stage.file(name))}"
    return ""


def samples(found: Found) -> str:
    """How the answers to the same questions change; "" where none are kept."""
    for stage in reversed(found.of("train")):
        rows = [*enumerate(found.rows(stage, SAMPLES))]
        if not rows:
            continue
        ids = list(dict.fromkeys(row["id"] for _, row in rows))[:QUESTIONS]
        cards = [_question(stage, [pair for pair in rows if pair[1]["id"] == id]) for id in ids]
        return ("<p>Answers to the first held-out questions, drawn with the same seed at every "
                "evaluation; step 0 is the SFT model.</p>"
                f'<div class="sides">{"".join(cards)}</div>')  # fmt: skip
    return ""


def _question(stage: StageFound, rows: Sequence[tuple[int, Mapping[str, Any]]]) -> str:
    first = rows[0][1]
    targets = "".join(f"<li>{markup(target)}</li>" for target in first.get("targets", ()))
    true = f'<h4>True next queries</h4><ul class="targets">{targets}</ul>' if targets else ""
    drawn = "".join(_sample(stage, i, row) for i, row in _some(rows))
    prompt = first["prompt"]
    if not isinstance(prompt, str):  # a chat
        prompt = "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in prompt)
    return (f"<article><h3>{markup(first['id'])}</h3>"
            f"<dl>{drawn}</dl>{true}<details><summary>Prompt</summary>"
            f"<pre>{markup(prompt, keep=chr(10))}</pre></details></article>")  # fmt: skip


def _some(
    rows: Sequence[tuple[int, Mapping[str, Any]]],
) -> list[tuple[int, Mapping[str, Any]]]:
    n = len(rows)
    if n <= MOST_STEPS:
        return [*rows]
    return [rows[round(k * (n - 1) / (MOST_STEPS - 1))] for k in range(MOST_STEPS)]


def _sample(stage: StageFound, i: int, row: Mapping[str, Any]) -> str:
    file = stage.file(SAMPLES)
    name, value = next(iter(row["figures"].items()))
    step = figure(row["step"], str(row["step"]), file, i, "step")
    shown = figure(value, number(value), file, i, "figures", name)
    cut = "" if row["finish"] == "eos" else ", cut"
    return (f"<dt>Step {step}, {markup(name)} {shown}{cut}</dt>"
            f"<dd>{markup(row['answer'], keep=chr(10)) or '∎'}</dd>")  # fmt: skip
