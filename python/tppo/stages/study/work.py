"""Trains the cells of a study in processes of one thread each, and keeps every outcome at once.

`outcomes.jsonl` in the study's folder holds a line an outcome, each on the disk before the next
is waited for: a study that was killed goes on behind the last of them.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tppo.environment import load_libraries
from tppo.errors import DataError
from tppo.progress import Bar, say, status
from tppo.settings import from_dict
from tppo.stages.study.config import Cell, StudyConfig
from tppo.stopping import Stopped
from tppo.store.jsonl import (
    SUM,
    append_line,
    is_as_written,
    plain,
    sync_directory,
    whole_lines,
)

if TYPE_CHECKING:
    from tppo.stages.study.material import Material

OUTCOMES = "outcomes.jsonl"
LOG = "workers.log"


class Outcome(NamedTuple):
    """What became of a cell."""

    cell: Cell
    found: dict[str, Any]
    """As `arms.train_arm` gives it."""


class Place(NamedTuple):
    """What a process has to know besides its job."""

    study: StudyConfig
    folder: Path
    model: Path | None


class Job(NamedTuple):
    """A piece of work for a process; `key` names what it makes, `needs` what it needs before."""

    kind: str  # "material", "reward model", "arm"
    key: str
    needs: str | None
    cell: Cell


def read_outcomes(folder: Path, mark: str) -> list[Outcome]:
    """The outcomes that were found with these settings, in the order in which they came.

    A last line that a kill has cut is taken off the file.
    Errors: DataError naming the line that is not an outcome.
    """
    path = folder / OUTCOMES
    if not path.exists():
        return []
    lines, cut = whole_lines(path)
    if cut:
        say(f"{path}: the last line was cut, and is left out: that arm is trained again")
    found, others = [], 0
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not is_as_written(line):
                raise ValueError("it has changed since it was written; without the line its arm is "
                                 "trained again")  # fmt: skip
            row.pop(SUM, None)
            cell = from_dict(Cell, row.pop("cell"), f"{path}: line {number}: cell")
            same = row.pop("mark") == mark
        except (ValueError, KeyError, AttributeError) as error:
            raise DataError(f"{path}: line {number}: not an outcome ({error})") from None
        others += not same
        if same:
            found.append(Outcome(cell, row))
    if others:
        say(f"{path}: {others} outcomes were found with other settings, and are left out")
    return found


def _keep(folder: Path, mark: str, outcome: Outcome) -> None:
    row = {"cell": plain(outcome.cell), "mark": mark, **plain(outcome.found)}
    new = not (folder / OUTCOMES).exists()
    append_line(folder / OUTCOMES, row)
    if new:
        sync_directory(folder)


def versions() -> dict[str, str]:
    """Of what the figures may depend on."""
    names = ("tppo-kernels", "torch", "transformers", "tokenizers", "numpy")
    return {"python": sys.version.split()[0]} | {n: importlib.metadata.version(n) for n in names}


def train_all(
    study: StudyConfig,
    folder: Path,
    workers: int,
    each: Callable[[list[Outcome]], None] = lambda outcomes: None,
    model: Path | None = None,
) -> list[Outcome]:
    """Train every cell that has no outcome yet; all outcomes of the study.

    each: called with all outcomes so far behind each new one.
    model: what arms begin with, where it is not a model from scratch.
    Errors: RuntimeError naming the cell whose training failed, and the log of the processes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = study.cells()
    outcomes = [o for o in read_outcomes(folder, study.mark) if o.cell in set(wanted)]
    done = {outcome.cell for outcome in outcomes}
    left = [cell for cell in wanted if cell not in done]
    if done:
        say(f"study: {len(done)} of {len(wanted)} arms were trained before")
    total = sum(cell.cost for cell in wanted)
    with status("study", total) as bar:
        bar.resume(sum(cell.cost for cell in done))
        if left:
            bar.note(f"{len(left)} arms are left")
        try:
            for outcome in _outcomes(Place(study, folder, model), left, workers):
                _keep(folder, study.mark, outcome)
                outcomes.append(outcome)
                _tell(bar, outcome, len(outcomes), len(wanted))
                each(outcomes)
        except Stopped as stop:
            lost = f"the arms under way are lost, {len(outcomes)} of {len(wanted)} are kept"
            raise Stopped(stop.signum, lost) from None
    return outcomes


