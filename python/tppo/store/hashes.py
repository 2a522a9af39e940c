"""SHA-256 of files and folders; that of a large file is computed once for as long as it stays."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tppo.errors import DataError
from tppo.progress import status
from tppo.store.jsonl import read_object, write_json

MANIFEST = "manifest.json"  # of a stage's folder: when and where a result was made is not in it
LARGE = 1 << 20  # bytes from which on a hash is remembered: a smaller file is read in no time
SETTLED_S = 1.0  # a file written to more recently may change again within its time stamp's grain


class Hashes:
    """Hashes that are remembered in a file by size, times and inode of what was read.

    A file that is written to gets another time stamp, and one that is put in its place another
    inode: both are read again.  Damage by the disk itself, which changes neither, is not noticed.
    """

    def __init__(self, store: Path) -> None:
        self.store = store
        self._known: dict[str, Any] | None = None

    def of(self, path: Path) -> str:
        """The hash of a file, or of all files of a folder and their names but its manifest.

        A folder of a hub's cache (models--owner--name/snapshots/COMMIT) has its commit, which
        stands for all that is in it: what is fetched later for another program changes nothing.
        """
        if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
            return path.name
        return sha256(path, self._of_file)

    def _of_file(self, path: Path) -> str:
        before = os.stat(path)
        if before.st_size < LARGE:
            return _read(path)
        if self._known is None:
            self._known = read_object(self.store) or {}
        key, mark = str(path.absolute()), _mark(before)
        known = self._known.get(key)
        if isinstance(known, list) and known[:-1] == mark and isinstance(known[-1], str):
            return known[-1]
        found = _read(path)
        if _mark(os.stat(path)) == mark and time.time() - before.st_mtime > SETTLED_S:
            self._known[key] = [*mark, found]
            try:
                write_json(self.store, self._known)
            except OSError:  # a folder that cannot be written to: the next process reads again
                pass
        return found


def sha256(path: Path, of_file: Callable[[Path], str] | None = None) -> str:
    """The hash of a file, or of all files of a folder and their names but its manifest."""
    of_file = of_file or _read
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if not path.is_dir():
        return of_file(path)
    digest = hashlib.sha256()
    for file in sorted(f for f in path.rglob("*") if f.is_file() and f != path / MANIFEST):
        digest.update(f"{file.relative_to(path).as_posix()}\0{of_file(file)}\n".encode())
    return digest.hexdigest()


def _read(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as content, status(f"hashing {path.name}"):
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _mark(found: os.stat_result) -> list[int]:
    """What differs if the content does; the time of change shows that a time stamp was reset."""
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
