"""AOL 2006 and logs like it: tab-separated AnonID, Query, QueryTime, ItemRank, ClickURL.

A row is a search, or a click on a result of the search that it repeats.  The rows of a user stand
together.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from tppo.errors import DataError, short
from tppo.sessions.session import Event, Session, collapse, held
from tppo.store.fingerprints import Fingerprints
from tppo.store.jsonl import BadRows, decode_line, read_lines

COLUMNS = ("AnonID", "Query", "QueryTime", "ItemRank", "ClickURL")
REMOVED = "-"  # AOL's mark of a query that was taken out
# pandas and its like read a column of whole numbers with gaps as floats, and write gaps so:
MISSING = ("nan", "<na>", "na", "n/a", "none", "null")
_RANK = re.compile(rf"(\d+(\.0*)?|{'|'.join(MISSING)})", re.ASCII | re.IGNORECASE)


class _Row(NamedTuple):
    number: int
    user: str
    query: str
    time: datetime
    url: str


@dataclass
class _Search:
    """A query and the clicks that followed it."""

    query: str
    time: datetime
    clicks: list[_Row]


def read_aol(
    path: Path, gap_minutes: float | None, targets: int, left_out: Counter[str], bad: BadRows
) -> Iterator[Session]:
    """Sessions of users: a pause of more than `gap_minutes` ends one; the newest searches are its
    targets, the earlier ones and their clicks its history.  Holds the rows of one user at a time.

    Raises DataError naming line and column, also for a user whose rows do not stand together.
    """
    gap = math.inf if gap_minutes is None else 60 * gap_minutes
    users = Fingerprints()
    empty = True
    for user, group in groupby(_rows(path, left_out, bad), key=lambda row: row.user):
        empty = False
        with bad:
            rows = held(group, lambda row: len(row.query) + len(row.url),
                        f"{path}: column 'AnonID': {short(user)} has")  # fmt: skip
            first = rows[0].number
            rows.sort(key=lambda row: row.time)
            if not users.add(user):
                raise DataError(
                    f"{path}: line {first}: column 'AnonID': was {user!r} again after other "
                    f"users, expected the rows of a user together (sort the file by user)"
                )
            yield from _user_sessions(user, rows, gap, targets, left_out)
    if empty:
        raise DataError(f"{path}: no row with a query, expected the columns {' '.join(COLUMNS)}")


def _user_sessions(
    user: str, rows: Sequence[_Row], gap: float, targets: int, left_out: Counter[str]
) -> Iterator[Session]:
    """The sessions in the rows of one user, which are in the order of time."""
    for number, part in enumerate(_sessions(rows, gap), start=1):
        searches = _searches(part)
        if len(searches) <= targets:
            left_out[f"session with fewer than {targets + 1} different searches"] += 1
            continue
        yield Session(
            id=f"aol-{user}-{number}",
            user=f"aol-{user}",
            source="aol",
            profile=(),
            history=tuple(_events(searches[:-targets])),
            targets=tuple(search.query for search in searches[-targets:]),
        )


def _rows(path: Path, left_out: Counter[str], bad: BadRows) -> Iterator[_Row]:
    for number, raw in enumerate(read_lines(path), start=1):
        with bad:
            line = decode_line(path, number, raw).rstrip("\r\n")
            fields = line.split("\t")
            if not line.strip() or fields[0] == COLUMNS[0]:
                continue
            row = _row(path, number, fields)
            if row.query in ("", REMOVED):
                left_out["row without a query"] += 1
            else:
                yield row


def _row(path: Path, number: int, fields: list[str]) -> _Row:
    def error(column: int, expected: str) -> DataError:
        return DataError(
            f"{path}: line {number}: column {column + 1} '{COLUMNS[column]}': "
            f"was {short(fields[column])}, expected {expected}"
        )

    if len(fields) not in (3, 5):
        raise DataError(
            f"{path}: line {number}: {len(fields)} columns, expected 5 separated by tabs "
            f"({' '.join(COLUMNS)}), or the first 3"
            + ("; is the first an index of pandas? to_csv(..., index=False)" * (len(fields) == 6))
        )
    user, query, time, rank, url = [field.strip() for field in (*fields, "", "")[:5]]
    if not user:
        raise error(0, "a user")
    try:
        when = datetime.fromisoformat(time)
    except ValueError:
        raise error(2, "a time as 2006-03-01 07:17:12") from None
    if when.tzinfo is not None:
        raise error(2, "a time without a zone, as 2006-03-01 07:17:12")
    if rank and not rank.isdecimal() and not _RANK.fullmatch(rank):
        raise error(3, "a whole number or nothing")
    url = "" if len(url) <= 4 and url.casefold() in MISSING else collapse(url)
    return _Row(number, collapse(user), collapse(query), when, url)


def _sessions(rows: Sequence[_Row], gap: float) -> Iterator[list[_Row]]:
    part = [rows[0]]
    for row in rows[1:]:
        if (row.time - part[-1].time).total_seconds() > gap:
            yield part
            part = []
        part.append(row)
    yield part


def _searches(rows: Sequence[_Row]) -> list[_Search]:
    """Rows of one query in a row are one search: a row a click, a row a page of results."""
    searches: list[_Search] = []
    for row in rows:
        if not searches or searches[-1].query != row.query:
            searches.append(_Search(row.query, row.time, []))
        if row.url:
            searches[-1].clicks.append(row)
    return searches


def _events(searches: Sequence[_Search]) -> Iterator[Event]:
    for search in searches:
        yield Event("search", search.query, str(search.time), len(search.clicks))
        for click in search.clicks:
            yield Event("click", click.url, str(click.time))
