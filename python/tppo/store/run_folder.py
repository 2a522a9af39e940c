"""One folder per run, in it one per stage: a stage is there whole, with its manifest, or not."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from tppo.errors import DataError, short
from tppo.progress import say
from tppo.store.disk import delete, space_for
from tppo.store.folder_lock import FolderLock
from tppo.store.hashes import MANIFEST, Hashes, sha256
from tppo.store.jsonl import plain, read_object, sync_directory, write_json, write_jsonl

__all__ = ["RunFolder", "differences", "write_json", "write_jsonl"]

KEPT = "checkpoints"  # of a stage that can resume: not of its result, deleted when that is there
_HIDDEN = "(not written)"
_ABSENT = object()
_SECRET_WORDS = {"key", "apikey", "token", "secret", "password", "credential", "authorization"}


class RunFolder:
    """The folder of one run: `root/<stage>/`, each with the manifest of how it came about."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        self.hashes = Hashes(self.root / ".hashes.json")
        self._lock = FolderLock(self.root)

    def lock(self) -> AbstractContextManager[None]:
        """Keep other processes from changing the folder; raises RuntimeError where one does."""
        return self._lock.held()

    def path(self, name: str) -> Path:
        """The folder of a finished stage."""
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
            raise ValueError(
                f"stage name was {name!r}, expected lower-case letters, digits, - and _"
            )
        return self.root / name

    @contextmanager
    def stage(
        self,
        name: str,
        inputs: Sequence[str | os.PathLike[str]] = (),
        config: Any = None,
        seed: int = 0,
        *,
        resume: bool = False,
    ) -> Iterator[Path]:
        """Give a temporary folder to write into; it becomes `root/name` when the block succeeds.

        On failure it is removed and an earlier result stays as it was. With `resume` the part of it
        named `checkpoints` is kept instead, and given back to a later call with equal inputs,
        config and seed, so that a stage can go on from there. It is no part of the result, and is
        deleted only after the result has its name.
        """
        final, work = self.path(name), self.root / f"{name}.tmp"
        with self.lock():
            identity = self._identity(inputs, config, seed)
            work.mkdir(exist_ok=True)
            _clear(work, keep=resume and _resumes(name, work, identity))
            write_json(work / MANIFEST, identity)
            start = time.monotonic()
            try:
                with space_for(work, f"stage {name}", "Make room and run the same command again."):
                    yield work
                    manifest = {
                        **identity,
                        "seconds": round(time.monotonic() - start, 3),
                        "versions": versions(),
                        "outputs": _outputs(work),
                    }
                    write_json(work / MANIFEST, manifest)
                    _sync_tree(work)
                    _replace(work, final)
            except BaseException:
                if not resume:
                    shutil.rmtree(work, ignore_errors=True)
                raise
            shutil.rmtree(final / KEPT, ignore_errors=True)

    def done(
        self,
        name: str,
        inputs: Sequence[str | os.PathLike[str]] = (),
        config: Any = None,
        seed: int = 0,
    ) -> bool:
        """Whether the stage finished with these inputs, config and seed; prints what differs."""
        changes = self.changes(name, inputs, config, seed)
        if changes and (self.path(name) / MANIFEST).exists():
            say(f"{name}: runs again, because {'; '.join(changes)}")
        if not changes:  # what a kill between the stage's rename and this deletion left behind
            shutil.rmtree(self.path(name) / KEPT, ignore_errors=True)
        return not changes

    def changes(
        self,
        name: str,
        inputs: Sequence[str | os.PathLike[str]] = (),
        config: Any = None,
        seed: int = 0,
    ) -> list[str]:
        """Why the finished stage cannot be used for this call; empty if it can."""
        folder = self.path(name)
        if not (folder / MANIFEST).exists():
            return [f"{folder} holds no finished stage"]
        manifest = self.manifest(name)
        if manifest is None:
            return [f"{folder / MANIFEST} is damaged"]
        for relative in manifest["outputs"]:
            if self._is_other(folder, relative, manifest):
                return [f"{folder / relative} is not the file that the stage wrote"]
        return _identity_changes(manifest, self._identity(inputs, config, seed))

    def manifest(self, name: str) -> dict[str, Any] | None:
        """What a finished stage was made of; None where there is none, or a damaged manifest."""
        found = read_object(self.path(name) / MANIFEST)
        if found is None or not _is_identity(found) or not isinstance(found.get("outputs"), dict):
            return None
        entries = found["outputs"].values()
        return found if all(_is_record(e, nbytes=int, sha256=str) for e in entries) else None

    def verify(self, path: Path) -> None:
        """Raise DataError where a file or folder of a stage is not what the stage wrote there."""
        stage, *rest = path.relative_to(self.root).parts
        folder, manifest = self.path(stage), self.manifest(stage)
        if manifest is None:
            raise DataError(f"{folder / MANIFEST}: absent or damaged, run stage {stage} again")
        files = {"/".join(rest)} if path.is_file() else _files(folder, path)
        prefix = "/".join([*rest, ""])
        files |= {name for name in manifest["outputs"] if path.is_dir() and name.startswith(prefix)}
        for relative in sorted(files):
            if self._is_other(folder, relative, manifest):
                raise DataError(
                    f"{folder / relative}: not the file that stage {stage} wrote, by size or by "
                    f"SHA-256; run stage {stage} again, or restore it"
                )

    def _is_other(self, folder: Path, relative: str, manifest: dict[str, Any]) -> bool:
        """Whether a file is not the one that the manifest describes."""
        file, entry = folder / relative, manifest["outputs"].get(relative)
        return (
            entry is None
            or not file.is_file()
            or file.stat().st_size != entry["nbytes"]
            or self.hashes.of(file) != entry["sha256"]
        )

    def _identity(
        self, inputs: Sequence[str | os.PathLike[str]], config: Any, seed: int
    ) -> dict[str, Any]:
        """All that a stage's result depends on."""
        entries = [
            {"path": os.path.relpath(path, self.root), "sha256": self.hashes.of(Path(path))}
            for path in inputs
        ]
        return {"inputs": entries, "config": _without_secrets(plain(config)), "seed": seed}


