"""One function a kind of fault: it disturbs one work of a machine, and says what became of it.

A kill is survived where the same command then ends in the same files; any other fault also where
the command refuses in one sentence, without a traceback, and ends in the same files when the cause
is gone.  What an endpoint was paid for, or a person has said, and a command has kept is never asked
again; what a person was told is kept is.
"""

import errno
import functools
import json
import os
import re
import shutil
import signal
import time
from typing import NamedTuple

import endpoint
import injected
from machine import HANG
from works import WORKS, answers_of

from tppo.store.jsonl import read_object

IN_FLIGHT = 4  # questions of the works that ask: what a kill may cost
HARMS = ("truncated", "flipped", "missing", "foreign")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GOOD = ("identical", "refused, then identical", "refused, named", "told, setting by setting",
        "skipped, told, replayed", "halved, told, the same figures")  # fmt: skip


class Case(NamedTuple):
    """A fault, and what became of it."""

    kind: str  # kill at a call, random kill, disk full, ...
    work: str
    what: str  # the place
    outcome: str  # one of GOOD, or what went wrong

    @property
    def good(self):
        """Whether nothing was lost."""
        return self.outcome in GOOD


def case(kind):
    """A function `(machine, work, *what) -> (place, outcome)` as one that gives a `Case`; its run
    folder is deleted behind it.
    """

    def of(function):
        @functools.wraps(function)
        def found(machine, name, *what):
            folder = machine.copy(name)
            try:
                return Case(kind, name, *function(machine, name, folder, *what))
            finally:
                shutil.rmtree(folder, ignore_errors=True)

        found.kind = kind
        return found

    return of


def again(machine, name, folder):
    """The same command once more; what it was paid for before is not asked again."""
    work = WORKS[name]
    if not work.asks:
        return machine.again(name, folder)
    before, paid = machine.asked(folder), set(endpoint.kept(folder / work.asks))
    person = machine.people.get(folder.name)
    told = set(person.kept) if person else set()
    outcome = machine.again(name, folder)
    later = machine.asked(folder)[len(before) :]
    earlier = set(endpoint.kept(machine.done(work.after).folder / work.asks))
    if twice := (paid & set(later)) | (earlier & set(before)):
        return f"{len(twice)} answers that were kept are asked again"
    if len(lost := set(before) - paid) > (1 if person else IN_FLIGHT):
        return f"{len(lost)} questions were answered and not kept"
    if lost := told - paid:
        return f"{len(lost)} answers were acknowledged and not kept"
    return outcome


def judged(machine, name, folder, ended):
    """A disturbed command that ended by itself, and what the next one makes of it."""
    if ended.code == 0 and "Traceback" not in ended.said:
        outcome = machine.same(name, folder)
        return outcome if outcome == "identical" else f"{outcome}, and no word"
    if not ended.refused:
        return f"no sentence: {ended.said[-300:]}"
    outcome = again(machine, name, folder)
    return "refused, then identical" if outcome == "identical" else outcome


def met(machine, name, folder, when, act):
    """The command, which is met at a moment; whether it was, and how it ended."""
    mark = machine.new("mark")
    hook = functools.partial(injected.marked, mark, act)
    ended = machine.run(machine.command(name, folder), functools.partial(
        injected.at_moment, folder, WORKS[name].begins, when, hook))  # fmt: skip
    return mark.exists(), ended


def killed(machine, name, folder, ended):
    """What the next command makes of one that should have been killed."""
    if ended.code != -signal.SIGKILL and ended.code != -signal.SIGXFSZ:
        return f"was not killed: {ended.said[-300:]}"
    return again(machine, name, folder)


@case("kill at a call")
def kill_at_call(machine, name, folder, when):
    """SIGKILL before a call that changes files."""
    kill = functools.partial(injected.signal_me, signal.SIGKILL)
    ended = met(machine, name, folder, when, kill)[1]
    place = f"call {when} of {machine.done(name).moments}"
    return place, killed(machine, name, folder, ended)