def _tell(bar: Bar, outcome: Outcome, done: int, wanted: int) -> None:
    cell, curve = outcome.cell, outcome.found["curve"]
    what = "its reward model"
    if curve:
        relevant = curve[-1]["relevant"]
        what = f"relevance {relevant.count('1') / len(relevant):.2f}"
    bar.note(f"{done} of {wanted} arms; seed {cell.seed}, {cell.arm.name}, {cell.answers} labelled "
             f"answers: {what}")  # fmt: skip
    bar.advance(cell.cost)


def _jobs(study: StudyConfig, cells: Sequence[Cell]) -> list[Job]:
    """What the cells need, in order, each piece of work once."""
    found: dict[str, Job] = {}
    for cell in cells:
        shared = f"{cell.queries}/{study.material_of(cell.seed)}"
        reward = f"{shared}/{cell.seed}/{cell.reward_model}"
        own = json.dumps(plain(cell), sort_keys=True)
        for job in (
            Job("material", shared, None, cell),
            Job("reward model", reward, shared, cell),
            Job("arm", own, reward, cell),
        ):
            found.setdefault(job.key, job)
    return list(found.values())


def _outcomes(place: Place, cells: Sequence[Cell], workers: int) -> Iterator[Outcome]:
    """The outcomes of cells as they come; of several jobs that can begin the first does."""
    waiting, made, folder = _jobs(place.study, cells), set[str](), place.folder
    if not waiting:
        return
    pool = ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=_prepare, initargs=(folder / LOG,)
    )
    running: dict[Future[dict[str, Any] | None], Job] = {}
    try:
        while waiting or running:
            ready = [job for job in waiting if job.needs is None or job.needs in made]
            for job in ready[: workers - len(running)]:
                waiting.remove(job)
                running[pool.submit(perform, job, place)] = job
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                job = running.pop(future)
                found = _result(future, job, folder)
                made.add(job.key)
                if found is not None:
                    yield Outcome(job.cell, found)
    finally:
        processes = list((getattr(pool, "_processes", None) or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)  # which forgets its processes
        for process in processes:
            process.kill()  # files are whole or absent, and who started us may ignore SIGTERM


def _result(
    future: Future[dict[str, Any] | None], job: Job, folder: Path
) -> dict[str, Any] | None:
    cell = job.cell
    what = f"{job.kind} of {cell.arm.name}, {cell.answers} labelled answers, seed {cell.seed}"
    try:
        return future.result()
    except BrokenProcessPool:
        raise RuntimeError(
            f"a process was ended from outside during: {what}; was there too little memory? "
            f"Its last lines are in {folder / LOG}"
        ) from None
    except (ValueError, OSError, RuntimeError) as error:
        raise RuntimeError(f"{what}: {error} (log: {folder / LOG})") from error


def _prepare(log: Path) -> None:
    """A process of one thread that writes its progress to the log, and ends with its parent."""
    load_libraries(threads=1)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@functools.lru_cache(maxsize=1)  # the next job is mostly of the same seed
def _material(place: Place, queries: int, seed: int) -> Material:
    from tppo.stages.study.material import Material

    return Material(place.folder, place.study, queries, seed, place.model)


def perform(job: Job, place: Place) -> dict[str, Any] | None:
    """Do a job; the outcome where it is an arm."""
    from tppo.stages.study.arms import train_arm
    from tppo.stages.study.reward_models import make_reward_model

    shared = _material(place, job.cell.queries, job.cell.seed)
    material = shared.for_arm(job.cell.arm)
    if job.kind == "material":
        shared.make()
    elif job.kind == "reward model":
        make_reward_model(material, job.cell)
    else:
        return train_arm(material, job.cell)
    return None
