"""A long training of the smallest model: does anything grow, and is it the same where it is stopped
again and again?

    python tests/faults/soak.py --steps 2000 --every 100 --json soak.json

Two runs of the stage `train` side by side, each in processes of its own.  The first is not
disturbed, and reads what its own process holds; the time of a step is judged by that of the same
work beside it, for a machine is not always as fast.  The second is ended every 100 steps, by turns
by SIGTERM and by SIGKILL, and started again by the same command.  Both must end in the same files.

Behind them a third one of a few steps, which goes on in one, two and again one process (gloo), is
held beside the same steps in one process, and in two.
"""

import argparse
import ctypes
import functools
import gc
import hashlib
import json
import os
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from array import array
from pathlib import Path
from typing import NamedTuple

from machine import Machine, contents, without_word_of_semaphores

PPO = {"eval-every": 20, "checkpoint-every": 20, "batch-size": 4, "minibatch-size": 4,
       "max-passes": 1e9}
# What the last quarter of a run may have more of than the first one.
BOUNDS = {
    "CPU ms a step": 1.10, "CPU ms a step that is saved": 1.10,  # a ratio, to the machine's
    "heap": 0.5,  # kB a step, allocated; a row of figures, which is not held, would take 1.4
    "resident": 10.0,  # kB a step; pages that the heap leaves half empty are among them
    "objects": 0.5, "blocks": 1.5,  # a step; containers, and all else of Python but large ones
    "tensors": 0, "handles": 0, "threads": 0, "checkpoints": 0,
    "disk": 1.01,  # a ratio: bytes of the checkpoints, but for rows of figures and answers
}  # fmt: skip
WORLDS = {"eval-every": 4, "checkpoint-every": 50, "batch-size": 5, "responses-per-prompt": 2,
          "minibatch-size": 6, "max-passes": 1e9, "lr": 3e-3, "critic-lr": 3e-3,
          "adaptive-kl": 0.05, "lr-schedule": "cosine"}  # fmt: skip
FIGURES, WEIGHTS = 1e-4, 1e-5  # relative, absolute: as far as processes may differ (gloo, float32)
LAST = "weights-behind-the-last-step"
HANG = 7200  # seconds, against a hang only


class Held(NamedTuple):
    """What the process of a training holds after a step."""

    step: int
    heap: int  # bytes
    resident: int  # bytes
    objects: int
    blocks: int
    tensors: int
    handles: int
    threads: int
    checkpoints: int
    disk: int  # bytes of the checkpoints without their rows


class Allocated(ctypes.Structure):
    """What glibc says of its heap: `mallinfo2`."""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
        "fordblks", "keepcost")]  # fmt: skip


def held(step, folder):
    """Read it from the process itself, whose caches of bounded size are emptied before."""
    import torch

    gc.collect()
    objects = gc.get_objects()
    for cache in objects:
        if type(cache) is functools._lru_cache_wrapper and "tppo.labels" in cache.__module__:
            cache.cache_clear()  # of words and queries, 65,536 at most: they fill for long
    library = ctypes.CDLL(None)
    library.malloc_trim(0)
    library.mallinfo2.restype = Allocated
    allocated = library.mallinfo2()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    files = [path.stat().st_size for path in folder.rglob("*")
             if path.is_file() and path.suffix != ".jsonl"]  # fmt: skip
    return Held(
        step, allocated.hblkhd + allocated.uordblks, pages * os.sysconf("SC_PAGE_SIZE"),
        len(objects), sys.getallocatedblocks(),
        sum(issubclass(type(x), torch.Tensor) for x in objects),
        len(os.listdir("/proc/self/fd")), threading.active_count(),
        len([*folder.glob("*")]), sum(files),
    )  # fmt: skip


def after_each_step(act):
    """To be called in a child: `act(loop, step)` behind every step; then a hash of the weights
    behind the last one, beside the folder of the stage.
    """
    from tppo.stages.loop import Loop

    real = Loop.step

    def step(self, number):
        row = real(self, number)
        if number == self.steps:
            (self.out.parent / LAST).write_text(weights(self.trainer))
        act(self, number)
        return row

    Loop.step = step


def weights(trainer):
    """A hash of all weights that are trained, and of the state of their optimiser."""
    digest = hashlib.sha256()
    for parameter in (p for group in trainer.optimizer.param_groups for p in group["params"]):
        for tensor in (parameter, *trainer.optimizer.state[parameter].values()):
            digest.update(tensor.detach().numpy().tobytes())
    return digest.hexdigest()