@case("kill in a write")
def kill_in_write(machine, name, folder, nbytes):
    """Killed by the system while it writes a file that grows beyond so many bytes."""
    ended = machine.run(machine.command(name, folder),
                        functools.partial(injected.killed_in_write, nbytes))  # fmt: skip
    return f"byte {nbytes} of a file", killed(machine, name, folder, ended)


def begun(machine, name, folder, process):
    """Wait until its work has begun: its folder is there, or the lock is its own."""
    begins, end = WORKS[name].begins.strip("/"), time.monotonic() + HANG

    def has_begun():
        if begins:
            return (folder / begins).exists()
        return (read_object(folder / ".lock") or {}).get("pid") == process.pid

    while not has_begun() and process.is_alive() and time.monotonic() < end:
        time.sleep(0.002)


@case("kill at random")
def kill_at_random(machine, name, folder, share):
    """Between the beginning of its work and its end, which on a busy machine comes later."""
    process, log = machine.start(machine.command(name, folder))
    begun(machine, name, folder, process)
    process.join(share * machine.done(name).seconds)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    machine.ended(process, log)
    return f"{share:.2f} of its time", again(machine, name, folder)


@case("disk full at a call")
def disk_full(machine, name, folder, when):
    """One call finds no space."""
    return f"call {when}", failed(machine, name, folder, when, errno.ENOSPC)


@case("read-only at a call")
def read_only_at_call(machine, name, folder, when):
    """One call finds a read-only file system."""
    return f"call {when}", failed(machine, name, folder, when, errno.EROFS)


def failed(machine, name, folder, when, code):
    """What becomes of a command of which one call fails."""
    was_met, ended = met(machine, name, folder, when, functools.partial(injected.fail, code))
    return judged(machine, name, folder, ended) if was_met else "the moment did not come"


@case("small disk")
def small_disk(machine, name, folder, share, inodes=False):
    """A disk of its own that holds a share of what the work leaves on it; then there is room."""
    files = [path for path in machine.done(name).contents]
    need = sum(-(-(machine.done(name).folder / f).stat().st_size // 4096) * 4096 for f in files)
    free, few = (int(share * need), 0) if not inodes else (1 << 24, max(1, int(share * len(files))))
    ended = machine.run(machine.command(name, folder),
                        functools.partial(injected.small_disk, folder, free, few))  # fmt: skip
    place = f"{few} more files" if inodes else f"{free} bytes more"
    if ended.code == 0:
        return place, "there was room"
    if "No space left" not in ended.said:
        return place, f"no sentence that says so: {ended.said[-300:]}"
    return place, judged(machine, name, folder, ended)


@case("read-only folder")
def read_only_folder(machine, name, folder):
    """The run folder is mounted read-only; then it is not."""
    ended = machine.run(machine.command(name, folder),
                        functools.partial(injected.read_only, folder))  # fmt: skip
    if ended.code == 0 or str(folder) not in ended.said or "--out" not in ended.said:
        return "all of it", f"no sentence with folder and remedy: {ended.said[-300:]}"
    return "all of it", judged(machine, name, folder, ended)


@case("files of 4 kB at most")
def small_files(machine, name, folder):
    """A quota that no file may go beyond."""
    ended = machine.run(machine.command(name, folder), injected.small_files)
    return "every file", judged(machine, name, folder, ended)


@case("signal")
def signal_at_call(machine, name, folder, number, when):
    """A signal: the work ends in order, and goes on."""
    act = functools.partial(injected.signal_me, number)
    was_met, ended = met(machine, name, folder, when, act)
    place = f"{signal.Signals(number).name} at call {when}"
    if not was_met:
        return place, "the moment did not come"
    if ended.code != 0 and (ended.code != 128 + number or "stopped by" not in ended.said):
        return place, f"not stopped by it: {ended.code} {ended.said[-300:]}"
    return place, judged(machine, name, folder, ended)


@case("clock backwards")
def clock_backwards(machine, name, folder):
    """Every reading of the clock is before the one before it."""
    ended = machine.run(machine.command(name, folder), injected.clock_backwards)
    return "all the time", judged(machine, name, folder, ended)


@case("two processes")
def two_processes(machine, name, folder):
    """The second is refused in a sentence, and the first is not disturbed."""
    command = machine.command(name, folder)
    first, log = machine.start(command)
    begun(machine, name, folder, first)
    if not first.is_alive():
        return "", f"the first: {log.read_text()[-300:]}"
    os.kill(first.pid, signal.SIGSTOP)
    second = machine.run(command)
    os.kill(first.pid, signal.SIGCONT)
    ended = machine.ended(first, log)
    if not (second.refused and "works in this run folder" in second.said):
        return "", f"the second: {second.said[-300:]}"
    return "", judged(machine, name, folder, ended)


# --- files that are harmed ---


def harm(path, how):
    """Harm a file."""
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        middle, content = len(content) // 2, content or b"\0"
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 0x04]) + content[middle + 1 :])
    else:
        path.write_bytes(b'{"of": "another program"}\n')


