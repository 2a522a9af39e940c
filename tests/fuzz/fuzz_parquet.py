"""Parquet files of AmazonQAC, with columns of any type and bytes that are not UTF-8.

An input is a byte, and either rows as JSON, of which a file is written, or the bytes of a file.
"""

import json
from typing import Any

import pyarrow
import pyarrow.parquet
from files import folder
from fuzz_readers import read
from guided import REFUSED, Target, Wrong

from tppo.sessions.readers import ReadConfig
from tppo.sessions.session import read_sessions, write_sessions


def table_of(rows: Any, way: int) -> pyarrow.Table | None:
    try:
        table = pyarrow.Table.from_pylist(rows)
        if way & 1:  # texts that nobody has checked
            for name in table.column_names:
                if table[name].type == pyarrow.string():
                    raw = [
                        None if x is None else x.encode().replace(b"%", b"\xff")
                        for x in table[name].to_pylist()
                    ]
                    texts = pyarrow.array(raw, pyarrow.binary()).view(pyarrow.string())
                    table = table.set_column(table.column_names.index(name), name, texts)
        return table
    except (pyarrow.ArrowException, TypeError, AttributeError, OverflowError, ValueError):
        return None


def call(data: bytes) -> str | None:
    way, path = data[0] if data else 0, folder() / "log.parquet"
    if data[1:5] == b"PAR1":
        path.write_bytes(data[1:])
    else:
        try:
            rows = [row for row in json.loads(data[1:]) if isinstance(row, dict)]
        except (ValueError, RecursionError, TypeError):
            return REFUSED
        table = table_of(rows, way)
        if table is None:
            return REFUSED
        try:
            pyarrow.parquet.write_table(table, path, row_group_size=2)
        except pyarrow.ArrowException:
            return REFUSED
    stop, sessions, error = read(path, ReadConfig(format="qac"))
    skip, kept, other = read(path, ReadConfig(format="qac", on_bad_row="skip"))
    if not error and (kept != sessions or other or skip is None or skip.bad.count):
        raise Wrong(f"skip gives {kept}, {other!r}, stop {sessions}")
    if stop and not error and way & 2:
        write_sessions(folder() / "again.jsonl", kept)
        if kept and read_sessions(folder() / "again.jsonl") != kept:
            raise Wrong(f"other sessions when they are read again: {kept}")
    return REFUSED if error else None


def examples() -> list[bytes]:
    rows = [
        {
            "session_id": "s",
            "query_id": i,
            "final_search_term": f"boots% {i}",
            "prefix": "bo",
            "search_time": "2023-09-01 10:00:00",
            "prefixes": ["b", "bo"],
            "past_search_terms": [["shoes", "2023-09-01"], ["red shoes", " "]],
        }
        for i in range(3)
    ]
    plain = [
        {"session_id": i // 2, "final_search_term": "caf\u00e9", "search_time": i} for i in range(4)
    ]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(plain), folder() / "example.parquet", compression="none"
    )
    whole = b"\x02" + (folder() / "example.parquet").read_bytes()
    return [
        bytes([way]) + json.dumps(given).encode() for given in (rows, plain) for way in (0, 1, 2, 3)
    ] + [whole]


TARGETS = [Target("reader of qac", call, 15_000, examples, ("tppo/sessions/", "tppo/store/jsonl"))]
