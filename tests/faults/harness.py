"""Faults put into a tiny run: kills at system calls and at random moments, disks that are full or
read-only, signals, harmed files, two processes, a clock that goes backwards.  Nothing may be lost,
and nothing may be silently wrong.

    python tests/faults/harness.py --kills 200

A process of a stage is forked from one that has imported everything.  A moment is what its main
thread does to files of the run folder once its stage has begun: opens for writing, renames, fsyncs,
deletions.  A kill is survived where the same command then ends in the same files; any other fault
also where the command refuses in one sentence, without a traceback.
"""

import argparse
import errno
import functools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import NamedTuple

SETTINGS = {
    "sessions": {"train_users": 40, "heldout_users": 8, "test_users": 8, "transfer_users": 4},
    "scratch": {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 300, "heads": 2},
    "sft": {"max_steps": 4, "eval_every": 2, "batch_size": 16},
    "generate": {"samples": 32, "max_new_tokens": 8, "batch_size": 16},
    "reward_model": {"epochs": 1},
    "ppo": {"steps": 3, "batch_size": 8, "minibatch_size": 8, "checkpoint_every": 1,
            "eval_every": 2, "min_format": 0.0, "max_kl": 100.0, "without_signal": True},
    "eval": {"temperatures": [1.0], "heat_users": 1},
}  # fmt: skip
STAGES = ("data", "sft", "generate", "label", "map", "train-rm", "train", "eval")
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}  # of the audit hooks
FSYNC = "faults.fsync"
HANG = 600  # seconds, against a hang only
HARMS = ("truncated", "flipped", "missing", "foreign")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Ended(NamedTuple):
    """A process that has ended: its exit status, and what it said."""

    code: int
    said: str

    @property
    def refused(self):
        """It ended by itself, with a sentence and without a traceback."""
        return self.code > 0 and "Traceback" not in self.said and bool(self.said.strip())


class Case(NamedTuple):
    """A fault, and what became of it."""

    kind: str  # kill at a call, random kill, disk full, ...
    what: str  # stage and place
    outcome: str  # identical, refused, or what went wrong
    good: bool


class Moments:
    """An audit hook that counts moments, and acts before one of them."""

    def __init__(self, folder, stage, when=0, act=None):
        self.folder, self.begins = str(folder), f"/{stage}.tmp"
        self.when, self.act, self.count, self.begun = when, act, 0, False

    def __call__(self, event, arguments):
        if event == "open":
            path, mode, flags = arguments
            writes = set(mode) & set("wax+") if mode else flags & (os.O_WRONLY | os.O_RDWR)
            if not writes:
                return
        elif event in CHANGES or event == FSYNC:
            path = arguments[0]
        else:
            return
        if threading.current_thread() is not threading.main_thread():
            return
        path = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        if not path.startswith(self.folder):
            return
        self.begun = self.begun or self.begins in path
        self.count += self.begun
        if self.begun and self.count == self.when:
            self.act(path)


def watch(moments):
    """Install a hook in this process, and let it see fsync."""
    real = os.fsync

    def fsync(file):
        number = file if isinstance(file, int) else file.fileno()
        sys.audit(FSYNC, os.readlink(f"/proc/self/fd/{number}"))
        real(file)

    os.fsync = fsync
    sys.addaudithook(moments)


def signal_me(number, path):
    os.kill(os.getpid(), number)


def fail(code, path):
    raise OSError(code, os.strerror(code), path)


def at_moment(folder, stage, when, act):
    """To be called in a child: act before a moment."""
    watch(Moments(folder, stage, when, act))


def count_moments(folder, stage, into):
    """To be called in a child: write how many moments there were when it ends."""
    moments = Moments(folder, stage)
    watch(moments)
    return lambda: Path(into).write_text(str(moments.count))


def small_files():
    """To be called in a child: no file may be larger than 4 kB, as where a quota is used up."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


def clock_backwards():
    """To be called in a child: every reading of the clock is an hour before the one before it."""
    real, readings = time.time, []

    def back():
        readings.append(1)
        return real() - 3600 * len(readings)

    time.time = back


def spoilt_reward(when):
    """To be called in a child: one token's reward is NaN, at one call of the reward."""
    from tppo.methods import ppo

    real, calls = ppo.check_reward, []

    def check_reward(found, mask):
        found = real(found, mask)
        calls.append(1)
        if len(calls) == when:
            found.rewards[0, 0] = float("nan")
        return found

    ppo.check_reward = check_reward


