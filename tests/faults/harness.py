"""Faults put into every command of a tiny run: kills, disks that are full or read-only, signals,
harmed files, two processes, a clock that goes backwards, an endpoint that dies, memory that does
not suffice, figures that are not finite.  Nothing may be lost, and nothing may be silently wrong.

    python tests/faults/harness.py --kills 250 --json faults.json

`works.py` has the commands, `cases.py` and `spoilt.py` a function a kind of fault, `injected.py`
what is done to a process from inside, `machine.py` the processes.
"""

import argparse
import itertools
import json
import random
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cases
import injected
import spoilt
from cases import HARMS, SIGNALS, Case
from machine import Machine, without_word_of_semaphores
from works import LOCKED, READERS, RESUMED, WORKS


class Planned(NamedTuple):
    """A fault that is to be injected."""

    case: object  # a function of cases
    work: str
    arguments: tuple = ()

    def run(self, machine):
        """Inject it.  An error of the harness itself is no success."""
        try:
            return self.case(machine, self.work, *self.arguments)
        except Exception:
            said = traceback.format_exc()[-600:]
            return Case(self.case.kind, self.work, str(self.arguments), said)


def spread(machine, works, total):
    """About `total` (work, moment): of each work by the root of how many it has, evenly over its
    time.
    """
    weights = {name: machine.done(name).moments ** 0.5 for name in works}
    every, found = sum(weights.values()), []
    for name in works:
        count = machine.done(name).moments
        n = min(count, max(1, round(total * weights[name] / every)))
        found += [(name, 1 + k * count // n) for k in range(n)]
    return found


def sizes(machine, name):
    """Bytes at which a write of a work may be cut: the halves of its files."""
    folder = machine.done(name).folder
    found = {(folder / file).stat().st_size // 2 for file in machine.done(name).contents}
    return sorted(size for size in found if size > 1000)


def kills(machine, total, rng):
    """Four parts at calls, one in writes, one at random."""
    for name, when in spread(machine, WORKS, total * 2 // 3):
        yield Planned(cases.kill_at_call, name, (when,))
    # Of a study other processes write, and it is told that one of them was ended.
    writes = [(name, size) for name in WORKS if name != "study" for size in sizes(machine, name)]
    for name, size in rng.sample(writes, min(len(writes), total // 6)):
        yield Planned(cases.kill_in_write, name, (size,))
    names = itertools.cycle(rng.sample([*WORKS], len(WORKS)))
    for name in itertools.islice(names, total // 6):
        yield Planned(cases.kill_at_random, name, (round(rng.random(), 2),))


def disks(machine, rng):
    """Full and read-only ones in every work."""
    for name in WORKS:
        for case in (cases.disk_full, cases.read_only_at_call):
            yield Planned(case, name, (1 + rng.randrange(machine.done(name).moments),))
    if why := injected.why_no_mounts():
        print(f"no disks of our own ({why}): quotas of files alone", flush=True)
    for name in WORKS:
        if why:
            yield Planned(cases.small_files, name)
            continue
        yield Planned(cases.small_disk, name, (round(rng.uniform(0.05, 0.9), 2),))
        yield Planned(cases.read_only_folder, name)
    for name in ("sft", "train", "pit"):
        yield Planned(cases.small_files, name)
        if not why:
            yield Planned(cases.small_disk, name, (0.5, True))


def orders(machine, rng):
    """Signals, clocks and second processes in every work."""
    for number in SIGNALS:
        for name in WORKS:
            when = 1 + rng.randrange(machine.done(name).moments)
            yield Planned(cases.signal_at_call, name, (number, when))
    for name in WORKS:
        yield Planned(cases.clock_backwards, name)
    for name in LOCKED:
        yield Planned(cases.two_processes, name)


def harms(machine):
    """Every kind of file, in every way."""
    for reader, writer in READERS:
        for file, how in itertools.product(cases.pieces(machine, writer), HARMS):
            yield Planned(cases.harmed_file, reader, (file, how))
    for name in RESUMED:
        share, files = cases.left_at(machine, name, "step-*/*")
        for file, how in itertools.product(files, HARMS):
            yield Planned(cases.harmed_checkpoint, name, (share, file, how))
    for name, part in (("pit", "sft"), ("pit", "gap"), ("baselines", "sentence_labels")):
        share, _ = cases.left_at(machine, name, f"*.tmp/checkpoints/{part}/report.json")
        for file, how in itertools.product(("model/model.safetensors", "report.json"), HARMS):
            yield Planned(cases.harmed_part, name, (share, part, file, how))
    for name, work in WORKS.items():
        if work.asks:
            yield from (Planned(cases.harmed_cache, name, (how,)) for how in HARMS)
    for how in ("truncated", "missing", "foreign"):  # a flipped bit may be what was meant
        yield Planned(cases.harmed_settings, "eval", (how,))
        yield Planned(cases.harmed_answers, "import a batch", (how,))


def others(machine):
    """Endpoints that die, batches that are cut, memory, figures that are not finite."""
    for name in ("label by an endpoint", "eval by an endpoint"):
        for patient in (True, False):
            yield Planned(cases.endpoint_restarted, name, (patient,))
    every = machine.done("import a batch").moments
    for share in (0.4, 0.6, 0.8):
        yield Planned(cases.rest_of_batch, "import a batch", (round(share * every),))
    for name, place in itertools.product(("train", "train by d2lols"), spoilt.READS):
        yield Planned(spoilt.out_of_memory, name, (place,))
    for what, value in itertools.product(spoilt.PLACES, ("nan", "inf")):
        yield Planned(spoilt.skipped, "train", (what, value))
        yield Planned(spoilt.stopped, "train", (what, value))


def whole(machine, total, seed=0):
    """Every fault that is to be injected."""
    rng = random.Random(seed)
    yield from kills(machine, total, rng)
    yield from disks(machine, rng)
    yield from orders(machine, rng)
    yield from harms(machine)
    yield from others(machine)


def carried_out(machine, planned: Iterable[Planned], workers=2):
    """What became of the faults, as they come, of so many at once."""
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(lambda one: one.run(machine), planned)


def table(found):
    """A row a work and a column a kind of fault: survived / injected, and the totals."""
    kinds = list(dict.fromkeys(case.kind for case in found))
    works = list(dict.fromkeys(case.work for case in found))
    head = [f"{chr(97 + k)} {kind}" for k, kind in enumerate(kinds)]
    rows = [["", *(chr(97 + k) for k in range(len(kinds))), "all"]]
    for work in [*works, None]:
        of = [case for case in found if work in (case.work, None)]
        cells = [[case.good for case in of if case.kind == kind] for kind in kinds]
        rows.append([work or "all", *(f"{sum(c)}/{len(c)}" if c else "" for c in cells),
                     f"{sum(case.good for case in of)}/{len(of)}"])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]),
                        *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
             for row in rows]  # fmt: skip
    totals = figures(found)
    return "\n".join([
        "; ".join(head), *lines,
        "moments killed {killed}, identical {identical}, lost {lost}".format_map(totals),
        "faults injected {injected}, survived {survived}".format_map(totals),
        *(f"LOST  {case.kind}: {case.work}, {case.what}: {case.outcome}"
          for case in found if not case.good),
    ])  # fmt: skip


def figures(found):
    """The totals, and those of each kind."""
    killed = [case.good for case in found if case.kind.startswith("kill")]
    others = [case.good for case in found if not case.kind.startswith("kill")]
    kinds = {}
    for case in found:
        kind = kinds.setdefault(case.kind, {"injected": 0, "survived": 0})
        kind["injected"] += 1
        kind["survived"] += case.good
    return {"killed": len(killed), "identical": sum(killed), "lost": len(killed) - sum(killed),
            "injected": len(others), "survived": sum(others), "kinds": kinds,
            "works": sorted({case.work for case in found})}  # fmt: skip


def main():
    """Entry point of `make faults`."""
    parser = argparse.ArgumentParser(description="Faults put into every command of a tiny run.")
    parser.add_argument("--kills", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="faults at once")
    parser.add_argument("--only", default="", help="a pattern that 'KIND: WORK' has, as in "
                        "'prefer|by hand'")  # fmt: skip
    parser.add_argument("--share", type=float, default=1.0, help="of the faults, drawn at random")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    without_word_of_semaphores()
    start, found = time.monotonic(), []
    with tempfile.TemporaryDirectory() as place:
        machine = Machine(place)
        try:
            planned = [one for one in whole(machine, options.kills, options.seed)
                       if re.search(options.only, f"{one.case.kind}: {one.work}")]  # fmt: skip
            chosen = random.Random(options.seed)
            planned = [one for one in planned if chosen.random() < options.share]
            print(f"{len(planned)} faults, {len(WORKS)} commands; undisturbed in "
                  f"{time.monotonic() - start:.0f} s", flush=True)  # fmt: skip
            for case in carried_out(machine, planned, options.workers):
                found.append(case)
                print(f"{len(found):4}  {case.kind}: {case.work}, {case.what}: {case.outcome}",
                      flush=True)  # fmt: skip
        finally:
            machine.close()
    print(table(found))
    seconds = round(time.monotonic() - start)
    print(f"{seconds} s")
    if options.json:
        options.json.write_text(json.dumps(figures(found) | {"seconds": seconds}, indent=2) + "\n")
    sys.exit(0 if found and all(case.good for case in found) else 1)


if __name__ == "__main__":
    # A forked child finds this module by its name, not as the main one.
    sys.path.insert(0, str(Path(__file__).parent))
    import harness

    harness.main()
