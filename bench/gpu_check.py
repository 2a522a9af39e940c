"""`make gpu-check`: everything that wants a GPU, in one command, in less than ten minutes.

In place, without network, with the Python that runs it. Parts, in the order in which they count:
machine, build (for this GPU alone), first-touch (small checks of what no CPU shows), goals (the
rows that the goals speak of), tests (tests/gpu), kernels (instructions by ncu), benchmarks (the
rest), learning (the demo small, on the fastest backends and on the reference), sanitizer. Each has
a budget, and what the parts before it have left; each is processes of its own, so that one which
fails, hangs, or loses its CUDA context costs the others nothing.

After every part --out holds results.json, report.md, report.svg, log.txt and journal.jsonl, where
every single row stands as soon as it is measured; bench/results/<gpu>.* are copies. --resume goes
on with what an earlier run in --out left. --wheels takes what `make gpu-wheels` fetched elsewhere.

Exit status: 0 where every part that was asked for is well; 1 where one failed; 3 where none did,
but one ran out of time, or one that is required was skipped. A goal that is missed is a finding of
the report, not a failure.

--smoke goes through the same parts on a CPU at tiny sizes, all but the sanitizer.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _goals
import _parts
import gpu_wheels
import report
from _groups import end_group, release, watched
from _journal import CONTEXT_LOST, Journal, Record, replace_text, results_of
from _parts import PARTS, Spec

ROOT = Path(__file__).parent.parent
TOTAL_S = {False: 560, True: 178}  # by --smoke
RESTARTS = 20
LOG_CHARACTERS = 200_000  # of one command, in the joint log
SEVERITY = ("ok", "skipped", "timed out", "failed")


class Interrupted(BaseException):
    """The run was asked to end: what it has is written."""


class Refused(Exception):
    """What was asked for cannot be done, and why."""


@dataclass
class Part:
    """What became of one part. state: one of `SEVERITY`, the worst that happened."""

    name: str
    required: bool = True
    end: float = 0.0  # on the monotonic clock
    state: str = "ok"
    said: list[str] = field(default_factory=list)

    def _mark(self, state: str, why: str) -> None:
        self.state = max(self.state, state, key=SEVERITY.index)
        self.said.append(why)

    def fail(self, why: str) -> None:
        """Marks the part failed, and why."""
        self._mark("failed", why)

    def time_out(self, why: str) -> None:
        """Marks that its time was up, and where."""
        self._mark("timed out", why)

    def skip(self, why: str) -> None:
        """Marks the part skipped, and why."""
        self._mark("skipped", why)


@dataclass(frozen=True)
class Ended:
    """How a command ended; the status is None where its time was up."""

    status: int | None
    said: str
    pid: int = 0


class Check:
    """One run: its clock, its journal, and the folder of what it leaves."""

    def __init__(self, out: Path, *, smoke: bool = False, seconds: float | None = None,
                 copies: Path | None = None):
        self.out, self.smoke, self.copies = out, smoke, copies
        out.mkdir(parents=True, exist_ok=True)
        self.journal = Journal(out / "journal.jsonl")
        self.work = Path(tempfile.mkdtemp(prefix="gpu-check-"))
        weakref.finalize(self, shutil.rmtree, self.work, ignore_errors=True)
        self.places: tuple[Path, ...] = ()  # of unpacked wheels: for all, for the step alone
        self.total_s = seconds or TOTAL_S[smoke]
        self.end = time.monotonic() + self.total_s
        self.code = code_state()
        self.interrupted = False
        self._running: set[int] = set()
        self._lock = threading.Lock()

    def results(self) -> dict[str, Any]:
        """What is known so far."""
        return results_of(self.journal.records())

    def environment(self, apart: bool) -> dict[str, str]:
        """Of a command: this tree, the wheels, and what was there."""
        places = self.places if apart else self.places[:1]
        path = [ROOT, ROOT / "python", *reversed(places), os.environ.get("PYTHONPATH", "")]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(str(p) for p in path if str(p)),
               "PYTHONUNBUFFERED": "1"}
        if self.smoke:
            env |= {"TPPO_GPU_SMOKE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        return env

    def command(self, part: Part, *argv: object, share: float = 1.0, apart: bool = False,
                **env: str) -> Ended:
        """Runs a command in a process group of its own, for a share of the part's time at most.

        Before the end it is interrupted, upon which pytest writes what it has, then killed; nothing
        that it started lives on, nor where this process itself is killed.
        """
        left = share * (part.end - time.monotonic())
        if left <= 0:
            return Ended(None, "no time was left")
        grace = min(5.0, left / 5)
        said = self.work / f"{part.name}-{time.monotonic_ns()}.txt"
        with said.open("wb") as file:
            command, descriptors = watched([str(a) for a in argv])
            process = subprocess.Popen(
                command, cwd=ROOT, env={**self.environment(apart), **env},
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True, pass_fds=descriptors)
        with self._lock:
            self._running.add(process.pid)
        status = self._wait(process, left - grace, grace)
        text = said.read_text(errors="replace")
        if status is None:
            text += f"\nstopped after {left:.0f} s"
        with self._lock, (self.out / "log.txt").open("a") as log:
            self._running.discard(process.pid)
            release(process.pid)
            log.write(f"\n== {part.name}: {' '.join(map(str, argv))}\n{text[-LOG_CHARACTERS:]}\n")
        return Ended(status, text, process.pid)

    def _wait(self, process: subprocess.Popen, seconds: float, grace: float) -> int | None:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            end_group(process.pid, signal.SIGINT)
            try:
                process.wait(grace)
            except subprocess.TimeoutExpired:
                pass
            return None
        finally:
            end_group(process.pid, signal.SIGKILL)
            process.wait()

    def worker(self, part: Part, *argv: object, **options: Any) -> Ended:
        """A command that writes to the journal what it tries: where it dies it is started again,
        and goes on behind what it died of."""
        for _ in range(RESTARTS):
            ended = self.command(part, *argv, **options)
            tried = self.journal.unfinished(ended.pid)
            if ended.status is None and tried:
                return Ended(None, f"{ended.said}\nin {tried['unit']} {tried['who']}", ended.pid)
            died = ended.status == CONTEXT_LOST or (ended.status is not None and ended.status < 0)
            if not died or tried is None or self.interrupted:
                return ended
            why = self._why(ended, tried)
            if not tried["who"]:
                self.journal.add("unit", part=part.name, unit=tried["unit"], state="failed",
                                 said=why)
                part.fail(f"{tried['unit']}: {why}")
            else:
                part.said.append(f"{tried['unit']}, without {tried['who']}: {why}")
        return ended

    def _why(self, ended: Ended, tried: Record) -> str:
        """Why a process died, which the journal then knows."""
        if ended.status == CONTEXT_LOST:
            known = [r for r in self.journal.of("broken", unit=tried["unit"]) if
                     r["pid"] == ended.pid]
            return known[-1]["why"] if known else "it left the CUDA context unusable"
        number = -(ended.status or 0)
        why = ("no answer came" if number == signal.SIGALRM
               else f"it ended the process by {signal.Signals(number).name}")
        self.journal.add("broken", unit=tried["unit"], who=tried["who"], why=why)
        return why

    def run(self, specs: list[Spec]) -> list[Part]:
        """The parts in turn; what one raises is its failure, and the next still runs."""
        done = []
        for i, spec in enumerate(specs):
            later = sum(self.budget(s) for s in specs[i + 1:])
            part = Part(spec.name, spec.required, self.end - later)
            done.append(part)
            print(f"== {spec.name}, {max(0.0, part.end - time.monotonic()):.0f} s at most",
                  flush=True)
            self.one(spec, part)
            if spec.work is _parts.machine and not self.has_device():
                break
        return done

    def has_device(self) -> bool:
        """Whether the machine is known, and is what was asked for and what the journal is of."""
        found = self.journal.of("machine")
        if found and found[-1]["gpu"] != found[0]["gpu"]:
            replace_text(self.journal.path, "".join(
                f"{json.dumps(r)}\n" for r in self.journal.records()
                if r["kind"] != "machine" or r["gpu"] == found[0]["gpu"]))
            raise Refused(f"--resume: the results in {self.out} are of {found[0]['gpu'] or 'a CPU'}"
                          f", this is {found[-1]['gpu'] or 'a CPU'}: name another --out")
        return bool(found) and (self.smoke or found[-1]["gpu"] is not None)

    def one(self, spec: Spec, part: Part) -> None:
        """One part; its record, all results and the report are on disk when this returns."""
        start = time.monotonic()
        try:
            spec.work(self, part)
        except Interrupted:
            part.time_out("the run was interrupted")
            raise
        except Exception as error:  # whatever it is, the other parts are worth their time
            part.fail(f"{type(error).__name__}: {error}")
        finally:
            self.end_all()
            seconds = round(time.monotonic() - start, 1)
            self.journal.add("part", name=part.name, state=part.state, seconds=seconds,
                             said=part.said, required=part.required, code=self.code)
            try:
                self.write()
            except Exception as error:  # the journal has everything; a report can be made later
                part.fail(f"the report: {type(error).__name__}: {error}")
            print(f"   {part.state}, {seconds:.0f} s: {'; '.join(part.said)}", flush=True)

    def end_all(self) -> None:
        """Ends every process that runs."""
        for pid in list(self._running):
            end_group(pid, signal.SIGKILL)

    def interrupt(self, *_: object) -> None:
        """A handler of signals: the run ends as soon as it has written what it has."""
        self.interrupted = True
        self.end_all()
        raise Interrupted

    def budget(self, spec: Spec) -> float:
        """The seconds that are kept for a part, in proportion where the whole is not the usual."""
        usual = spec.smoke_s if self.smoke else spec.budget_s
        return usual * self.total_s / TOTAL_S[self.smoke]

    def write(self) -> None:
        """results.json and the report, from the journal."""
        found = self.results()
        if "machine" not in found:
            return
        found["goals"] = _goals.judge(found, "cuda" if found["machine"]["gpu"] else "cpu")
        found["options"] = {"smoke": self.smoke, "seconds": self.total_s}
        replace_text(self.out / "results.json", json.dumps(found, indent=1) + "\n")
        report.write(self.out / "results.json", "report")
        if self.copies and found["machine"]["gpu"]:
            self.copies.mkdir(parents=True, exist_ok=True)
            name = found["machine"]["gpu"].lower().replace(" ", "-")
            replace_text(self.copies / f"{name}.json", json.dumps(found, indent=1) + "\n")
            report.write(self.copies / f"{name}.json")


def code_state() -> str:
    """A short name of what the sources say, so that results of two states are told apart."""
    digest = hashlib.sha256()
    for pattern in ("tppo_kernels/**/*.py", "csrc/*", "python/tppo/**/*.py", "bench/*.py"):
        for path in sorted(ROOT.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:10]


def begin_anew(journal: Journal) -> None:
    """Puts an earlier journal aside: measured once on a machine that is lent, it is not lost."""
    if journal.path.exists():
        aside = journal.path.with_name(f"earlier-{time.strftime('%Y%m%dT%H%M%S')}.jsonl")
        journal.path.rename(aside)
        journal.path.with_name("log.txt").unlink(missing_ok=True)
        print(f"an earlier run's journal is {aside} now; --resume would have gone on with it")


def take_up(journal: Journal) -> set[str]:
    """The parts that an earlier run ended well. What failed there is forgotten, to be tried again:
    what a peer did to a process is not."""
    records = journal.records()

    def stays(r: Record) -> bool:
        failed = (r["kind"] == "unit" and r["state"] == "failed"
                  or r["kind"] == "row" and r["median_us"] is None and r["implementation"] == "op"
                  or r["kind"] == "broken" and not r["who"])
        return not failed and r["kind"] != "trying"

    replace_text(journal.path, "".join(f"{json.dumps(r)}\n" for r in records if stays(r)))
    parts = {r["name"]: r["state"] for r in records if r["kind"] == "part"}
    return {name for name, state in parts.items() if state == "ok"}


def chosen(only: list[str] | None, done: set[str]) -> list[Spec]:
    """The parts to run: the machine always, it is what results belong to."""
    return [s for s in PARTS if s.work is _parts.machine
            or (s.name in only if only else s.name not in done)]


def exit_status(parts: list[Part]) -> int:
    """0, 1 or 3: see the head of this file."""
    if any(p.state == "failed" for p in parts):
        return 1
    return 3 if any(p.state == "timed out" or (p.state == "skipped" and p.required)
                    for p in parts) else 0


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    head, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=head, epilog=rest,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="on a CPU, at tiny sizes")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gpu-check",
                        help="folder of results, report, log and journal (runs/gpu-check)")
    parser.add_argument("--wheels", type=Path, help="folder that `make gpu-wheels` filled")
    parser.add_argument("--only", nargs="+", metavar="PART", choices=[s.name for s in PARTS],
                        help=f"these parts alone: {', '.join(s.name for s in PARTS)}")
    parser.add_argument("--resume", action="store_true",
                        help="go on with the results in --out: parts that ended well, and rows "
                        "that are measured, are not done again")
    parser.add_argument("--seconds", type=float,
                        help=f"for the whole (default {TOTAL_S[False]}, with --smoke "
                        f"{TOTAL_S[True]}); budgets keep their proportions")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Runs the parts that are asked for."""
    options = options_of(arguments)
    check = Check(options.out.resolve(), smoke=options.smoke, seconds=options.seconds,
                  copies=None if options.smoke else ROOT / "bench/results")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, check.interrupt)
    try:
        if options.wheels:
            check.places = gpu_wheels.unpack(options.wheels.resolve(), check.work / "wheels")
        done = take_up(check.journal) if options.resume else set()
        if not options.resume:
            begin_anew(check.journal)
        parts = check.run(chosen(options.only, done))
    except (FileNotFoundError, Refused) as error:
        print(f"gpu-check: {error}")
        return 2
    except Interrupted:
        print(f"interrupted; --resume --out {options.out} goes on from here")
        return 1
    if not check.has_device():
        print("gpu-check: torch sees no GPU here, or the machine's part failed (see "
              f"{check.out / 'log.txt'}); --smoke tries the parts on a CPU")
        return 1
    print(f"written: {', '.join(str(p) for p in sorted(check.out.iterdir()))}")
    for part in parts:
        print(f"{part.state:9s} {part.name}")
    return exit_status(parts)


if __name__ == "__main__":
    sys.exit(main())
