"""Sim4IA-Bench, Task A: a CSV row a search, the rows of a session together.

Either without a header, 8 columns: number in the session, user, session, query, time, results,
search id, clicks as `[('doc', datetime.datetime(...), 'works'), ...]`; or with a header that names
at least session_id, query and date.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from tppo.errors import DataError, short
from tppo.sessions.session import Event, Session, collapse, held
from tppo.store.fingerprints import Fingerprints
from tppo.store.jsonl import LONGEST, BadRows, decode_line, read_lines

COLUMNS = ("row", "user", "session_id", "query", "date", "results", "search_id", "clicks")
NEEDED = ("session_id", "query", "date")
_CLICK = re.compile(r"\(\s*(?:'[^']*'|\"[^\"]*\"|\d+)\s*,\s*datetime\.datetime\(")


class _Row(NamedTuple):
    number: int
    session: str
    event: Event


def read_sim4ia(path: Path, left_out: Counter[str], bad: BadRows) -> Iterator[Session]:
    """A session's last search is the target, the earlier ones are the history.

    Searches of one query in a row count as one, with the clicks of all.  The data hides its users,
    so each session is a user.

    Raises DataError naming line and column.
    """
    seen = Fingerprints()
    for name, group in groupby(_rows(path, left_out, bad), key=lambda row: row.session):
        with bad:
            rows = held(group, lambda row: len(row.event.text),
                        f"{path}: column 'session_id': {short(name)} has")  # fmt: skip
            if not seen.add(name):
                raise DataError(
                    f"{path}: line {rows[0].number}: column 'session_id': was {name!r} again after "
                    f"other sessions, expected the rows of a session together"
                )
            searches = _merged([row.event for row in rows])
            if len(searches) < 2:
                left_out["session with fewer than 2 different searches"] += 1
                continue
            yield Session(
                id=f"sim4ia-{name}",
                user=f"sim4ia-{name}",
                source="sim4ia",
                profile=(),
                history=tuple(searches[:-1]),
                targets=(searches[-1].text,),
            )


def _merged(events: list[Event]) -> list[Event]:
    merged: list[Event] = []
    for event in events:
        if merged and merged[-1].text == event.text:
            first = merged.pop()
            clicks = [c for c in (first.clicks, event.clicks) if c is not None]
            event = first if not clicks else Event("search", first.text, first.time, sum(clicks))
        merged.append(event)
    return merged


def _rows(path: Path, left_out: Counter[str], bad: BadRows) -> Iterator[_Row]:
    columns: tuple[str, ...] = ()
    for number, values in _records(path, bad):
        if not columns:
            header = tuple(value.strip().lower() for value in values)
            columns = header if set(NEEDED) <= set(header) else COLUMNS
            if columns is header:
                continue
        with bad:
            if len(values) != len(columns):
                raise DataError(
                    f"{path}: line {number}: {len(values)} columns, expected {len(columns)}: "
                    f"{', '.join(columns)}"
                )
            row = _row(path, number, dict(zip(columns, values, strict=True)))
            if row.event.text:
                yield row
            else:
                left_out["row without a query"] += 1
    if not columns:
        raise DataError(f"{path}: empty, expected CSV with the columns {', '.join(COLUMNS)}")


def _row(path: Path, number: int, values: dict[str, str]) -> _Row:
    def error(column: str, expected: str) -> DataError:
        return DataError(
            f"{path}: line {number}: column '{column}': "
            f"was {short(values[column])}, expected {expected}"
        )

    session, time = collapse(values["session_id"]), values["date"].strip()
    if not session:
        raise error("session_id", "a session")
    try:
        datetime.fromisoformat(time)
    except ValueError:
        raise error("date", "a time as 2025-01-10 20:55:48") from None
    clicks = None
    if "clicks" in values:
        given = values["clicks"].strip() or "[]"
        if not (given.startswith("[") and given.endswith("]")):
            raise error("clicks", "a list of (document, time, kind)")
        clicks = len(_CLICK.findall(given))
    return _Row(number, session, Event("search", collapse(values["query"]), time, clicks))


def _records(path: Path, bad: BadRows) -> Iterator[tuple[int, list[str]]]:
    """The records of a CSV file, each with the line where it begins."""
    size = [0]  # of the record so far, whose cells may hold line breaks
    reader = csv.reader(_lines(path, bad, size), strict=True)
    number = 1
    while True:
        with bad:
            size[0] = 0
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:  # the next record begins at the next line
                raise DataError(f"{path}: line {number}: not CSV: {error}") from None
            finally:
                begins, number = number, reader.line_num + 1
            if values:
                yield begins, values


def _lines(path: Path, bad: BadRows, size: list[int]) -> Iterator[str]:
    """The lines of the file; one that is not UTF-8 and may be left out still counts as a line."""
    for number, raw in enumerate(read_lines(path), start=1):
        text = "\n"
        with bad:
            text = decode_line(path, number, raw)
        size[0] += len(text)
        if size[0] > LONGEST:
            raise DataError(f"{path}: line {number}: a record of more than {LONGEST >> 20} MB, "
                            "expected shorter ones: is a quote missing?")  # fmt: skip
        yield text