@case("harmed file")
def harmed_file(machine, name, folder, file, how):
    """A file of a finished stage, which the work behind it reads or leaves alone."""
    path, place = folder / file, f"{file} {how}"
    harm(path, how)
    ended = machine.run(machine.command(name, folder))
    if ended.code == 0:
        return place, judged(machine, name, folder, ended)
    if ended.refused and str(folder / file.split("/")[0]) in ended.said:
        return place, "refused, named"
    return place, f"no sentence that names it: {ended.said[-300:]}"


@case("harmed settings")
def harmed_settings(machine, name, folder, how):
    """The settings of the run, which a stage alone starts from."""
    harm(folder / "run.yaml", how)
    ended = machine.run(machine.command(name, folder))
    place = f"run.yaml {how}"
    if ended.code == 0:
        # Without the file the flags are those by default, as for any command without one.
        told = re.search("which would now be others|their defaults are taken", ended.said)
        outcome = machine.same(name, folder)
        return place, "told, setting by setting" if told else outcome
    if ended.refused and "run.yaml" in ended.said:
        return place, "refused, named"
    return place, f"no sentence that names it: {ended.said[-300:]}"


def unfinished(machine, name, folder, share):
    """The folder as a kill at a share of the moments leaves it."""
    met(machine, name, folder, max(1, int(machine.done(name).moments * share)),
        functools.partial(injected.signal_me, signal.SIGKILL))  # fmt: skip


@case("harmed checkpoint")
def harmed_checkpoint(machine, name, folder, share, file, how):
    """A file of the newest checkpoint of a work that was killed."""
    unfinished(machine, name, folder, share)
    found = [path for path in folder.rglob(f"step-*/{file}") if path.parent.suffix != ".tmp"]
    if not found:
        return f"{file} {how}", "there was none"
    newest = max(found, key=lambda path: path.parent.stat().st_mtime_ns)
    harm(newest, how)
    return f"{file} {how}", again(machine, name, folder)


@case("harmed part")
def harmed_part(machine, name, folder, share, part, file, how):
    """A file of a part that is whole, of a work that was killed in a later one."""
    unfinished(machine, name, folder, share)
    found = [*folder.glob(f"**/*.tmp/checkpoints/{part}/{file}")]
    if not found:
        return f"{part}/{file} {how}", "there was none"
    harm(found[0], how)
    return f"{part}/{file} {how}", again(machine, name, folder)


@case("harmed cache")
def harmed_cache(machine, name, folder, how):
    """What an endpoint was paid for: the lines that are whole are not asked again."""
    cache, finished = folder / WORKS[name].asks, machine.done(name).folder
    shutil.copy(finished / WORKS[name].asks, cache)
    harm(cache, how)
    return f"{cache.name} {how}", again(machine, name, folder)


