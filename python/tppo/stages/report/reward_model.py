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
                f"<div>{_confusion(report['confusion'], file)}</div></div>")  # fmt: skip
    return ""


def _sentence(report: Mapping[str, Any], file: str) -> str:
    auc = report["auc"]
    parts = [
        "On held-out answers a relevant token is rated above an irrelevant one in "
        f"{figure(auc, percent(auc), file, 'auc')} of the pairs (AUC)" if auc is not None else
        "The held-out labels are all alike, so that there is no AUC",
        f"the class of {figure(report['accuracy'], percent(report['accuracy']), file, 'accuracy')} "
        "of all tokens is right",
        "probabilities are off by "
        + figure(report["calibration_error"], percent(report["calibration_error"]), file,
                 "calibration_error") + " on average",
    ]  # fmt: skip
    answers = figure(report["answers"], number(report["answers"]), file, "answers")
    return (f"{', '.join(parts[:2])}, and {parts[2]}. It learnt from {answers} answers, labelled "
            f"by {markup(spoken(report['labeller']))}.")  # fmt: skip


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
