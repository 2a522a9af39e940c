"""What lies in a run folder, finished or not, as the report reads it.

Nothing here is needed for a result, so that what is not there yet is left out of the page, and no
stage declares it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tppo.errors import DataError
from tppo.stages.artifacts import BASELINES, HEAT_ROWS, IMPROVED
from tppo.stages.journal import METRICS, SAMPLES
from tppo.stages.registry import REGISTRY
from tppo.store.folder_lock import holder
from tppo.store.hashes import MANIFEST, sha256
from tppo.store.jsonl import parse_object, read_lines, read_object

REPORT = "report.html"
ROWS = {  # the files whose rows are drawn, of the stages that have others than metrics.jsonl
    "baselines": tuple(f"{name}/{METRICS}" for name in BASELINES),
    "ser": ("rounds.jsonl",),
    "pit": ("sft.jsonl", "gap.jsonl", "stage-0.jsonl", "stage-1.jsonl"),
    "improve": (IMPROVED.name,),
}
UNDER_WAY = ".tmp"  # behind the name of a stage: its folder until it has finished


@dataclass(frozen=True)
class StageFound:
    """The folder of one stage."""

    name: str
    """With its round, where that is not the first: `train-2`."""
    folder: str
    """In the run folder; another than the name while the stage has not finished."""
    manifest: Mapping[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Of metrics.jsonl."""
    report: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The name without the round."""
        return re.sub(r"-\d+$", "", self.name)

    @property
    def finished(self) -> bool:
        """Whether the stage has left its result."""
        return not self.folder.endswith(UNDER_WAY)

    def file(self, name: str) -> str:
        """A file of the stage, in the run folder."""
        return f"{self.folder}/{name}"


@dataclass(frozen=True)
class Found:
    """A run folder."""

    out: Path
    stages: list[StageFound]
    result_file: str
    result: Mapping[str, Any] | None
    settings: Mapping[str, Any]
    """The flags of run.yaml; empty for a training by the Python door."""
    process: Mapping[str, str] | None
    """Who works in the folder now."""

    def of(self, kind: str) -> list[StageFound]:
        """The stage in each of its rounds, and behind a finished one what replaces it."""
        return [stage for stage in self.stages if stage.kind == kind]

    def rows(self, stage: StageFound, name: str) -> list[dict[str, Any]]:
        """The rows of a JSONL file of a stage, or of a list; none where it is not there or has
        none.

        Errors: DataError where it is not what the stage wrote.
        """
        check_written(self.out / stage.folder, name, stage.manifest)
        return _rows(self.out / stage.file(name))


def read_folder(out: Path) -> Found:
    """What a run folder holds.

    Errors: DataError where it is no run folder, or a file of it is damaged.
    """
    if not out.is_dir():
        raise DataError(f"{out}: no such folder, expected a run folder (`tppo run` makes one)")
    stages = [_stage(out, folder) for folder in _folders(out)]
    if not stages:
        raise DataError(f"{out}: holds no stage, expected a run folder (`tppo run` makes one)")
    results = sorted(out.glob("result*.json"), key=lambda p: (len(p.name), p.name))
    settings: Any = {}
    if (out / "run.yaml").exists():
        from tppo.store.yaml_file import read_yaml

        settings = read_yaml(out / "run.yaml")[0]
    return Found(
        out, stages, results[-1].name if results else "result.json",
        read_object(results[-1]) if results else None,
        settings if isinstance(settings, dict) else {}, holder(out),
    )  # fmt: skip


def sources(out: Path) -> list[tuple[str, int]]:
    """What the page is made of: files and when each was written, to see whether one has changed."""
    found = []
    for folder in _folders(out):
        own = (name for names in ROWS.values() for name in names)
        for name in (MANIFEST, METRICS, SAMPLES, "report.json", HEAT_ROWS.name, *own):
            found.append(out / folder / name)
    found += [out / "run.yaml", *out.glob("result*.json")]
    return sorted((str(path), path.stat().st_mtime_ns) for path in found if path.exists())


def _folders(out: Path) -> list[str]:
    """The folders of stages, in the order of the stages, rounds and folders under way last."""
    order = {name: i for i, name in enumerate(REGISTRY)}

    def place(folder: str) -> tuple[int, str, int, bool]:
        name = folder.removesuffix(UNDER_WAY)
        later = re.fullmatch(r"(.+)-(\d+)", name)
        kind, round = (later[1], int(later[2])) if later else (name, 1)
        return order.get(kind, len(order)), kind, round, folder != name

    found = [path.parent.name for path in out.glob(f"*/{MANIFEST}")]
    return sorted((f for f in found if not f.endswith(".old")), key=place)


def _stage(out: Path, folder: str) -> StageFound:
    path = out / folder
    manifest = read_object(path / MANIFEST) or {}
    for name in (METRICS, "report.json"):
        check_written(path, name, manifest)
    return StageFound(
        folder.removesuffix(UNDER_WAY), folder, manifest, _rows(path / METRICS),
        read_object(path / "report.json") or {},
    )  # fmt: skip


def check_written(folder: Path, name: str, manifest: Mapping[str, Any]) -> None:
    """A file that a finished stage has is the one that it wrote.

    Errors: DataError where it is another: figures of it would be shown as the stage's own.
    """
    outputs = manifest.get("outputs")
    entry = outputs.get(name) if isinstance(outputs, dict) else None
    file = folder / name
    if isinstance(entry, dict) and file.is_file() and sha256(file) != entry.get("sha256"):
        raise DataError(f"{file}: not the file that stage {folder.name} wrote, by SHA-256; run "
                        f"stage {folder.name} again, or restore it")  # fmt: skip


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists() or not path.stat().st_size:
        return []
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))  # a list of rows
    lines = [*enumerate(read_lines(path), 1)]
    if not lines[-1][1].endswith(b"\n"):  # of a stage under way: the row is not whole yet
        lines.pop()
    return [parse_object(path, number, raw) for number, raw in lines if raw.strip()]
