"""A stage of several trainings, of which each stands when it is done, whatever becomes of the next.

A part lies whole in `checkpoints` of the stage's folder; until then it has checkpoints of its own.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tppo import stopping
from tppo.progress import say
from tppo.store.hashes import MANIFEST
from tppo.store.run_folder import KEPT, RunFolder


class Parts:
    """The parts of the stage that works in the folder `out`."""

    def __init__(self, stage: str, out: Path, settings: Any, seed: int):
        self.stage, self.out, self.settings, self.seed = stage, out, settings, seed
        self.root = out / KEPT
        self.root.mkdir(exist_ok=True)
        self.folder = RunFolder(self.root)

    def done(self, name: str) -> bool:
        """Whether a part is whole; one with a file that has changed since is made again."""
        return self.folder.done(name, [], self.settings, self.seed)

    @contextmanager
    def part(self, name: str) -> Iterator[Path]:
        """A folder to make a part in, which has its name when the block succeeds; a signal that the
        block has deferred is answered behind that.
        """
        say(f"{self.stage}: {name}")
        with stopping.deferrable(), self.folder.stage(
            name, [], self.settings, self.seed, resume=True
        ) as work:
            yield work

    def copy(self, name: str) -> None:
        """A whole part into the result."""
        shutil.copytree(self.root / name, self.out / name,
                        ignore=shutil.ignore_patterns(MANIFEST))  # fmt: skip
