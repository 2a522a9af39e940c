"""A million calls with hostile input, over every target, and a table of what they have shown.

    python tests/fuzz/driver.py                          all of it, on every core (`make fuzz`)
    python tests/fuzz/driver.py --target NAME --calls N  one target; a part of its name is enough
    python tests/fuzz/driver.py --target NAME --repeat FILE   one call, with an input that failed

A process that dies or hangs is a crash of the input that it was last given, and another one goes on
with the next target. Failing inputs are written to `--failures` with the command that repeats
them. What a call is, and when it is wrong, stands in `guided.py` and in the files of the targets.
"""

import argparse
import base64
import json
import mmap
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import guided
from guided import Failure, Found, Target

CALLS = 1_000_000
SILENT_S = 300.0  # without a new call, after which a process counts as hanging
ROOM = 4 << 30  # bytes that a process may take beside what it has after its imports
LAST = 1 << 15  # bytes of the file with the last input
FILES = (
    "fuzz_readers",
    "fuzz_parquet",
    "fuzz_labels",
    "fuzz_replies",
    "fuzz_offsets",
    "fuzz_settings",
    "fuzz_bombs",
    "fuzz_gradients",
    "fuzz_losses",
    "fuzz_sequences",
    "fuzz_arguments",
)


def targets() -> list[Target]:
    """Every target, in the order of the table."""
    return [target for name in FILES for target in __import__(name).TARGETS]


def chosen(names: Sequence[str]) -> list[Target]:
    """The targets whose name holds one of these; all without any."""
    found = [t for t in targets() if not names or any(name in t.name for name in names)]
    if not found:
        sys.exit(
            f"--target was {', '.join(names)}, expected a part of one of: "
            + "; ".join(t.name for t in targets())
        )
    return found


class Share(NamedTuple):
    """What one process does: so many calls of a target."""

    target: str
    calls: int
    seed: int
    into: Path


def shares(
    found: Sequence[Target], calls: int, seed: int, workers: int, into: Path
) -> list[list[Share]]:
    """Of each worker its part of the calls of every target."""
    whole, parts = sum(target.share for target in found), list[list[Share]]()
    for worker in range(workers):
        parts.append([])
        for number, target in enumerate(found):
            mine = max(workers, round(calls * target.share / whole))
            parts[-1].append(
                Share(
                    target.name,
                    mine // workers + (worker < mine % workers),
                    seed * 1000 + worker,
                    into / f"{number}-{worker}.json",
                )
            )
    return parts


class Last:
    """The input that a process was last given, and how many it was given: in a shared file."""

    def __init__(self, path: Path) -> None:
        with open(path, "ab+") as file:
            file.truncate(LAST + 16)
        with open(path, "rb+") as file:
            self.map = mmap.mmap(file.fileno(), LAST + 16)

    def write(self, data: bytes) -> None:
        count = int.from_bytes(self.map[:8], "little") + 1
        self.map[:16] = count.to_bytes(8, "little") + len(data).to_bytes(8, "little")
        self.map[16 : 16 + len(data)] = data

    def read(self) -> tuple[int, bytes]:
        size = int.from_bytes(self.map[8:16], "little")
        return int.from_bytes(self.map[:8], "little"), self.map[16 : 16 + size]


