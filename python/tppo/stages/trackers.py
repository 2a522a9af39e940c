"""Trackers that follow a training live: `--report-to tensorboard,wandb,trackio`.

Each is a package of its own (extras of the same names), asked for by its usual name and set up by
its usual environment variables: WANDB_MODE, WANDB_PROJECT, TRACKIO_DIR and the like. A stage that
trains is a run of its own; TensorBoard's files lie in `tensorboard/` of the run folder. Figures
have the names of metrics.jsonl, those without a slash with their stage before them: `sft/loss`.

`trackers.json` beside the stages says what each run was told, so that a training that was killed
goes on in the same run behind the last row, and none stands there twice.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from tppo.errors import DataError
from tppo.progress import say_once
from tppo.stages.journal import Journal
from tppo.store.jsonl import plain, read_object, write_json

PROJECT = "tppo"
STATE = "trackers.json"


class Tracker(Protocol):
    """One run of one tracker."""

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Take the figures of a step."""

    def close(self) -> None:
        """Write out what is not written yet."""


class TensorBoard:
    """Event files in `tensorboard/` of the run folder."""

    def __init__(self, folder: Path, name: str, config: Any) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard" / name))

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Scalars, on the disk at once: a kill loses none that `trackers.json` counts."""
        for key, value in figures.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def close(self) -> None:
        """Close the file."""
        self.writer.close()


class Wandb:
    """A run of Weights & Biases; its local files lie in `wandb/` of the run folder."""

    def __init__(self, folder: Path, name: str, config: Any) -> None:
        import wandb

        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT), name=name, dir=str(folder),
                id=os.environ.get("WANDB_RUN_ID", _id(folder, name)), resume="allow", config=config,
            )  # fmt: skip
        except wandb.errors.Error as error:
            raise RuntimeError(f"--report-to wandb: {error}; WANDB_MODE=offline needs no "
                               "account") from None  # fmt: skip

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Figures at their step."""
        self.run.log(figures, step=step)

    def close(self) -> None:
        """Upload or write what is left."""
        self.run.finish()


class Trackio:
    """A run of Trackio, in its local data base unless its environment says otherwise."""

    def __init__(self, folder: Path, name: str, config: Any) -> None:
        import trackio

        self.trackio = trackio
        with redirect_stdout(sys.stderr):  # stdout is for results
            trackio.init(project=os.environ.get("TRACKIO_PROJECT", PROJECT),
                         name=_id(folder, name), config=config, resume="allow")  # fmt: skip

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Figures at their step."""
        self.trackio.log(figures, step=step)

    def close(self) -> None:
        """Write what is left."""
        with redirect_stdout(sys.stderr):
            self.trackio.finish()


KINDS: dict[str, Callable[[Path, str, Any], Tracker]] = {
    "tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio,
}


def _id(folder: Path, name: str) -> str:
    """A name that no training of another folder has."""
    from hashlib import sha256

    return f"{name}-{sha256(str(folder.resolve()).encode()).hexdigest()[:8]}"


def trackers_named(names: str) -> list[str]:
    """The trackers that `--report-to` asks for, "none" for no one.

    Errors: DataError for a name that there is not.
    """
    found = [name.strip() for name in names.split(",") if name.strip()]
    if found == ["none"]:
        return []
    for name in found:
        if name not in KINDS:
            raise DataError(f"--report-to was {names!r}, expected none, or some of "
                            f"{', '.join(KINDS)} with commas between them")  # fmt: skip
    return list(dict.fromkeys(found))


def need_trackers(names: str) -> str:
    """The names, as they were given.

    Errors: DataError where a package is not installed, naming the way to get it.
    """
    for name in trackers_named(names):
        if find_spec(name) is None:
            raise DataError(f"--report-to {name}: {name} is not installed "
                            f"(pip install 'tppo-kernels[{name}]')")  # fmt: skip
    return names


class Followed(Journal):
    """A journal whose new rows go to trackers too."""

    def __init__(self, out: Path, folder: Path, names: str, config: Any) -> None:
        super().__init__(out)
        self.folder, self.config = folder, config
        self.stage = out.name.removesuffix(".tmp")  # with its round
        self.names = trackers_named(names)
        self.trackers: dict[str, Tracker] = {}
        self.state = (read_object(folder / STATE) or {}) if self.names else {}
        self.resumed = False

    def resume(self, rows: Sequence[Mapping[str, Any]], samples: Sequence[Any] = ()) -> None:
        """The rows that the trackers have, but for those of a process that died in between."""
        self.resumed = True
        self.write(rows, samples)

    def write(self, rows: Sequence[Mapping[str, Any]], samples: Sequence[Any] = ()) -> None:
        """All rows and samples so far; each tracker gets the rows that it has not been told."""
        super().write(rows, samples)
        for kind in self.names:
            known = self.state.setdefault(self.stage, {}).setdefault(kind, {"run": 0, "rows": 0})
            if kind not in self.trackers:
                if not self.resumed:  # from its beginning, in a run of its own
                    known.update(run=known["run"] + 1, rows=0)
                name = f"{self.folder.resolve().name}-{self.stage}-{known['run']}"
                self.trackers[kind] = KINDS[kind](self.folder, name, plain(self.config))
            for i in range(known["rows"], len(rows)):
                self._tell(kind, i, rows[i])
            known["rows"] = max(known["rows"], len(rows))
        if self.names:
            write_json(self.folder / STATE, self.state)

    def _tell(self, kind: str, i: int, row: Mapping[str, Any]) -> None:
        step = row.get("step", row.get("epoch", i + 1))
        figures = {name if "/" in name else f"{self.stage}/{name}": float(value)
                   for name, value in row.items()
                   if isinstance(value, int | float) and math.isfinite(value)}  # fmt: skip
        try:
            self.trackers[kind].log(step, figures)
        except OSError as error:  # such as a full disk: the training is worth more than its copy
            say_once(f"WARNING: {kind} could not be told: {error}")

    def close(self) -> None:
        """Every tracker writes what is left."""
        for tracker in self.trackers.values():
            tracker.close()


@contextmanager
def followed(names: str, out: Path, folder: Path, config: Any = None) -> Iterator[Followed]:
    """The journal of a stage in `out` of a run folder, and the trackers for as long as the block
    takes, however it ends.

    names: as `--report-to` has them.  config: settings that the trackers show.
    """
    journal = Followed(out, folder, names, config)
    try:
        yield journal
    finally:
        journal.close()
