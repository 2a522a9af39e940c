"""One folder a run, one folder a stage in it: a stage is there whole, with its manifest, or not."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tppo.jsonl import DataError, plain, sync_directory, write_json, write_jsonl
from tppo.progress import say, status

__all__ = ["RunFolder", "write_json", "write_jsonl"]

MANIFEST = "manifest.json"
_HIDDEN = "(not written)"
_ABSENT = object()
_SECRET_WORDS = {"key", "apikey", "token", "secret", "password", "credential", "authorization"}


class RunFolder:
    """The folder of one run: `root/<stage>/`, each with the manifest of how it came about."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def path(self, name: str) -> Path:
        """Where a finished stage lies."""
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

        On failure it is removed and an earlier result stays as it was. With `resume` it is kept
        instead, and given back to a later call with equal inputs, config and seed, so that a stage
        can go on from checkpoints that it left there.
        """
        final, work = self.path(name), self.root / f"{name}.tmp"
        identity = self._identity(inputs, config, seed)
        self.root.mkdir(parents=True, exist_ok=True)
        with _lock(work):
            _clear(work, keep=resume and _read(work) == identity)
            write_json(work / MANIFEST, identity)
            start = time.monotonic()
            try:
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

    def done(
        self,
        name: str,
        inputs: Sequence[str | os.PathLike[str]] = (),
        config: Any = None,
        seed: int = 0,
    ) -> bool:
        """Whether the stage finished with these inputs, config and seed; if others, says which."""
        changes = self.changes(name, inputs, config, seed)
        if changes and (self.path(name) / MANIFEST).exists():
            say(f"{name}: runs again, because {'; '.join(changes)}")
        return not changes

    def changes(
        self,
        name: str,
        inputs: Sequence[str | os.PathLike[str]] = (),
        config: Any = None,
        seed: int = 0,
    ) -> list[str]:
        """What keeps the finished stage from standing for this call; empty if nothing does."""
        folder = self.path(name)
        manifest = _read(folder)
        if manifest is None or "outputs" not in manifest:
            return [f"{folder} holds no finished stage"]
        for relative, size in manifest["outputs"].items():
            file = folder / relative
            if not file.is_file() or file.stat().st_size != size["nbytes"]:
                return [f"{file} is not the file that the stage wrote"]
        identity = self._identity(inputs, config, seed)
        changes = _input_changes(manifest["inputs"], identity["inputs"])
        changes += _changes("config", manifest["config"], identity["config"])
        return changes + _changes("seed", manifest["seed"], identity["seed"])

    def _identity(
        self, inputs: Sequence[str | os.PathLike[str]], config: Any, seed: int
    ) -> dict[str, Any]:
        """All that a stage's result depends on."""
        entries = [
            {"path": os.path.relpath(path, self.root), "sha256": sha256(Path(path))}
            for path in inputs
        ]
        return {"inputs": entries, "config": _without_secrets(plain(config)), "seed": seed}


def sha256(path: Path) -> str:
    """The hash of a file, or of all files of a folder and their names but its manifest."""
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(f for f in path.rglob("*") if f.is_file() and f != path / MANIFEST):
            digest.update(f"{file.relative_to(path).as_posix()}\0{sha256(file)}\n".encode())
        return digest.hexdigest()
    with open(path, "rb") as content, status(f"hashing {path.name}"):
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """The versions that a result may depend on."""
    found = {"python": platform.python_version()}
    for name in ("tppo-kernels", "torch", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


@contextmanager
def _lock(work: Path) -> Iterator[None]:
    """Hold the temporary folder alone; the system lets go of it when the process dies."""
    while True:
        work.mkdir(exist_ok=True)
        descriptor = os.open(work, os.O_RDONLY)
        try:
            _take(descriptor, work)
            # Between open and lock another process may have renamed the folder away.
            if work.exists() and os.path.samestat(os.fstat(descriptor), work.stat()):
                yield
                return
        finally:
            os.close(descriptor)


def _take(descriptor: int, work: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RuntimeError(f"{work}: another process is running this stage") from None


def _clear(work: Path, *, keep: bool) -> None:
    for entry in () if keep else list(work.iterdir()):
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


def _outputs(work: Path) -> dict[str, dict[str, Any]]:
    files = sorted(f for f in work.rglob("*") if f.is_file() and f != work / MANIFEST)
    return {
        f.relative_to(work).as_posix(): {"nbytes": f.stat().st_size, "sha256": sha256(f)}
        for f in files
    }


def _sync_tree(work: Path) -> None:
    for path in [*work.rglob("*"), work]:
        if path.is_file() or path.is_dir():
            sync_directory(path)


def _replace(work: Path, final: Path) -> None:
    """Rename, after moving an earlier result aside: no folder is renamed over a full one."""
    old = final.with_name(f"{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
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


def _changes(name: str, was: Any, now: Any) -> list[str]:
    if isinstance(was, dict) and isinstance(now, dict):
        return [
            change
            for key in sorted(was.keys() | now.keys())
            for change in _changes(f"{name}.{key}", was.get(key, _ABSENT), now.get(key, _ABSENT))
        ]
    return [] if was == now else [f"{name} was {_shown(was)}, is {_shown(now)}"]


def _shown(value: Any) -> str:
    return "absent" if value is _ABSENT else repr(value)


def _input_changes(was: list[dict[str, str]], now: list[dict[str, str]]) -> list[str]:
    if len(was) != len(now):
        return [f"it had {len(was)} inputs, has {len(now)}"]
    return [
        f"input {new['path']} changed"
        for old, new in zip(was, now, strict=True)
        if old["sha256"] != new["sha256"]
    ]
