"""How the run went, in the report: time, tokens and files of each stage, versions, settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from tppo.config import Config
from tppo.evaluation.page import figure, markup, number, seconds, table
from tppo.stages.journal import METRICS, SAMPLES
from tppo.stages.registry import REGISTRY
from tppo.stages.report.found import Found, StageFound
from tppo.store.hashes import MANIFEST
from tppo.store.jsonl import plain


def stages(found: Found) -> str:
    """A row a stage: its time, the tokens that it read or wrote, its files."""
    rows, total = [], 0.0
    for stage in found.stages:
        took = stage.manifest.get("seconds") if stage.finished else None
        total += took or 0.0
        shown = "under way" if took is None else figure(
            took, seconds(took), stage.file(MANIFEST), "seconds")  # fmt: skip
        rows.append([_named(stage), shown, _tokens(stage), _files(found, stage)])
    rows.append(["all", seconds(total), "", _links(found)])
    return table(("Stage", "Time", "Tokens", "Files"), rows, "The stages", foot=1)


def _named(stage: StageFound) -> str:
    known = REGISTRY.get(stage.kind)
    help = f'<br><small class="soft">{markup(known.help)}</small>' if known else ""
    return f"{markup(stage.name)}{help}"


def _tokens(stage: StageFound) -> str:
    if stage.rows and "num_tokens" in stage.rows[-1]:
        n = stage.rows[-1]["num_tokens"]
        shown = figure(n, number(n), stage.file(METRICS), len(stage.rows) - 1, "num_tokens")
        return f"{shown} read"
    if "answer_tokens" in stage.report:
        n = stage.report["answer_tokens"]
        return f"{figure(n, number(n), stage.file('report.json'), 'answer_tokens')} sampled"
    return "–"


def _files(found: Found, stage: StageFound) -> str:
    """Links to what lies in the stage's folder; a folder in it is one link."""
    names = sorted({name.split("/")[0] for name in stage.manifest.get("outputs", {})})
    if not stage.finished:
        names = [name for name in (METRICS, SAMPLES) if (found.out / stage.file(name)).exists()]
    return "<span>" + ", ".join(_link(stage.file(n), n) for n in [*names, MANIFEST]) + "</span>"


def _links(found: Found) -> str:
    names = [name for name in (found.result_file, "run.yaml", "label-cache.jsonl",
                               "label-lost.jsonl") if (found.out / name).exists()]  # fmt: skip
    return "<span>" + ", ".join(_link(name, name) for name in names) + "</span>"


def _link(path: str, name: str) -> str:
    return f'<a href="{quote(f"./{path}")}">{markup(name)}</a>'


def versions(found: Found) -> str:
    """The versions that the stages ran with; several of one where they changed on the way."""
    seen: dict[str, dict[str, None]] = {}
    for stage in found.stages:
        for name, version in stage.manifest.get("versions", {}).items():
            seen.setdefault(name, {})[version] = None
    if not seen:
        return ""
    shown = ", ".join(f"{markup(name)} {markup(' and '.join(each))}" for name, each in seen.items())
    return f"<p>Versions: {shown}.</p>"


def settings(found: Found) -> str:
    """The flags of the run: those that are not the default at once, all of them on demand."""
    if not found.settings:
        return ""
    default = _flat(plain(Config()))
    given = _flat(found.settings.get("settings") or {})
    rows = [(name, value, default.get(name, "")) for name, value in given.items()]
    own = [(name, str(value), "") for name, value in found.settings.items() if name != "settings"]
    changed = [row for row in rows if row[1] != row[2]]
    head = ("Setting", "Value", "Default")
    return (
        _table(head[:2], [row[:2] for row in own], "Flags of the command")
        + ("<h3>Settings that are not the default</h3>" + _table(head, changed, "Changed settings")
           if changed else "<p>Every setting is the default.</p>")
        + f"<details><summary>All {len(rows)} settings</summary>"
        f"{_table(head, rows, 'All settings')}</details>"
    )  # fmt: skip


def _table(head: Any, rows: Any, caption: str) -> str:
    return table(head, [[markup(str(cell)) for cell in row] for row in rows], caption)


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Settings by their whole names, as flags have them: `ppo.batch_size`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{before}{key}"
        found |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found