def child(log, arguments, prepare):
    """`tppo` with these arguments in a process of its own."""
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


class Machine:
    """A run folder that nothing disturbed, and processes that are disturbed in copies of it."""

    def __init__(self, place):
        self.place, self.finished = Path(place), Path(place) / "undisturbed"
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(
            ["tppo.cli", "tppo.stages.ppo", "tppo.stages.evaluate", "tppo.stages.label", "yaml"]
        )
        self.moments, self.seconds, self.number = {}, {}, 0
        config, counted = self.place / "tiny.yaml", self.place / "count"
        config.write_text(json.dumps(SETTINGS))
        for stage in STAGES:
            command = [stage, "--out", str(self.finished), "--config", str(config)]
            start = time.monotonic()
            ended = self.run(command, functools.partial(
                count_moments, self.finished, stage, counted))  # fmt: skip
            assert ended.code == 0, ended.said
            self.seconds[stage] = time.monotonic() - start
            self.moments[stage] = int(counted.read_text())

    def start(self, command, prepare=None):
        """A process under way, and the file of what it says."""
        self.number += 1
        log = self.place / f"said-{self.number}"
        process = self.context.Process(target=child, args=(log, command, prepare))
        process.start()
        return process, log

    def ended(self, process, log):
        process.join(HANG)
        if process.is_alive():
            process.kill()
            process.join()
            return Ended(99, "Traceback: it hung")
        return Ended(process.exitcode, log.read_text(errors="replace"))

    def run(self, command, prepare=None):
        return self.ended(*self.start(command, prepare))

    def copy(self, stage):
        """The run folder as it was before a stage."""
        self.number += 1
        folder = self.place / f"run-{self.number}"
        shutil.copytree(self.finished, folder)
        shutil.rmtree(folder / stage)
        return folder

    def again(self, folder, stage):
        """The same command, undisturbed, in the folder that a fault has left: is all there?"""
        ended = self.run([stage, "--out", str(folder)])
        if ended.code:
            return f"not finished: {ended.said[-300:]}"
        if contents(folder / stage) != contents(self.finished / stage):
            return f"other files: {differing(folder / stage, self.finished / stage)}"
        return "identical"

    def judged(self, kind, what, folder, stage, ended):
        """A disturbed command that ended by itself, and what the next one makes of it."""
        if ended.code == 0 and (folder / stage).exists():
            same = contents(folder / stage) == contents(self.finished / stage)
            outcome = "identical" if same else "other files, and no word"
        elif not ended.refused and ended.code >= 0:
            outcome = f"no sentence: {ended.said[-300:]}"
        else:
            outcome = self.again(folder, stage)
            outcome = "refused, then identical" if outcome == "identical" else outcome
        shutil.rmtree(folder)
        return Case(kind, what, outcome, outcome.endswith("identical"))