def work(parts: Sequence[Share]) -> None:
    """The calls of shares in this process; the result of each is a file."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    for share in parts:
        target = next(target for target in targets() if target.name == share.target)
        before = resource.getrusage(resource.RUSAGE_SELF)
        last = Last(share.into.with_suffix(".last"))
        found = guided.search(target, share.calls, share.seed, last.write)
        after = resource.getrusage(resource.RUSAGE_SELF)
        made = share.into.with_suffix(".tmp")
        made.write_text(
            json.dumps(
                {
                    "calls": found.calls,
                    "refused": found.refused,
                    "crashes": found.crashes,
                    "wrong": found.wrong,
                    "grown": found.grown,
                    "edges": [list(e) for e in found.edges],
                    "seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
                    "peak_mb": (after.ru_maxrss - before.ru_maxrss) / 1024,
                    "failures": [
                        [f.kind, f.message, base64.b64encode(f.data).decode()]
                        for f in found.failures
                    ],
                }
            )
        )
        made.rename(share.into)


def start(parts: Sequence[Share]) -> "subprocess.Popen[bytes]":
    given = json.dumps([[*share[:3], str(share.into)] for share in parts])
    return subprocess.Popen(
        [sys.executable, __file__, "--work", given], env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


class Row(NamedTuple):
    """What a share, or all shares of a target, have shown."""

    found: Found
    seconds: float
    peak_mb: float


def done(share: Share) -> Row:
    """The result of a share that a process has come to the end of."""
    left = json.loads(share.into.read_text())
    found = Found(
        share.target,
        *(left[k] for k in ("calls", "refused", "crashes", "wrong")),
        {tuple(e) for e in left["edges"]},
        left["grown"],
        [Failure(k, m, base64.b64decode(d)) for k, m, d in left["failures"]],
    )
    return Row(found, left["seconds"], left["peak_mb"])


def broken(share: Share, how: str) -> Row:
    """The result of a share whose process has died of an input, or hangs in it."""
    found = Found(share.target)
    found.calls, data = Last(share.into.with_suffix(".last")).read()
    found.add(Failure("crash", f"{share.target}: the process {how}", data), how)
    return Row(found, 0.0, 0.0)


class Worker:
    """A process with the shares that it has still to do."""

    def __init__(self, parts: Sequence[Share]) -> None:
        self.parts = list(parts)
        self.process = start(self.parts)
        self.count, self.since = -1, time.time()

    def ended(self) -> Iterator[Row]:
        """The results that are new; a share that kills or hangs its process is given up."""
        code = self.process.poll()
        while self.parts and self.parts[0].into.exists():
            yield done(self.parts.pop(0))
        if not self.parts:
            return
        count = Last(self.parts[0].into.with_suffix(".last")).read()[0]
        if count != self.count:
            self.count, self.since = count, time.time()
        how = f"ended with {code}"
        if code is None and time.time() - self.since > SILENT_S:
            self.process.kill()
            code, how = self.process.wait(), "hung"
        if code is not None:
            yield broken(self.parts.pop(0), how)
            if self.parts:
                self.__init__(self.parts)  # type: ignore[misc]


def run(parts: Sequence[Sequence[Share]]) -> Iterator[Row]:
    """The results of all shares, as they end; a process each list of them."""
    workers = [Worker(of_one) for of_one in parts]
    try:
        while any(worker.parts for worker in workers):
            time.sleep(0.2)
            for worker in workers:
                yield from worker.ended()
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.wait()


def together(rows: Sequence[Row]) -> Row:
    """The shares of a target as one."""
    whole = Found(rows[0].found.target)
    for row in rows:
        found = row.found
        whole.calls += found.calls
        whole.refused += found.refused
        whole.crashes += found.crashes
        whole.wrong += found.wrong
        whole.edges |= found.edges
        whole.grown += found.grown
        whole.failures += found.failures
    return Row(whole, sum(row.seconds for row in rows), max(row.peak_mb for row in rows))


def table(rows: Sequence[Row]) -> str:
    """The figures of every target and of all."""
    head = (
        "target",
        "calls",
        "refused",
        "lines",
        "edges",
        "crashes",
        "wrong values",
        "CPU s",
        "peak MB",
    )
    cells = [head]
    for found, seconds, peak in (*rows, together(rows)):
        guided_by = [f"{found.lines:,}", f"{len(found.edges):,}"] if found.edges else ["-", "-"]
        name = "all" if len(cells) > len(rows) else found.target
        cells.append(
            (
                name,
                f"{found.calls:,}",
                f"{found.refused:,}",
                *guided_by,
                f"{found.crashes:,}",
                f"{found.wrong:,}",
                f"{seconds:.0f}",
                f"{peak:.0f}",
            )
        )
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )


def report(rows: Sequence[Row], folder: Path) -> None:
    """Failing inputs as files, with what went wrong and how to see it again."""
    for row in rows:
        for number, failure in enumerate(row.found.failures, 1):
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / f"{row.found.target.replace(' ', '-').replace(',', '')}-{number}"
            file.write_bytes(failure.data)
            print(
                f"{failure.kind}: {failure.message[:500]}\n  again: {sys.executable} {sys.argv[0]}"
                f" --target {row.found.target!r} --repeat {file}"
            )


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calls", type=int, default=CALLS, help="of all chosen targets together")
    parser.add_argument("--target", action="append", default=[], help="a part of a target's name")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="a file for the figures")
    parser.add_argument("--failures", type=Path, default=Path("build/fuzz"))
    parser.add_argument(
        "--repeat", type=Path, help="an input that failed: one call, with its trace"
    )
    parser.add_argument("--work", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    given = options()
    if given.work:
        work([Share(*share, Path(into)) for *share, into in json.loads(given.work)])
        return 0
    found = chosen(given.target)
    if given.repeat:
        print(found[0].run(given.repeat.read_bytes()))
        return 0
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        by_target: dict[str, list[Row]] = {}
        parts = shares(found, given.calls, given.seed, given.workers, Path(folder))
        for row in run(parts):
            by_target.setdefault(row.found.target, []).append(row)
            if len(by_target[row.found.target]) == given.workers:
                print(table([together(by_target[row.found.target])]).splitlines()[1], flush=True)
    rows = [together(by_target[target.name]) for target in found]
    whole = together(rows).found
    print(
        f"\n{table(rows)}\n{whole.calls:,} calls in {(time.time() - began) / 60:.0f} minutes: "
        f"{whole.crashes} crashes, {whole.wrong} wrong values"
    )
    report(rows, given.failures)
    if given.json:
        given.json.write_text(
            json.dumps(
                {
                    "seed": given.seed,
                    "targets": [
                        {
                            "target": f.target,
                            "calls": f.calls,
                            "refused": f.refused,
                            "lines": f.lines,
                            "edges": len(f.edges),
                            "crashes": f.crashes,
                            "wrong": f.wrong,
                            "cpu_s": round(s, 1),
                            "peak_mb": round(peak, 1),
                        }
                        for f, s, peak in rows
                    ],
                },
                indent=1,
            )
            + "\n"
        )
    return bool(whole.crashes or whole.wrong)


if __name__ == "__main__":
    raise SystemExit(main())
