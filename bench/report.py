"""`python bench/report.py FILE.json`: results as FILE.md (tables) and FILE.svg (a roofline)."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from _goals import LIGER_NOTE
from _journal import replace_text

Row = dict[str, Any]
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 760, 420, 70, 370, 30
FORMS = {"device_us": "device us", "wall_us": "call us", "gb_s": "GB/s",
         "percent_of_copy": "% of copy", "tflop_s": "TFLOP/s", "percent_of_matmul": "% of product",
         "launches": "launches", "peak_mb": "peak MB"}
ROUNDED = dict.fromkeys(FORMS, ",.1f") | {"percent_of_copy": ".0f", "percent_of_matmul": ".0f",
                                          "launches": "d"}
LEGEND = ("device us: on a GPU alone; call us: a call from Python. % of copy, % of product: of the "
          "copy bandwidth and of the rate of a product above. peak MB: beyond the inputs. errors: "
          "of each result and gradient, the largest absolute difference from fp64 of the same "
          "inputs.")
COLOURS = ("#1b6ca8", "#c0392b", "#27815b", "#8e44ad", "#e0a100", "#34495e", "#ff7f50", "#16c7b0",
           "#d63aa8", "#8b5a2b", "#7fb000", "#6f8fff")  # one an operator that has a benchmark


def markdown(results: dict[str, Any], plot: str | None) -> str:
    """The report: the machine, goals, operators, whole steps, kernels, checks and parts."""
    lines = _head(results["machine"], bool(results.get("options", {}).get("smoke")))
    goals: list[Row] = results.get("goals", [])
    if goals:
        lines += ["", "## Goals", "", *_table(("goal", "measured", "verdict"), [
            [g["goal"], f"{_text(g['value'])}{g.get('unit', '') * (g['value'] is not None)}",
             f"{g['verdict']}{': ' * bool(g['why'])}{g['why']}"]
            for g in goals])]
    rows: list[Row] = results.get("rows", [])
    if rows:
        lines += ["", "## Operators", "", *_table(
            ("operator", "shape", "implementation", *FORMS.values(), "speed-up of op over it",
             "errors", "note"), [_cells(row, rows) for row in rows]), "", LEGEND]
        if any("Liger" in row["implementation"] for row in rows) and not any(
                row["implementation"] == "Liger (Hopper)" for row in rows):
            lines += ["", LIGER_NOTE]
    if plot:
        lines += ["", f"![bytes moved against bandwidth reached]({plot})"]
    steps: list[Row] = results.get("steps", [])
    if steps:
        keys = [k for k in steps[0] if k != "device"]
        lines += ["", "## A PPO step", "", *_table(keys, [[_text(s[k]) for k in keys]
                                                          for s in steps])]
    for title, name in (("Answers, by engine", "rollouts"), ("Kernels, by ncu", "kernels"),
                        ("First touch", "first_touch")):
        found: list[Row] = results.get(name, [])
        if found:
            keys = [k for k in found[0] if k != "part"]
            lines += ["", f"## {title}", "", *_table(keys, [
                [_text(x.get(k)) for k in keys] for x in found])]
    return "\n".join([*lines, *_parts(results.get("checks", []))]) + "\n"


def _head(machine: Row, smoke: bool) -> list[str]:
    what = "A dry run, not a measurement," if smoke else "Measured"
    lines = [f"# {what} on {machine.get('gpu') or machine['cpu']}", "",
             f"torch {machine['torch']}, Python {machine['python']}, copy bandwidth "
             f"{machine['copy_gb_s']:,.0f} GB/s in the same session, {machine['time']}.", ""]
    if "matmul_tflop_s" in machine:
        lines[2] += (f" A product of random {machine['matmul_dtype']} matrices: "
                     f"{machine['matmul_tflop_s']:,.3g} TFLOP/s.")
    if smoke:
        lines[3:3] = ["", "`--smoke`: the parts are tried at tiny sizes, where calls cost more "
                      "than work. Its times say nothing about the operators, and no goal is judged "
                      "by them."]
    if "peers" in machine:
        lines += [f"Peers: {', '.join(f'{k} {v}' for k, v in machine['peers'].items())}."]
    return lines


def _parts(checks: list[Row]) -> list[str]:
    """The parts of a gpu-check; where the code changed between them, that is said."""
    if not checks:
        return []
    states = list(dict.fromkeys(c.get("code", "") for c in checks))
    lines = ["", "## Checks", "", *_table(
        ("part", "state", "seconds", "code", "what it said"),
        [[c["name"], c["state"], f"{c['seconds']:.0f}", c.get("code", ""), "; ".join(c["said"])]
         for c in checks])]
    if len(states) > 1:
        lines += ["", f"The parts ran on {len(states)} states of the code: {', '.join(states)}."]
    return lines


def _cells(row: Row, rows: list[Row]) -> list[str]:
    op = next((r for r in rows if (r["op"], r["shape"], r["implementation"])
               == (row["op"], row["shape"], "op")), None)
    over = op["speed_up"].get(row["implementation"]) if op else None
    return [row["op"], row["shape"], row["implementation"],
            *("-" if row.get(k) is None else format(row[k], form) for k, form in ROUNDED.items()),
            "-" if over is None else f"{over:.2f}",
            " ".join(f"{x:.0e}" for x in row.get("errors", [])), row.get("note", "")]


def _text(value: Any) -> str:
    return "-" if value is None else f"{value:,.2f}" if isinstance(value, float) else str(value)


def _table(head: Any, body: list[list[str]]) -> list[str]:
    """What a cell says stays in it, and on its line."""
    return [f"| {' | '.join(' '.join(cell.split()).replace('|', '/') for cell in cells)} |"
            for cells in (head, ["---"] * len(head), *body)]


def roofline(results: dict[str, Any]) -> str | None:
    """An SVG: bytes moved (x) against bandwidth reached (y) of "op"; the copy is the roof."""
    ours = [r for r in results.get("rows", []) if r["implementation"] == "op" and r["median_us"]]
    points = [(r["gb_s"] * r["median_us"] * 1e3, r["gb_s"], r["op"], r["shape"])
              for r in ours if r["gb_s"] > 0]
    if not points:
        return None
    roof = results["machine"]["copy_gb_s"]
    x_low, x_high = (f(math.log10(p[0]) for p in points) for f in (min, max))
    y_low = min(math.log10(p[1]) for p in points)
    y_high = max(math.log10(roof), *(math.log10(p[1]) for p in points))

    def at(nbytes: float, gb_s: float) -> tuple[float, float]:
        x = (math.log10(nbytes) - x_low) / max(x_high - x_low, 1e-9)
        y = (math.log10(gb_s) - y_low) / max(y_high - y_low, 1e-9)
        return LEFT + 20 + x * (WIDTH - LEFT - 200), BOTTOM - 20 - y * (BOTTOM - TOP - 40)

    colours = {op: COLOURS[i % len(COLOURS)] for i, op in enumerate(sorted({p[2] for p in points}))}
    roof_y = at(10 ** x_low, roof)[1]
    parts = [f'<line x1="{LEFT}" y1="{roof_y:.1f}" x2="{WIDTH - 160}" y2="{roof_y:.1f}" '
             'stroke="#333" stroke-dasharray="6 4"/>',
             f'<text x="{LEFT + 4}" y="{roof_y - 5:.1f}">copy: {roof:,.0f} GB/s</text>',
             f'<text x="{LEFT}" y="{HEIGHT - 15}">bytes moved (across), GB/s reached (up)</text>']
    for power in range(math.ceil(x_low), math.floor(x_high) + 1):
        x = at(10.0 ** power, roof)[0]
        parts.append(f'<text x="{x:.1f}" y="{BOTTOM + 18}" text-anchor="middle">1e{power}</text>')
    for power in range(math.ceil(y_low), math.floor(y_high) + 1):
        y = at(10 ** x_low, 10.0 ** power)[1]
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{10.0 ** power:g}'
                     "</text>")
    for nbytes, gb_s, op, shape in points:
        x, y = at(nbytes, gb_s)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colours[op]}">'
                     f"<title>{op} {shape}: {gb_s:,.1f} GB/s</title></circle>")
    parts += [f'<text x="{WIDTH - 150}" y="{TOP + 18 * i + 10}" fill="{colour}">{op}</text>'
              for i, (op, colour) in enumerate(colours.items())]
    frame = f'<path d="M{LEFT} {TOP}V{BOTTOM}H{WIDTH - 160}" fill="none" stroke="#333"/>'
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
            f'font-family="sans-serif" font-size="13">{frame}{"".join(parts)}</svg>\n')


def write(source: Path, stem: str | None = None) -> Path:
    """Renders a file of results beside it, under its own name or another; the report's path."""
    results = json.loads(source.read_text())
    target = source.with_name(f"{stem or source.stem}.md")
    plot = roofline(results)
    if plot:
        replace_text(target.with_suffix(".svg"), plot)
    replace_text(target, markdown(results, target.with_suffix(".svg").name if plot else None))
    return target


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(f"written: {write(Path(name))}")