def contents(folder):
    """The files of a stage; of what says so, all but how long it took."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = path.read_bytes()
        if path.name in ("manifest.json", "report.json", "result.json"):
            content = without_seconds(json.loads(content))
        found[path.relative_to(folder).as_posix()] = content
    return found


def without_seconds(found):
    if not isinstance(found, dict):
        return found
    return {key: without_seconds(value) for key, value in found.items()
            if key not in ("seconds", "report.json", "result.json")}  # fmt: skip


def differing(one, other):
    a, b = contents(one), contents(other)
    return [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)][:3]


def spread(machine, stages, total):
    """About `total` (stage, moment), as many of each stage as it has, evenly over its time."""
    every = sum(machine.moments[stage] for stage in stages)
    found = []
    for stage in stages:
        count = machine.moments[stage]
        n = min(count, max(1, round(total * count / every)))
        found += [(stage, 1 + k * count // n) for k in range(n)]
    return found


def kill_at_call(machine, stage, when):
    folder = machine.copy(stage)
    ended = machine.run([stage, "--out", str(folder)], functools.partial(
        at_moment, folder, stage, when, functools.partial(signal_me, signal.SIGKILL)))  # fmt: skip
    what = f"{stage}, call {when} of {machine.moments[stage]}"
    if ended.code != -signal.SIGKILL:
        shutil.rmtree(folder)
        return Case("kill at a call", what, f"was not killed: {ended.said[-300:]}", False)
    outcome = machine.again(folder, stage)
    shutil.rmtree(folder)
    return Case("kill at a call", what, outcome, outcome == "identical")


def kill_at_random(machine, stage, rng):
    """Between the beginning of its work and its end, which on a busy machine comes later."""
    folder, share = machine.copy(stage), rng.random()
    process, log = machine.start([stage, "--out", str(folder)])
    end = time.monotonic() + HANG
    while not (folder / f"{stage}.tmp").exists() and process.is_alive() and time.monotonic() < end:
        time.sleep(0.002)
    process.join(share * machine.seconds[stage])
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    machine.ended(process, log)
    outcome = machine.again(folder, stage)
    shutil.rmtree(folder)
    return Case("kill at random", f"{stage}, {share:.2f} of its time", outcome,
                outcome == "identical")  # fmt: skip


def error_at_call(machine, kind, code, stage, when):
    folder = machine.copy(stage)
    ended = machine.run([stage, "--out", str(folder)], functools.partial(
        at_moment, folder, stage, when, functools.partial(fail, code)))  # fmt: skip
    return machine.judged(kind, f"{stage}, call {when}", folder, stage, ended)


def signal_at_call(machine, number, stage, when):
    folder = machine.copy(stage)
    ended = machine.run([stage, "--out", str(folder)], functools.partial(
        at_moment, folder, stage, when, functools.partial(signal_me, number)))  # fmt: skip
    return machine.judged(signal.Signals(number).name, f"{stage}, call {when}", folder, stage,
                          ended)  # fmt: skip


def prepared(machine, kind, stage, prepare):
    folder = machine.copy(stage)
    ended = machine.run([stage, "--out", str(folder)], prepare)
    return machine.judged(kind, stage, folder, stage, ended)


def harm(path, how):
    """Harm a file; whether there was something to harm."""
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 0x04]) + content[middle + 1 :])
    else:
        path.write_bytes(b'{"of": "another program"}\n')


def harmed_file(machine, stage, name, how):
    """A file of a finished stage, which the stage behind it reads or leaves alone."""
    reader = STAGES[STAGES.index(stage) + 1]
    folder = machine.copy(reader)
    path = folder / stage / name
    harm(path, how)
    ended = machine.run([reader, "--out", str(folder)])
    what = f"{stage}/{name} {how}, read by {reader}"
    if ended.code == 0:
        same = contents(folder / reader) == contents(machine.finished / reader)
        outcome = "identical" if same else "other files, and no word"
    elif ended.refused and str(path.parent) in ended.said:
        outcome = "refused, named"
    else:
        outcome = f"no sentence that names it: {ended.said[-300:]}"
    shutil.rmtree(folder)
    return Case("harmed file", what, outcome, outcome in ("identical", "refused, named"))


def harmed_settings(machine, how):
    """The settings of the run, which a stage alone starts from."""
    folder = machine.copy("eval")
    harm(folder / "run.yaml", how)
    ended = machine.run(["eval", "--out", str(folder)])
    outcome = f"no sentence that names it: {ended.said[:900]}"
    if ended.code == 0:
        same = contents(folder / "eval") == contents(machine.finished / "eval")
        # Without the file the flags are those by default, as for any command without one.
        told = "WARNING: eval builds on files of sft, which would now be others" in ended.said
        outcome = "identical" if same else "told, setting by setting" if told else ended.said[:900]
    elif ended.refused and "run.yaml" in ended.said:
        outcome = "refused, named"
    shutil.rmtree(folder)
    return Case("harmed settings", f"run.yaml {how}", outcome,
                outcome in ("identical", "refused, named", "told, setting by setting"))  # fmt: skip


def harmed_checkpoint(machine, stage, name, how):
    """A file of the newest checkpoint of a stage that was killed."""
    folder = machine.copy(stage)
    machine.run([stage, "--out", str(folder)], functools.partial(
        at_moment, folder, stage, machine.moments[stage] * 2 // 3,
        functools.partial(signal_me, signal.SIGKILL)))  # fmt: skip
    kept = sorted((folder / f"{stage}.tmp").rglob("step-*/" + name))
    if not kept:
        shutil.rmtree(folder)
        return Case("harmed checkpoint", f"{stage}, {name}", "there was none", False)
    harm(kept[-1], how)
    outcome = machine.again(folder, stage)
    shutil.rmtree(folder)
    return Case("harmed checkpoint", f"{stage}, {name} {how}", outcome, outcome == "identical")


def two_processes(machine, stage):
    """The second is refused in a sentence, and the first is not disturbed."""
    folder = machine.copy(stage)
    first, log = machine.start([stage, "--out", str(folder)])
    end = time.monotonic() + HANG
    while not (folder / f"{stage}.tmp").exists() and first.is_alive() and time.monotonic() < end:
        time.sleep(0.002)
    if not first.is_alive():
        return Case("two processes", stage, f"the first: {log.read_text()[-300:]}", False)
    os.kill(first.pid, signal.SIGSTOP)
    second = machine.run([stage, "--out", str(folder)])
    os.kill(first.pid, signal.SIGCONT)
    ended = machine.ended(first, log)
    if not (second.refused and "works in this run folder" in second.said):
        shutil.rmtree(folder)
        return Case("two processes", stage, f"the second: {second.said[-300:]}", False)
    return machine.judged("two processes", stage, folder, stage, ended)


def files_of(machine, stage):
    """One file of each kind, by name and suffix."""
    kinds = {}
    for path in sorted((machine.finished / stage).rglob("*")):
        if path.is_file():
            kinds.setdefault((path.suffix, path.name), path.relative_to(machine.finished / stage))
    return [name.as_posix() for name in kinds.values()]


def whole(machine, kills, seed=0):
    """Every case, one after another."""
    rng = random.Random(seed)
    for stage, when in spread(machine, STAGES, kills * 3 // 4):
        yield kill_at_call(machine, stage, when)
    for _ in range(kills - kills * 3 // 4):
        yield kill_at_random(machine, rng.choice(STAGES[1:]), rng)
    for kind, code in (("disk full", errno.ENOSPC), ("read-only", errno.EROFS)):
        for stage, when in spread(machine, STAGES, 16):
            yield error_at_call(machine, kind, code, stage, when)
    for stage in ("sft", "train-rm", "train"):
        yield prepared(machine, "files of 4 kB at most", stage, small_files)
    for number in SIGNALS:
        for stage, when in spread(machine, STAGES, 8):
            yield signal_at_call(machine, number, stage, when)
    for stage in STAGES[:-1]:
        for name in files_of(machine, stage):
            yield harmed_file(machine, stage, name, rng.choice(HARMS))
    for name in ("policy.safetensors", "optimizer.pt", "state.json", "COMPLETE.json"):
        for how in HARMS:
            yield harmed_checkpoint(machine, "train", name, how)
    for how in ("truncated", "missing", "foreign"):  # a flipped bit is a setting that one may type
        yield harmed_settings(machine, how)
    for stage in ("sft", "train"):
        yield two_processes(machine, stage)
        yield prepared(machine, "clock backwards", stage, clock_backwards)


def table(cases):
    """Kinds of faults with how many there were, and how many were survived."""
    kinds = dict.fromkeys(case.kind for case in cases)
    rows = [("fault", "injected", "survived", "lost")]
    for kind in kinds:
        of = [case.good for case in cases if case.kind == kind]
        rows.append((kind, str(len(of)), str(sum(of)), str(len(of) - sum(of))))
    kills = [case.good for case in cases if case.kind.startswith("kill")]
    others = [case.good for case in cases if not case.kind.startswith("kill")]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, (24, 8, 8, 4), strict=True)).rstrip()
             for row in rows]  # fmt: skip
    lines += [f"moments killed {len(kills)}, identical {sum(kills)}, lost "
              f"{len(kills) - sum(kills)}", f"faults injected {len(others)}, survived "
              f"{sum(others)}"]  # fmt: skip
    return "\n".join([*lines, *(f"LOST  {case.kind}: {case.what}: {case.outcome}" for case in cases
                                if not case.good)])  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description="Faults put into a tiny run.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        cases = []
        for case in whole(Machine(place), options.kills, options.seed):
            cases.append(case)
            print(f"{len(cases):4}  {case.kind}: {case.what}: {case.outcome}", flush=True)
        print(table(cases))
        sys.exit(0 if all(case.good for case in cases) else 1)


if __name__ == "__main__":
    # A forked child finds this module by its name, not as the main one.
    sys.path.insert(0, str(Path(__file__).parent))
    import harness

    harness.main()
