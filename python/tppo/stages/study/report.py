"""The report of a study: one HTML page with tables and charts that loads nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from tppo.evaluation.chart import Line, chart
from tppo.evaluation.page import page, table
from tppo.stages.study.tables import Table, named, tables

TITLE = "What labels of words and rewards of tokens buy"


def report(found: Mapping[str, Any]) -> str:
    """The page of what study.json holds."""
    figures = found["figures"]
    charts = [*_label_charts(figures), *_credit_charts(figures)]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    body = f"""<h1>{TITLE}</h1>
<p>{found["trained"]} of {found["wanted"]} trainings, {found["seconds"] / 60:.0f} minutes of one
core; {escape(versions)}. Every outcome is in study.json.</p>
<div class="charts">
{"".join(charts)}
</div>
{"".join(map(_table, tables(figures)))}"""
    return page(TITLE, "", body)


def _table(found: Table) -> str:
    rows = [[escape(cell) for cell in row] for row in found.rows]
    return (f"<h2>{escape(found.title)}</h2><p>{escape(found.note)}</p>"
            f"{table(found.head, rows, found.title)}")  # fmt: skip


def _line(name: str, x: list[float], points: list[list[float | None]]) -> Line:
    """A curve of points with intervals; a point that is not known is left out."""
    kept = [
        (at, value, value if low is None else low, value if high is None else high)
        for at, (value, low, high) in zip(x, points, strict=True)
        if value is not None
    ]
    at, y, low, high = ([float(row[i]) for row in kept] for i in range(4))
    return Line(name, at, y, low, high)


def _label_charts(figures: Mapping[str, Any]) -> list[str]:
    found = []
    for figure in ("correlation", "relevance"):
        lines = [
            _line(f"{name}, {named(setting)}", arm["answers"], arm[figure])
            for setting in figures["labels"]
            for name, arm in setting["arms"].items()
            if figure in arm
        ]
        title = "rank correlation" if figure == "correlation" else "relevance after PPO"
        found.append(chart(lines, "labelled answers", title, log=True))
    return found


def _credit_charts(figures: Mapping[str, Any]) -> list[str]:
    found = []
    for setting in figures["credit"]:
        arms, what = setting["arms"], f"relevance, {setting['queries']} queries"
        lines = [_line(name, arm["answers"], arm["relevance"]) for name, arm in arms.items()]
        found.append(chart(lines, "sampled answers", what))
        by_kl = [
            Line(name, [row["kl"] for row in arm["rows"]], [p[0] for p in arm["relevance"]])
            for name, arm in arms.items()
        ]
        found.append(chart(by_kl, "KL per answer, nats", what))
        explained = []
        for name, arm in arms.items():
            known = [(x, row["explained_variance"])
                     for x, row in zip(arm["answers"], arm["rows"], strict=True)
                     if "explained_variance" in row]  # fmt: skip
            explained.append(Line(name, [at for at, _ in known], [y for _, y in known]))
        found.append(chart(explained, "sampled answers", "explained variance of the critic"))
    return found