@case("rest of a batch")
def rest_of_batch(machine, name, folder, when):
    """The import is killed; the next export asks for what is not kept, and for nothing else, and
    the answers to that alone give all.
    """
    kill = functools.partial(injected.signal_me, signal.SIGKILL)
    met(machine, name, folder, when, kill)
    requests = folder / "batch.jsonl"
    every = _requested(requests)
    paid = set(endpoint.kept(folder / WORKS[name].makes[0]))
    place = f"call {when}: {len(paid)} of {len(every)} kept"
    ended = machine.run(machine.command("export a batch", folder))
    if ended.code:
        return place, f"no export: {ended.said[-300:]}"
    if _requested(requests) != every - paid:
        return place, f"asked again: {len(_requested(requests) & paid)}"
    (folder / "answers.jsonl").write_text(answers_of(requests))
    return place, machine.again(name, folder)


def _requested(path):
    return {json.loads(line)["custom_id"] for line in path.read_text().splitlines()}


@case("harmed answers")
def harmed_answers(machine, name, folder, how):
    """The file that a batch API gives back, which comes whole when it is fetched again."""
    path, place = folder / "answers.jsonl", f"answers.jsonl {how}"
    harm(path, how)
    ended = machine.run(machine.command(name, folder))
    if ended.code == 0 or str(path) not in ended.said:
        return place, f"no sentence that names it: {ended.said[-300:]}"
    path.write_text(answers_of(folder / "batch.jsonl"))
    return place, judged(machine, name, folder, ended)


def pieces(machine, name):
    """One file of each kind that a work leaves, by name and suffix."""
    kinds = {}
    for file in machine.done(name).contents:
        kinds.setdefault(file.rsplit("/", 1)[-1], file)
    return list(kinds.values())


@case("endpoint restarted")
def endpoint_restarted(machine, name, folder, patient):
    """It is killed while it is asked, and started again: before the command gives up, or behind."""
    asks = folder / WORKS[name].asks
    before = len(endpoint.kept(asks))
    server = endpoint.Server(machine.new("endpoint"), pause_s=0.02)
    machine.servers[folder.name] = server
    try:
        command = machine.command(name, folder)
        section = "eval" if "eval" in name else "label"
        command += [] if patient else [f"--{section}.endpoint.max-retries", "0"]
        process, log = machine.start(command)
        end = time.monotonic() + HANG
        while len(endpoint.kept(asks)) < before + 5 and time.monotonic() < end:
            time.sleep(0.01)
        server.kill()
        if patient:
            time.sleep(1.0)
            server.start()
        ended = machine.ended(process, log)
        if not patient:
            server.start()
            if ended.code == 0:
                return "until it gives up", "it did not give up"
        place = "while it tries again" if patient else "until it gives up"
        return place, judged(machine, name, folder, ended) if not patient else (
            paid_once(machine, name, folder, ended))  # fmt: skip
    finally:
        server.stop()


def paid_once(machine, name, folder, ended):
    """Of a command that did not give up: the same files, and nothing kept was asked again."""
    asked = machine.server_of(folder).asked(folder)
    if (extra := len(asked) - len(set(asked))) > IN_FLIGHT:
        return f"{extra} questions were asked again"
    return judged(machine, name, folder, ended)


def left_at(machine, name, pattern):
    """A share of the moments of a work at which a kill leaves files of a pattern, and their names;
    none where it leaves none.
    """
    for share in (0.75, 0.6, 0.45, 0.3, 0.9):
        folder = machine.copy(name)
        try:
            unfinished(machine, name, folder, share)
            found = {path.name for path in folder.rglob(pattern) if path.parent.suffix != ".tmp"}
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if found:
            return share, sorted(found)
    return 0.0, []
