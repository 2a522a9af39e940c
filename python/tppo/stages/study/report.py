"""The report of a study: one HTML page with tables and charts that loads nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from tppo.evaluation.page import page
from tppo.stages.study.curves import Line, chart
from tppo.stages.study.tables import Table, named, tables

TITLE = "What labels of words and rewards of tokens buy"
CSS = """
:root { --page: #f6f6f8; --card: #fff; --ink: #1c1d22; --soft: #5d606b; --line: #dfe0e6;
  --c0: #1f6fc0; --c1: #c8641a; --c2: #2f8f5b; --c3: #8a4fb5; --c4: #b5365a; --c5: #6b6f7a; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14151a; --card: #1d1f26; --ink: #ecedf2; --soft: #a2a6b4; --line: #343743;
    --c0: #6cb0f5; --c1: #f0a45f; --c2: #6fcf97; --c3: #c79bea; --c4: #f28aa5; --c5: #a2a6b4; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 72rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { margin: 0; font-size: 1.75rem; } h2 { margin: 2rem 0 .5rem; font-size: 1.1rem; }
p { color: var(--soft); max-width: 48rem; }
.scroll, figure { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: .875rem; }
th, td { padding: .4rem .8rem; text-align: right; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; }
thead th { color: var(--soft); font-weight: 600; border-bottom: 1px solid var(--line); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); gap: 1rem; }
figure { margin: 0; padding: .75rem; }
figure > svg { width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 12px; }
svg .grid { stroke: var(--line); }
polyline { fill: none; stroke-width: 2; }
circle { stroke: none; }
.legend { list-style: none; margin: .5rem 0 0; padding: 0; display: flex; flex-wrap: wrap;
  gap: .25rem 1rem; font-size: .8125rem; color: var(--soft); }
.legend svg { width: 28px; height: 8px; margin-right: .4rem; }
.legend line { stroke-width: 2; }
""" + "".join(
    f".c{k} {{ stroke: var(--c{k}); }} circle.c{k} {{ fill: var(--c{k}); }}\n" for k in range(6)
)


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
    return page(TITLE, CSS, body)


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.head)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n"
        for row in table.rows
    )
    return (
        f"<h2>{escape(table.title)}</h2><p>{escape(table.note)}</p>"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>\n{rows}</tbody></table></div>\n"
    )


def _line(name: str, x: list[float], points: list[list[float | None]]) -> Line:
    """A curve of points with intervals; a point that is not known is left out."""
    kept = [
        (at, value, value if low is None else low, value if high is None else high)
        for at, (value, low, high) in zip(x, points, strict=True)
        if value is not None
    ]
    columns = [[float(row[i]) for row in kept] for i in range(4)]
    return Line(name, *columns)


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
            explained.append(Line(name, *map(list, zip(*known, strict=True))) if known
                             else Line(name, [], []))  # fmt: skip
        found.append(chart(explained, "sampled answers", "explained variance of the critic"))
    return found
