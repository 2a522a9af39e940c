"""Which files of a run folder a stage opens, and which of them it does not declare."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tppo.stages.registry import REGISTRY

BESIDE = {"run.yaml", "result.json", "label-cache.jsonl", "label-lost.jsonl", ".hashes.json",
          ".lock"}  # fmt: skip
_recording: list[tuple[str, set[str]]] = []


def _note(event: str, arguments: tuple) -> None:
    if not _recording or event != "open" or arguments[2] & os.O_ACCMODE == os.O_WRONLY:
        return
    if isinstance(arguments[0], str | bytes | os.PathLike):
        path = os.path.abspath(os.fsdecode(arguments[0]))
        for root, found in _recording:
            if path.startswith(root + os.sep):
                found.add(os.path.relpath(path, root))


sys.addaudithook(_note)  # Python has no way to remove one


@contextmanager
def opened(root: Path) -> Iterator[set[str]]:
    """The files below `root` that Python reads inside the block, by their paths there."""
    entry = (os.path.abspath(root), set[str]())
    _recording.append(entry)
    try:
        yield entry[1]
    finally:
        _recording.remove(entry)


def undeclared(stage: str, files: set[str]) -> set[str]:
    """Those of the files that are no declared input of a stage, none of its own, and not beside the
    stages.  The manifests of the inputs' stages say that the inputs are whole.
    """
    inputs = REGISTRY[stage].inputs
    manifests = {f"{artifact.stage}/manifest.json" for artifact in inputs}
    below = (f"{stage}/", f"{stage}.tmp/", f"{stage}.old/",
             *(f"{artifact.path}/" for artifact in inputs))  # fmt: skip
    return {f for f in files if not f"{f}/".startswith(below) and f not in BESIDE | manifests}
