"""Checkpoints that a kill at any moment cannot spoil.

step-N.tmp/ -> files -> fsync -> COMPLETE.json (sizes, sha256, and a checksum of itself) -> rename
to step-N -> `latest`.
No pickle is read back: weights are safetensors, optimiser state loads with `weights_only=True`.

One that is damaged is passed over.  One that is whole but of other work, or of another version of
tppo that kept other things, is refused: nobody but its owner can say whether it is still of use.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tppo import stopping
from tppo.errors import DataError, short
from tppo.progress import say, say_once
from tppo.store.disk import DiskFull, NotWritable, delete, space_for
from tppo.store.hashes import MANIFEST, sha256
from tppo.store.jsonl import SUM, read_object, summed, sync_directory, write_json, write_text
from tppo.store.rows import RowFile, Rows, read_rows
from tppo.store.run_folder import KEPT, identity_of, versions

COMPLETE, LATEST = "COMPLETE.json", "latest"
ENTRIES = {"step", "of", "files", "versions", SUM}  # of COMPLETE.json
EVERY_S = 300.0  # at least, between two checkpoints of work that does not choose its steps itself
LAST_S = 30.0  # the same before one behind the last step: what follows would have to repeat it all
WRITING = 0.05  # share of the time, at most, that such work spends on writing them


class Checkpoint(NamedTuple):
    """Everything that a run needs in order to continue."""

    step: int
    weights: dict[str, dict[str, Tensor]]
    optimizer: dict[str, Any]
    state: dict[str, Any]
    path: Path
    versions: dict[str, str]

    def refused(self, why: str) -> DataError:
        """The error of work that cannot go on from it."""
        return _refused(self.path, self.versions, why)


class Checkpoints:
    """The checkpoints of one piece of work in a folder; a `tppo.models.keeper.Keeper`.

    name, unit: what messages call the work, and a step of it.  resumed: called with a checkpoint
    that is gone on from.
    Work of seconds writes none unless a signal asks it to stop.
    """

    def __init__(
        self,
        root: Path,
        name: str,
        unit: str = "step",
        resumed: Callable[[Checkpoint], object] = lambda found: None,
    ):
        self.root, self.name, self.unit, self.resumed = root, name, unit, resumed
        self.written, self.took_s = time.monotonic(), 0.0

    def newest(self, steps: int) -> Checkpoint | None:
        """The newest whole checkpoint, if there is one, of work of so many steps.

        Errors: DataError where it is not of this work.
        """
        found = load_latest(self.root)
        if found is None:
            return None
        if found.step > steps:
            raise found.refused(f"it is of {self.unit} {found.step}, expected one of {steps}")
        others = [f"{name} {was} (here {now})" for name, now in _made_with().items()
                  if (was := found.versions.get(name)) != now]  # fmt: skip
        say(f"{self.name}: resumes after {self.unit} {found.step} of {steps}" + (
            f", which was written with {', '.join(others)}: what follows may differ from what "
            "would have followed there" if others else ""))  # fmt: skip
        self.resumed(found)
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
    """Write `root/step-N`, whole or not at all; of the others the newest before it stays.

    One of a later step is damaged, or this work would have begun behind it; it would be taken for
    the newest.

    Raises DiskFull, with what is needed and how to go on, where there is no space for it.
    """
    work, final = root / f"step-{step}.tmp", root / f"step-{step}"
    for left in root.glob("step-*.tmp"):  # by a process that was killed while it wrote
        delete(left)
    work.mkdir(parents=True)
    before = [path for number, path in _complete(root) if number < step]
    goes_on = f"goes on after {before[-1].name.replace('-', ' ')}" if before else "begins anew"
    remedy = f"Make room and run the same command again: it {goes_on}."
    nbytes = _nbytes(weights, optimizer)
    try:
        with space_for(work, f"the checkpoint of step {step}", remedy, nbytes):
            _write(work, step, weights, optimizer, state)
            delete(final)
            os.rename(work, final)
    except BaseException:
        with suppress(OSError):  # why it could not be written is what is to be said
            delete(work)
        raise
    sync_directory(root)
    write_text(root / LATEST, final.name)
    for _, other in _complete(root):
        if other not in (final, *before[-1:]):
            delete(other)


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
    write_text(work / COMPLETE, summed({
        "step": step, "of": work_of(work.parent), "files": entries, "versions": _made_with(),
    }))  # fmt: skip
    sync_directory(work)


def _made_with() -> dict[str, str]:
    """What the last bits of a step depend on besides its work: sums of other threads are others."""
    return versions() | {"CPU threads": str(torch.get_num_threads())}


def _nbytes(*values: Any) -> int:
    """About how many bytes the tensors in these take on the disk."""
    leaves = tree_leaves(values)
    return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))


def load_latest(root: Path) -> Checkpoint | None:
    """The newest complete checkpoint; a damaged one is skipped with a warning.

    Errors: DataError where it is whole and not of the work in this folder.
    """
    found = _complete(root)
    for step, path in reversed(found):
        damage = _damage(path, step)
        if damage is None:
            return _load(path, step)
        say(f"{path}: passed over, {damage}")
    if found:
        say(f"WARNING: {root}: no checkpoint is whole; the stage begins anew")
    return None


def _complete(root: Path) -> list[tuple[int, Path]]:
    """The renamed checkpoints by step."""
    found = ((re.fullmatch(r"step-(0|[1-9][0-9]*)", path.name), path) for path in root.glob("s*"))
    return sorted((int(match[1]), path) for match, path in found if match)


def work_of(root: Path) -> str:
    """What a checkpoint in this folder is of: a hash of the folder's place in those of its stage
    and of its parts, and of the manifests there, which say what each is made of.
    """
    found: list[Any] = []
    folder = root
    for place in (root, *root.parents):
        if place.name == KEPT and (identity := identity_of(place.parent / MANIFEST)) is not None:
            found.append(identity)
            folder = place
    found.append(root.relative_to(folder).as_posix())
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def _load(path: Path, step: int) -> Checkpoint:
    """Errors: DataError for one of other work, and for files that hold what is never written."""
    complete = read_object(path / COMPLETE) or {}
    written = complete.get("versions")
    by = written if isinstance(written, dict) else {}
    if SUM not in complete:
        raise _refused(path, by, f"an earlier version wrote it, whose {COMPLETE} has no checksum "
                       "of itself")  # fmt: skip
    if complete.get("of") != work_of(path.parent):
        raise _refused(path, by, "it is not of this work: it was written for other data, settings "
                       "or another part, or by a version that did not say for which"
                       )  # fmt: skip
    try:
        found = Checkpoint(
            step=step,
            weights={file.stem: load_file(file) for file in path.glob("*.safetensors")},
            optimizer=torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True),
            state=json.loads((path / "state.json").read_text(encoding="utf-8")),
            path=path,
            versions=by,
        )
        if not isinstance(found.optimizer, dict) or not isinstance(found.state, dict):
            raise ValueError("no entries by name in optimizer.pt or state.json")
        found.state.update({file.stem: read_rows(file) for file in path.glob("*.jsonl")})
    except (OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # each library has types of its own
        reason = str(error).strip().partition("\n")[0]
        raise _refused(path, by, f"it holds what tppo never writes: {reason}") from None
    return found


def _refused(path: Path, written: Mapping[str, str], why: str) -> DataError:
    """The error of a checkpoint that is whole, and that the work there cannot go on from."""
    name = "tppo-kernels"
    return DataError(
        f"{path}: this checkpoint cannot be gone on from: {why}. It was written by {name} "
        f"{written.get(name, 'of an unknown version')}, this is {versions()[name]}: go on with the "
        f"version that wrote it, begin anew in another folder, or delete {path.parent} and begin "
        "anew here"
    )


def _as_written(file: Path, found: dict[str, Any]) -> bool:
    """Whether a file of `summed` has not changed since, by what is read from it."""
    return file.read_bytes() == summed({k: v for k, v in found.items() if k != SUM}).encode()


def _damage(path: Path, step: int) -> str | None:
    """What is wrong with a checkpoint, None if nothing is."""
    complete = read_object(path / COMPLETE) or {}
    entries = complete.get("files")
    if not isinstance(entries, dict):
        return f"no readable {COMPLETE}"
    if complete.keys() - ENTRIES or SUM in complete and not _as_written(path / COMPLETE, complete):
        return f"{COMPLETE} has changed"
    if complete.get("step") != step:
        return f"{COMPLETE} says that it is of step {short(complete.get('step'))}"
    for name in sorted({*entries, "state.json", "optimizer.pt", *os.listdir(path)} - {COMPLETE}):
        entry, file = entries.get(name), path / name
        if not isinstance(entry, dict) or not {"nbytes", "sha256"} <= entry.keys():
            return f"{COMPLETE} does not say what {name} is"
        if not file.is_file() or file.stat().st_size != entry["nbytes"]:
            return f"{name} is missing or cut"
        if sha256(file) != entry["sha256"]:
            return f"{name} has changed"
    return None