def versions() -> dict[str, str]:
    """The versions that a result may depend on."""
    found = {"python": platform.python_version()}
    for name in ("tppo-kernels", "torch", "transformers", "icu4py"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _resumes(name: str, work: Path, identity: dict[str, Any]) -> bool:
    """Whether what a process left in the folder belongs to the same work; prints if it does not."""
    if not (work / KEPT).is_dir():
        return False
    was = read_object(work / MANIFEST) or {}
    changes = [f"{work / MANIFEST} is damaged"]
    if _is_identity(was):
        changes = _identity_changes(was, identity)
    if changes:
        say(f"{name}: starts anew and deletes its checkpoints, because {'; '.join(changes)}")
    return not changes


def _clear(work: Path, *, keep: bool) -> None:
    for entry in list(work.iterdir()):
        if keep and entry.name in (KEPT, MANIFEST):  # the manifest says whose checkpoints they are
            continue
        delete(entry)


def identity_of(path: Path) -> dict[str, Any] | None:
    """What the work of a manifest depends on, wherever its inputs lie; None without a manifest."""
    found = read_object(path)
    if found is None or not _is_identity(found):
        return None
    inputs = [entry["sha256"] for entry in found["inputs"]]
    return {"inputs": inputs, "config": found["config"], "seed": found["seed"]}


def _is_identity(found: dict[str, Any]) -> bool:
    inputs = found.get("inputs")
    return (
        isinstance(inputs, list)
        and all(_is_record(entry, path=str, sha256=str) for entry in inputs)
        and {"config", "seed"} <= found.keys()
    )


def _is_record(value: Any, **kinds: type) -> bool:
    """Whether a value is a JSON object that has these entries."""
    return isinstance(value, dict) and all(type(value.get(k)) is kinds[k] for k in kinds)


def _files(folder: Path, path: Path) -> set[str]:
    """The files below `path` by their names in `folder`; the manifest and checkpoints are none."""
    found = (f.relative_to(folder) for f in path.rglob("*") if f.is_file())
    return {f.as_posix() for f in found if f.parts[0] not in (MANIFEST, KEPT)}


def _outputs(work: Path) -> dict[str, dict[str, Any]]:
    return {
        name: {"nbytes": (work / name).stat().st_size, "sha256": sha256(work / name)}
        for name in sorted(_files(work, work))
    }


def _sync_tree(work: Path) -> None:
    kept = work / KEPT  # each checkpoint was synced when it was written
    for path in [*work.rglob("*"), work]:
        if (path.is_file() or path.is_dir()) and kept not in path.parents:
            sync_directory(path)


def _replace(work: Path, final: Path) -> None:
    """Rename, after moving an earlier result aside: no folder is renamed over a full one."""
    old = final.with_name(f"{final.name}.old")
    delete(old)
    if final.exists() or final.is_symlink():
        os.rename(final, old)
    os.rename(work, final)
    sync_directory(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _without_secrets(value: Any) -> Any:
    """The config without values whose key names a secret; `..._env` names only a variable."""
    if isinstance(value, dict):
        return {
            key: _HIDDEN if isinstance(item, str) and _is_secret(key) else _without_secrets(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_without_secrets(item) for item in value]
    return re.sub(r"//[^/@\s]+@", f"//{_HIDDEN}@", value) if isinstance(value, str) else value


def _is_secret(key: str) -> bool:
    words = re.split(r"[^a-z]+", key.lower())
    return words[-1] != "env" and not _SECRET_WORDS.isdisjoint(words)


def _identity_changes(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    changes = _input_changes(was["inputs"], now["inputs"])
    changes += differences("config", was["config"], now["config"])
    return changes + differences("seed", was["seed"], now["seed"])


def differences(name: str, was: Any, now: Any) -> list[str]:
    """Where two values differ, key by key: `name.key was 1, is 2`."""
    if isinstance(was, dict) and isinstance(now, dict):
        return [
            change
            for key in sorted(was.keys() | now.keys())
            for change in differences(f"{name}.{key}", was.get(key, _ABSENT), now.get(key, _ABSENT))
        ]
    return [] if was == now else [f"{name} was {_shown(was)}, is {_shown(now)}"]


def _shown(value: Any) -> str:
    return "absent" if value is _ABSENT else short(value, 200)


def _input_changes(was: list[dict[str, str]], now: list[dict[str, str]]) -> list[str]:
    if len(was) != len(now):
        return [f"it had {len(was)} inputs, has {len(now)}"]
    return [
        f"input {new['path']} changed"
        for old, new in zip(was, now, strict=True)
        if old["sha256"] != new["sha256"]
    ]
