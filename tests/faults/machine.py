"""A tiny run that nothing disturbed, and processes that are disturbed in copies of its folder.

A process of a command is forked from one that has imported everything.  Every work that looks at
the clock for its checkpoints writes one after each step here, so that there is something to harm.
"""

import collections
import functools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import endpoint
from person import Person
from works import BY_HAND, SETTINGS, WORKS, filled

HANG = 600  # seconds, against a hang only
TIMED = ("manifest.json", "report.json", "result.json", "study.json", "outcomes.jsonl")
# How long it took; hash and checksum of what says so; and, of a run of several stages, those
# of their inputs.
UNEQUAL = ("seconds", "report.json", "result.json", "sum")


class Ended(NamedTuple):
    """A process that has ended: its exit status, and what it said."""

    code: int
    said: str

    @property
    def refused(self):
        """It ended by itself, with a sentence and without a traceback."""
        return self.code > 0 and "Traceback" not in self.said and bool(self.said.strip())


class Finished(NamedTuple):
    """A work that nothing disturbed."""

    folder: Path  # the run folder as it left it
    moments: int  # at which it may be met
    seconds: float
    contents: dict


def often():
    """In a child: a checkpoint after every step."""
    from tppo.store import checkpoint

    checkpoint.EVERY_S = checkpoint.LAST_S = 0.0
    checkpoint.WRITING = float("inf")


def child(log, arguments, prepare):
    """`tppo` with these arguments in a process of its own.

    prepare: called before; what it returns is called behind the command, however that ends.
    """
    code, done = 99, None
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        import torch

        torch.set_num_threads(1)
        from tppo.cli import main

        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        often()
        done = prepare() if prepare else None
        main(arguments)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
        os.write(descriptor, f"{ended.code}\n".encode() if code != ended.code else b"")
    except BaseException:
        os.write(descriptor, traceback.format_exc().encode())
    finally:
        if done:
            done()
        os._exit(code)


def without_word_of_semaphores():
    """Python's own process that clears up says nothing of what those left that were killed."""
    sys.warnoptions.append("ignore:resource_tracker")


class Machine:
    """Every work of `WORKS` once undisturbed, when it is first asked for, in a folder of its own.

    Threads may share one.
    """

    def __init__(self, place):
        self.place, self.known, self.number = Path(place), {}, 0
        self.servers = {}  # of run folders that have one of their own
        self.people = collections.defaultdict(Person)  # who label by hand, by run folder
        self.lock, self.counting = threading.RLock(), threading.Lock()
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([
            "tppo.cli", "tppo.commands", "tppo.stages.ppo", "tppo.stages.evaluate", "yaml",
            "tppo.stages.label", "tppo.stages.ser", "tppo.stages.pit", "tppo.stages.baselines",
            "tppo.stages.heat", "tppo.stages.guides", "tppo.stages.own_reward", "openai", "peft",
            "tppo.stages.prefer", "tppo.stages.hand.teacher",
        ])  # fmt: skip
        (self.place / "tiny.yaml").write_text(json.dumps(SETTINGS))

    @functools.cached_property
    def server(self):
        """The endpoint that is asked; a process of its own."""
        return endpoint.Server(self.place / "endpoint")

    def server_of(self, folder):
        """That which a run folder asks: its own, where it has one."""
        return self.servers.get(folder.name) or self.server

    def asked(self, folder):
        """What was asked from a run folder, in order: of its endpoint, or of who labels by hand."""
        if folder.name in self.people:
            return [*self.people[folder.name].sent]
        return self.server_of(folder).asked(folder)

    def close(self):
        """End the endpoint's process."""
        if "server" in vars(self):
            self.server.stop()

    def new(self, name):
        """A path that is not used yet."""
        with self.counting:
            self.number += 1
            return self.place / f"{name}-{self.number}"

    def done(self, name):
        """A work as it is where nothing disturbs it, and those before it."""
        with self.lock:
            if name not in self.known:
                self.known[name] = self._undisturbed(name)
            return self.known[name]

    def _undisturbed(self, name):
        from injected import count_moments

        work, counted = WORKS[name], self.new("count")
        folder = self.copy(name)
        start = time.monotonic()
        count = functools.partial(count_moments, folder, work.begins, counted)
        ended = self.run(self.command(name, folder), count)
        assert ended.code == 0, f"{name}: {ended.said}"
        seconds = time.monotonic() - start
        return Finished(folder, int(counted.read_text()), seconds, contents(folder, work.makes))

    def command(self, name, folder):
        """The command line of a work in a run folder."""
        url = f"{self.server_of(folder).url}/{folder.name}/v1" if WORKS[name].asks else ""
        return filled(WORKS[name].command, place=self.place, folder=folder, url=url)

    def start(self, command, prepare=None):
        """A process under way, and the file of what it says."""
        log = self.new("said")
        process = self.context.Process(target=child, args=(log, command, prepare))
        process.start()
        if BY_HAND in command:
            self.people[Path(command[command.index("--out") + 1]).name].sit_down(process, log)
        return process, log

    def ended(self, process, log):
        """Wait for it."""
        process.join(HANG)
        if process.is_alive():
            process.kill()
            process.join()
            return Ended(99, "Traceback: it hung")
        said = log.read_text(errors="replace") if log.exists() else ""  # killed as it began
        return Ended(process.exitcode, said)

    def run(self, command, prepare=None):
        """A process from its start to its end."""
        return self.ended(*self.start(command, prepare))

    def copy(self, name):
        """The run folder as it was before a work."""
        folder, work = self.new("run"), WORKS[name]
        if work.after is not None:
            shutil.copytree(self.done(work.after).folder, folder)
        if work.given is not None:
            work.given(self.place, folder)
        return folder

    def same(self, name, folder):
        """Whether a folder holds what the undisturbed one does; else what differs."""
        expected, found = self.done(name).contents, contents(folder, WORKS[name].makes)
        names = [key for key in sorted(found.keys() | expected.keys())
                 if found.get(key) != expected.get(key)]  # fmt: skip
        return "identical" if not names else f"other files: {names[:3]}"

    def again(self, name, folder):
        """The same command, undisturbed, in the folder that a fault has left: is all there?"""
        ended = self.run(self.command(name, folder))
        if ended.code:
            return f"not finished: {ended.said[-300:]}"
        return self.same(name, folder)


def contents(folder, names):
    """The files of some folders, and files; of what says so, all but how long it took."""
    found = {}
    several = len(names) > 1
    for name in names:
        start = folder / name
        paths = sorted(start.rglob("*")) if start.is_dir() else [start]
        # Checkpoints that could not be deleted are no part of a result.
        for path in (p for p in paths if p.is_file() and "checkpoints" not in p.parts):
            content = path.read_bytes()
            if path.name.endswith("-cache.jsonl"):  # a line that a kill has cut is one of its own
                content = sorted(endpoint.kept(path, whole=True))
            elif path.name in TIMED:
                lines = content.splitlines() if path.suffix == ".jsonl" else [content]
                content = [untimed(json.loads(line), several) for line in lines]
            elif path.name == "report.html":  # its title is the folder's name
                content = content.replace(folder.name.encode(), b"RUN")
            found[path.relative_to(folder).as_posix()] = content
    return found


def untimed(found, several=False):
    """A document without how long it took."""
    if isinstance(found, list):
        return [untimed(value, several) for value in found]
    if not isinstance(found, dict):
        return found
    left = (*UNEQUAL, "inputs") if several else UNEQUAL
    return {key: untimed(value, several) for key, value in found.items() if not key.endswith(left)}
