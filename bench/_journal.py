"""The file on which gpu-check and the processes that it starts write what they find.

One JSON object a line, in one write and on disk before the next thing begins, so that whatever
ends a process, or the machine, leaves what came before. A process says what it is about to try
(`trying`) and what became of it (`unit`); where it dies between the two, the parent knows at what
(`unfinished`), says so (`broken`), and starts it again: it then goes on behind that point.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]
CONTEXT_LOST = 75  # exit status of a process whose CUDA context is of no more use


class Journal:
    """Appends to one file; reading takes the records of all processes."""

    def __init__(self, path: Path):
        self.path = path

    def add(self, kind: str, **fields: Any) -> None:
        """One record, on disk when this returns."""
        record = {"kind": kind, "pid": os.getpid(), "at": round(time.time(), 2), **fields}
        line = f"\n{json.dumps(record)}\n"  # behind a line that was cut off, a line of its own
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def records(self) -> list[Record]:
        """All that are whole."""
        found = []
        for line in self.path.read_bytes().splitlines() if self.path.exists() else ():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue  # empty, or cut off by what ended its writer
        return found

    def of(self, kind: str, **fields: Any) -> list[Record]:
        """The records of one kind that have these values."""
        return [r for r in self.records() if r["kind"] == kind
                and all(r.get(k) == v for k, v in fields.items())]

    def unfinished(self, pid: int) -> Record | None:
        """What a process was trying when it ended; None where it had finished everything."""
        tried = None
        for record in self.records():
            if record["pid"] == pid and record["kind"] == "trying":
                tried = record
            elif record["pid"] == pid and record["kind"] == "unit":
                tried = None
        return tried


def row_key(row: Record) -> tuple[str, str, str]:
    """What a row is of."""
    return row["op"], row["shape"], row["implementation"]


def rows_of(records: Iterable[Record]) -> list[Record]:
    """Rows, each once: one with numbers before one without, else the first of them.

    A case may be measured in two goes, its operator in both: what the second is compared with joins
    what the first one was.
    """
    found: dict[tuple, Record] = {}
    for record in records:
        if record["kind"] != "row":
            continue
        row = {k: v for k, v in record.items() if k not in ("kind", "pid", "at")}
        before = found.get(row_key(row))
        if before is None or (before["median_us"] is None and row["median_us"] is not None):
            found[row_key(row)] = row
        elif row["median_us"] is not None:
            before["speed_up"] = {**row["speed_up"], **before["speed_up"]}
    return list(found.values())


def last_by(records: Iterable[Record], kind: str, *keys: str) -> list[Record]:
    """The latest record of a kind for each value of the keys, in the order of the first ones."""
    found = {tuple(r[k] for k in keys): r for r in records if r["kind"] == kind}
    return [{k: v for k, v in r.items() if k not in ("kind", "pid", "at")}
            for r in found.values()]


def results_of(records: list[Record]) -> dict[str, Any]:
    """What a file of results holds, from the records of one journal."""
    machines = last_by(records, "machine")
    return {**({"machine": machines[-1]} if machines else {}),
            "rows": rows_of(records),
            "steps": last_by(records, "step", "model", "groups", "prompt", "response", "group",
                             "prefix"),
            "rollouts": last_by(records, "rollout", "model", "prompts", "response", "engine"),
            "first_touch": [u for u in last_by(records, "unit", "part", "unit")
                            if u["part"] == "first-touch"],
            "kernels": last_by(records, "kernel", "name"),
            "checks": last_by(records, "part", "name")}


def replace_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    with new.open("rb") as file:
        os.fsync(file.fileno())
    new.replace(path)
