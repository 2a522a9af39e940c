"""Checkpoints that a kill at any moment cannot spoil.

step-N.tmp/ -> files -> fsync -> COMPLETE.json (sizes, sha256) -> rename to step-N -> `latest`.
No pickle is read back: weights are safetensors, optimiser state loads with `weights_only=True`.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tppo import stopping
from tppo.progress import say, say_once
from tppo.store.disk import DiskFull, NotWritable, space_for
from tppo.store.hashes import sha256
from tppo.store.jsonl import read_object, sync_directory, write_json, write_text
from tppo.store.rows import RowFile, Rows, read_rows
from tppo.store.run_folder import versions

COMPLETE, LATEST = "COMPLETE.json", "latest"
EVERY_S = 300.0  # at least, between two checkpoints of work that does not choose its steps itself
LAST_S = 30.0  # the same before one behind the last step: what follows would have to repeat it all
WRITING = 0.05  # share of the time, at most, that such work spends on writing them


class Checkpoint(NamedTuple):
    """Everything that a run needs in order to continue."""

    step: int
    weights: dict[str, dict[str, Tensor]]
    optimizer: dict[str, Any]
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one piece of work in a folder; a `tppo.models.keeper.Keeper`.

    name, unit: what messages call the work, and a step of it.  resumed: called with the state of a
    checkpoint that is gone on from.
    Work of seconds writes none unless a signal asks it to stop.
    """

    def __init__(
        self,
        root: Path,
        name: str,
        unit: str = "step",
        resumed: Callable[[dict[str, Any]], object] = lambda state: None,
    ):
        self.root, self.name, self.unit, self.resumed = root, name, unit, resumed
        self.written, self.took_s = time.monotonic(), 0.0

    def newest(self, steps: int) -> Checkpoint | None:
        """The newest whole checkpoint, if there is one, of work of so many steps."""
        found = load_latest(self.root)
        if found is not None:
            say(f"{self.name}: resumes after {self.unit} {found.step} of {steps}")
            self.resumed(found.state)
        return found

    def after(self, step: int, steps: int, rest: Callable[[], tuple[Any, Any, Any]]) -> None:
        """Write a checkpoint where it is time for one, or a signal has asked to stop.

        rest: weights, optimiser and state, as `save_checkpoint` takes them.
        Errors: Stopped behind a signal; DiskFull or NotWritable where its checkpoint cannot be
        written.  One that nobody has asked for is not worth the work: it is left out, with a
        warning.
        """
        signum = stopping.asked()
        if signum is not None:
            save_checkpoint(self.root, step, *rest())
            raise stopping.Stopped(signum, f"it is saved after {self.unit} {step} of {steps}")
        start = time.monotonic()
        wait_s = min(LAST_S, EVERY_S) if step == steps else max(EVERY_S, self.took_s / WRITING)
        if start - self.written < wait_s:
            return
        try:
            save_checkpoint(self.root, step, *rest())
        except (DiskFull, NotWritable) as error:
            say_once(f"WARNING: {self.name} goes on without a new checkpoint: {error}")
        self.written = time.monotonic()
        self.took_s = self.written - start


def save_checkpoint(
    root: Path,
    step: int,
    weights: Mapping[str, Mapping[str, Tensor]],
    optimizer: dict[str, Any],
    state: dict[str, Any],
) -> None:
    """Write `root/step-N`, whole or not at all; of the older ones the newest stays.

    Raises DiskFull, with what is needed and how to go on, where there is no space for it.
    """
    work, final = root / f"step-{step}.tmp", root / f"step-{step}"
    for left in root.glob("step-*.tmp"):  # by a process that was killed while it wrote
        shutil.rmtree(left)
    work.mkdir(parents=True)
    before = _complete(root)
    goes_on = f"goes on after step {before[-1][0]}" if before else "begins anew"
    remedy = f"Make room and run the same command again: it {goes_on}."
    nbytes = _nbytes(weights, optimizer)
    try:
        with space_for(work, f"the checkpoint of step {step}", remedy, nbytes):
            _write(work, step, weights, optimizer, state)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(work, final)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    sync_directory(root)
    write_text(root / LATEST, final.name)
    for _, old in _complete(root)[:-2]:
        shutil.rmtree(old)


def _write(
    work: Path,
    step: int,
    weights: Mapping[str, Mapping[str, Tensor]],
    optimizer: dict[str, Any],
    state: dict[str, Any],
) -> None:
    for name, tensors in weights.items():
        # A clone of each: safetensors refuses tensors that share memory, such as tied embeddings.
        save_file(
            {key: tensor.detach().cpu().clone() for key, tensor in tensors.items()},
            work / f"{name}.safetensors",
        )
    with open(work / "optimizer.pt", "wb") as opened:  # here: Python says why a write fails
        torch.save(optimizer, opened)
    rows = {name: value for name, value in state.items() if isinstance(value, Rows)}
    for name, value in rows.items():  # as they are: encoded anew they would cost more every time
        RowFile(work / f"{name}.jsonl").write(value)
    write_json(work / "state.json", {k: v for k, v in state.items() if k not in rows})
    files = sorted(work.iterdir())
    for file in files:
        sync_directory(file)
    entries = {f.name: {"nbytes": f.stat().st_size, "sha256": sha256(f)} for f in files}
    write_json(work / COMPLETE, {"step": step, "files": entries, "versions": versions()})
    sync_directory(work)


def _nbytes(*values: Any) -> int:
    """About how many bytes the tensors in these take on the disk."""
    leaves = tree_leaves(values)
    return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))


def load_latest(root: Path) -> Checkpoint | None:
    """The newest complete checkpoint; a damaged one is skipped with a warning."""
    found = _complete(root)
    for step, path in reversed(found):
        damage = _damage(path)
        if damage is None:
            return _load(path, step)
        say(f"{path}: passed over, {damage}")
    if found:
        say(f"WARNING: {root}: no checkpoint is whole; the stage begins anew")
    return None


def _complete(root: Path) -> list[tuple[int, Path]]:
    """The renamed checkpoints by step."""
    numbers = ((path.name.removeprefix("step-"), path) for path in root.glob("step-*"))
    return sorted((int(number), path) for number, path in numbers if number.isdecimal())


def _load(path: Path, step: int) -> Checkpoint:
    return Checkpoint(
        step=step,
        weights={file.stem: load_file(file) for file in path.glob("*.safetensors")},
        optimizer=torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True),
        state=json.loads((path / "state.json").read_text(encoding="utf-8"))
        | {file.stem: read_rows(file) for file in path.glob("*.jsonl")},
    )


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, None if nothing is."""
    entries = (read_object(path / COMPLETE) or {}).get("files")
    if not isinstance(entries, dict):
        return f"no readable {COMPLETE}"
    for name in sorted({*entries, "state.json", "optimizer.pt", *os.listdir(path)} - {COMPLETE}):
        entry, file = entries.get(name), path / name
        if not isinstance(entry, dict) or not {"nbytes", "sha256"} <= entry.keys():
            return f"{COMPLETE} does not say what {name} is"
        if not file.is_file() or file.stat().st_size != entry["nbytes"]:
            return f"{name} is missing or cut"
        if sha256(file) != entry["sha256"]:
            return f"{name} has changed"
    return None
