"""The reward model in the report: what it tells apart, and whether its probabilities come true."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tppo.evaluation.chart import Line, chart
from tppo.evaluation.heat import CATEGORIES
from tppo.evaluation.judge import spoken
from tppo.evaluation.page import figure, markup, number, table
from tppo.labels.shares import wilson
from tppo.stages.report.found import Found
from tppo.stages.report.outcome import percent


def reward_model(found: Found) -> str:
    """AUC, accuracy, calibration and confusion on held-out answers; "" without a reward model."""
    for stage in reversed(found.of("train-rm")):
        report, file = stage.report, stage.file("report.json")
        if "calibration" not in report:
            continue
        return (f"<p>{_sentence(report, file)}</p>"
                f'<div class="sides">{_calibration(report["calibration"], file)}'
                f"<div>{_confusion(report['confusion'], file)}</div></div>"
                f"{_curve(report, file)}")  # fmt: skip
    return ""


def _sentence(report: Mapping[str, Any], file: str) -> str:
    auc = report["auc"]
    parts = [
        "On held-out answers a relevant token is rated above an irrelevant one in "
        f"{figure(auc, percent(auc), file, 'auc')} of the pairs (AUC{_interval(report, file)})"
        if auc is not None else
        "The held-out labels are all alike, so that there is no AUC",
        f"the class of {figure(report['accuracy'], percent(report['accuracy']), file, 'accuracy')} "
        "of all tokens is right",
        "probabilities are off by "
        + figure(report["calibration_error"], percent(report["calibration_error"]), file,
                 "calibration_error") + " on average",
    ]  # fmt: skip
    answers = figure(report["answers"], number(report["answers"]), file, "answers")
    return (f"{', '.join(parts[:2])}, and {parts[2]}. It learnt from {answers} answers, labelled "
            f"by {markup(spoken(report['labeller']))}.{_by_source(report, file)}")  # fmt: skip


def _interval(report: Mapping[str, Any], file: str) -> str:
    """The ends of the AUC's interval, where it has one."""
    ends = report.get("auc_interval")
    if ends is None:
        return ""
    low, high = (figure(end, percent(end), file, "auc_interval", i) for i, end in enumerate(ends))
    return f", 95 % interval {low} to {high}"


def _by_source(report: Mapping[str, Any], file: str) -> str:
    """The AUC on the answers of each labeller, where there are several."""
    sources = report.get("sources") or {}
    if len(sources) < 2:
        return ""
    parts = []
    for name, part in sources.items():
        n = figure(part["answers"], number(part["answers"]), file, "sources", name, "answers")
        auc = "unknown" if part["auc"] is None else figure(
            part["auc"], percent(part["auc"]), file, "sources", name, "auc"
        )
        parts.append(f"{n} by {markup(spoken(name))}, AUC {auc}")
    return f" Of these {'; '.join(parts)}."


def _curve(report: Mapping[str, Any], file: str) -> str:
    """What fewer labels by hand gave; "" where nothing was trained anew."""
    curve = report.get("curve")
    if not curve:
        return ""
    rows = []
    for i, row in enumerate(curve):
        shown = [figure(row[key], number(row[key]), file, "curve", i, key)
                 for key in ("by_hand", "others")]  # fmt: skip
        for key in ("auc", "more"):
            value, ends = row[key], row[f"{key}_interval"]
            cell = "–" if value is None else figure(value, percent(value), file, "curve", i, key)
            if value is not None and ends is not None:
                low, high = (figure(end, percent(end), file, "curve", i, f"{key}_interval", k)
                             for k, end in enumerate(ends))  # fmt: skip
                cell += f' <small class="soft">{low} to {high}</small>'
            shown.append(cell)
        rows.append(shown)
    head = ("labels by hand learnt from", "other labels", "AUC, 95 % interval",
            "more with all of them, 95 % interval")  # fmt: skip
    return table(head, rows, "What fewer labels by hand gave, on the same held-out answers")


def _calibration(bins: Sequence[Mapping[str, Any]], file: str) -> str:
    """The share of relevant tokens against the probability that they were given."""
    ends = [wilson(part["relevant"], part["tokens"]) for part in bins]
    low, high = zip(*ends, strict=True) if ends else ((), ())
    found = Line("held-out tokens, 95 % intervals", [part["predicted"] for part in bins],
                 [part["relevant"] for part in bins], low, high,
                 source=f"{file}#calibration/predicted,relevant")  # fmt: skip
    true = Line("probabilities that come true", [0.0, 1.0], [0.0, 1.0])
    return chart([found, true], "probability of relevant", "share that is relevant",
                 title="Calibration", y_ends=(0.0, 1.0))  # fmt: skip


def _confusion(matrix: Sequence[Sequence[int]], file: str) -> str:
    """Tokens of each class by what they are taken for, as counts and as shares of the row."""
    rows = []
    for i, counts in enumerate(matrix):
        total = sum(counts)
        cells = [
            f"<span>{figure(count, number(count), file, 'confusion', i, k)}"
            f' <small class="soft">{percent(count / total) if total else "–"}</small></span>'
            for k, count in enumerate(counts)
        ]
        rows.append([CATEGORIES[i], *cells])
    head = ("tokens that are", *(f"taken for {name}" for name in CATEGORIES))
    return table(head, rows, "Confusion of the token classes")