def measure(folder, into, readings, steps):
    """To be called in a child: read what it holds and how long its steps take, to the end."""
    seconds, fixed = array("d"), array("d")  # that grow by eight bytes a step, and no object
    found, hashes, before = [], [], [time.process_time()]

    def act(loop, step):
        now = time.process_time()
        seconds.append(now - before[0])
        always_the_same()
        fixed.append(time.process_time() - now)
        if step % max(1, steps // readings) == 0:
            found.append(held(step, folder / "train.tmp/checkpoints"))
            hashes.append(weights(loop.trainer))
        before[0] = time.process_time()

    after_each_step(act)
    return lambda: Path(into).write_text(json.dumps(
        {"seconds": [*seconds], "fixed": [*fixed], "held": found, "weights": hashes}))  # fmt: skip


def always_the_same():
    """Work of a millisecond or two of the kinds that a step consists of: Python, small products."""
    import torch

    a, texts = torch.full((48, 48), 0.02), []
    for i in range(60):
        a = torch.tanh(a @ a)
        texts.append(json.dumps({"step": i, "figures": [0.5] * 20}))
    return a, texts


def stop_after(steps, number):
    """To be called in a child: end it by a signal after so many steps of its own."""
    done = []

    def act(loop, step):
        done.append(step)
        if len(done) == steps:
            os.kill(os.getpid(), number)

    after_each_step(act)


def command(folder, steps, ppo):
    """The command line of the training."""
    given = [text for name, value in {**ppo, "steps": steps}.items()
             for text in (f"--ppo.{name}", str(value))]  # fmt: skip
    return ["train", "--out", str(folder), *given]


def resumed(machine, folder, steps, every, ppo):
    """The training stopped again and again; by which signals."""
    signals = []
    while not (folder / "train").exists():
        # A kill comes three steps behind a checkpoint, and costs them.
        number, more = ((signal.SIGTERM, 0), (signal.SIGKILL, 3))[len(signals) % 2]
        ended = machine.run(command(folder, steps, ppo), functools.partial(
            stop_after, every + more, number))  # fmt: skip
        if ended.code == 0:
            break
        signals.append(number.name)
        expected = {signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
        if ended.code != expected or len(signals) > 10 * steps / every:
            raise RuntimeError(f"start {len(signals)}: {ended.said[-600:]}")
    return signals


def in_world(rank, size, port, then=None):
    """To be called in a child: it is one of several processes that torchrun would have started."""
    where = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "localhost",
             "MASTER_PORT": port}  # fmt: skip
    os.environ.update({name: str(value) for name, value in where.items()})
    return then() if then else None


def in_processes(machine, folder, size, steps, stop=None):
    """The training in so many processes, which a signal may end after some steps; what they say."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    then = functools.partial(stop_after, stop, signal.SIGTERM) if stop else None
    started = [machine.start(command(folder, steps, WORLDS),
                             functools.partial(in_world, rank, size, port, then) if size > 1
                             else then) for rank in range(size)]  # fmt: skip
    ended = [machine.ended(*process) for process in started]
    wanted = 143 if stop else 0
    assert [one.code for one in ended] == [wanted] * size, ended[0].said[-900:]
    return ended[0].said


def worlds(machine, steps=8, plan=((1, 2), (2, 3), (1, None)), straight=True):
    """How far a training that goes on in other numbers of processes is from one in one process.

    plan: processes, and after how many steps they are stopped.  straight: in two to the end, too.
    """
    one, two, mixed = (machine.copy("train") for _ in range(3))
    in_processes(machine, one, 1, steps)
    if straight:
        in_processes(machine, two, 2, steps)
    said = [in_processes(machine, mixed, size, steps, stop) for size, stop in plan]
    counts = [str(size) for size, _ in plan]
    for before, now, text in zip(counts, counts[1:], said[1:], strict=False):
        assert f"goes on in {now} processes, begun in {before}" in text, text
    folders = {" -> ".join(counts): mixed} | ({"2": two} if straight else {})
    return {name: apart(one / "train", folder / "train") for name, folder in folders.items()}


def apart(one, other):
    """(largest relative difference of a figure, and which; of a weight; are the answers equal)."""
    from safetensors.torch import load_file

    rows, others = ([json.loads(line) for line in (folder / "metrics.jsonl").read_text().split("\n")
                     if line] for folder in (one, other))  # fmt: skip
    figures = max((abs(a[name] - b[name]) / max(abs(a[name]), 0.01), f"{name} of step {a['step']}")
                  for a, b in zip(rows, others, strict=True) for name in a
                  if not isinstance(a[name], list))  # fmt: skip
    weights = [load_file(folder / "model/model.safetensors") for folder in (one, other)]
    furthest = max((weights[0][name] - weights[1][name]).abs().max().item() for name in weights[0])
    return {"figures": figures, "weights": furthest,
            "answers": [row["num_tokens"] for row in rows] == [row["num_tokens"] for row in others]}


def soak(machine, steps, every, ppo=PPO, readings=40):
    """Both runs; what was found."""
    straight, other = machine.copy("train"), machine.copy("train")
    into = machine.new("measured")
    process, log = machine.start(command(straight, steps, ppo), functools.partial(
        measure, straight, into, readings, steps))  # fmt: skip
    try:
        signals = resumed(machine, other, steps, every, ppo)
        process.join(HANG)
    finally:
        if process.is_alive():
            process.kill()
    assert process.exitcode == 0, log.read_text()[-600:]
    measured = json.loads(into.read_text())
    assert len({*measured["weights"]}) == len(measured["held"]), "weights stood still"
    one, two = (contents(folder, ("train", LAST)) for folder in (straight, other))
    return {
        "steps": steps, "signals": signals,
        "differing": [name for name in sorted({*one, *two}) if one.get(name) != two.get(name)][:3],
        "saved_every": ppo["checkpoint-every"], "seconds": measured["seconds"],
        "fixed": measured["fixed"],
        "held": [Held(*row)._asdict() for row in measured["held"]],
    }  # fmt: skip


def quarters(values, what=statistics.median):
    """Of the first quarter and of the last."""
    n = max(1, len(values) // 4)
    return what(values[:n]), what(values[-n:])


def low(values):
    """What a tenth of them is below: other work on the machine only ever makes a step slower, and
    other threads only ever hold something more.
    """
    return sorted(values)[len(values) // 10]


def growth(found):
    """(what, first quarter, last quarter, growth, what is allowed, is it within) for each."""
    every, seconds = found["saved_every"], found["seconds"]
    begun, end = quarters(found["fixed"], low)
    slower = end / begun  # the machine, meanwhile
    saved = seconds[every - 1 :: every]
    others = [x for i, x in enumerate(seconds, 1) if i % every]
    rows = []
    for name, values in zip(BOUNDS, (others, saved), strict=False):
        first, last = quarters(values, low)
        rows.append((name, 1e3 * first, 1e3 * last, last / first / slower, BOUNDS[name]))
    for name in list(BOUNDS)[2:]:
        # The thread of report.html holds all rows while it draws them: that only ever adds.
        what = low if name in ("heap", "objects", "blocks") else statistics.median
        first, last = quarters([row[name] for row in found["held"]], what)
        if name in ("heap", "resident"):
            first, last = first / 1e3, last / 1e3
        a_step = name in ("heap", "resident", "objects", "blocks")
        per = 0.75 * found["steps"] if a_step else 1
        more = last / max(first, 1) if name == "disk" else (last - first) / per
        rows.append((name, first, last, more, BOUNDS[name]))
    return [(*row, row[3] <= row[4]) for row in rows]


def table(found):
    lines = [f"{'':27} {'first quarter':>14} {'last quarter':>14} {'growth':>10} {'allowed':>8}"]
    for name, first, last, more, allowed, good in growth(found):
        lines.append(f"{name:27} {first:14,.6g} {last:14,.6g} {more:10.4g} {allowed:8g}"
                     + ("" if good else "  GREW"))  # fmt: skip
    signals = found["signals"]
    same = "the same files" if not found["differing"] else f"OTHER FILES {found['differing']}"
    counts = ", ".join(f"{signals.count(name)} {name}" for name in dict.fromkeys(signals))
    lines.append(f"steps soaked {found['steps']}, grew {sum(not row[-1] for row in growth(found))}"
                 f"; stopped {len(signals)} times ({counts}), then {same}")  # fmt: skip
    return "\n".join(lines)


def good(found):
    return not found["differing"] and all(row[-1] for row in growth(found))


def worlds_table(found):
    lines = [f"{'processes':27} {'figures':>10} {'weights':>10}  furthest"]
    for name, far in found.items():
        figure, which = far["figures"]
        lines.append(f"{name:27} {figure:10.1e} {far['weights']:10.1e}  {which}"
                     + ("" if near({name: far}) else "  TOO FAR"))  # fmt: skip
    return "\n".join([*lines, f"{'allowed':27} {FIGURES:10g} {WEIGHTS:10g}"])


def near(found):
    return all(far["figures"][0] <= FIGURES and far["weights"] <= WEIGHTS and far["answers"]
               for far in found.values())  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description="A long training of the smallest model.")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    without_word_of_semaphores()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        machine = Machine(place)
        processes = worlds(machine)
        print(worlds_table(processes), flush=True)
        found = soak(machine, options.steps, options.every)
    print(table(found))
    print(f"{time.monotonic() - start:.0f} s")
    if options.json:
        rows = [dict(zip(("what", "first", "last", "growth", "allowed", "good"), row, strict=True))
                for row in growth(found)]  # fmt: skip
        figures = {"steps_soaked": found["steps"], "grew": sum(not row["good"] for row in rows),
                   "stopped": len(found["signals"]), "identical": not found["differing"],
                   "growth": rows, "processes": processes}  # fmt: skip
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    sys.exit(0 if good(found) and near(processes) else 1)


if __name__ == "__main__":
    # A forked child finds this module by its name, not as the main one.
    sys.path.insert(0, str(Path(__file__).parent))
    import soak as this

    this.main()
