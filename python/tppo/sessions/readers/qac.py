"""AmazonQAC: parquet files of searches, each with the prefixes that were typed.

The test rows hold `past_search_terms`, pairs of a search and its time; in the training rows the
earlier rows of the same session, where they stand together, are the past.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from tppo.errors import DataError, short
from tppo.sessions.session import Event, Session, collapse, held
from tppo.store.fingerprints import Fingerprints
from tppo.store.jsonl import BadRows, is_text

REQUIRED = ("session_id", "final_search_term")
OPTIONAL = ("query_id", "past_search_terms", "prefix", "prefixes", "search_time")
ROWS = 1024  # rows held at a time


class _Row(NamedTuple):
    path: Path
    number: int
    values: dict[str, Any]

    def error(self, column: str, expected: str) -> DataError:
        return DataError(
            f"{self.path}: row {self.number}: column '{column}': "
            f"was {short(self.values[column])}, expected {expected}"
        )

    def text(self, column: str) -> str:
        value = self.values[column]
        if not (is_text(value) or type(value) is int):
            raise self.error(column, "a text that is not blank")
        return collapse(str(value))

    def time(self) -> str | None:
        value = self.values.get("search_time")
        return collapse(str(value)) or None if value is not None else None


def read_qac(path: Path, left_out: Counter[str], bad: BadRows) -> Iterator[Session]:
    """A row's past searches and its prefix are the history, its search is the target.

    Raises DataError naming row and column, or what to install where pyarrow is not.
    """
    first_row = Fingerprints()
    for session, group in groupby(_sound(path, bad), key=lambda row: row.text("session_id")):
        past: list[Event] = []
        rows: list[_Row] = []
        with bad:
            rows = held(group, _characters, f"{path}: column 'session_id': {short(session)} has")
        for row in sorted(rows, key=lambda row: row.time() or ""):
            with bad:
                id, term = _id(row), row.text("final_search_term")
                given = row.values.get("past_search_terms")
                history = past if given is None else list(_past(row, given))
                history = [*history, *_prefix(row, term)]
                earlier = first_row.setdefault(id, row.number)
                if earlier != row.number:
                    expected = f"an id that is used once (row {earlier} has it too)"
                    raise row.error("query_id", expected)
                past = [*past, Event("search", term, row.time())]
                if not history:
                    left_out["row without a past search or a prefix"] += 1
                    continue
                yield Session(
                    id=f"qac-{id}",
                    user=f"qac-{row.text('session_id')}",
                    source="qac",
                    profile=(),
                    history=tuple(history),
                    targets=(term,),
                )


def _sound(path: Path, bad: BadRows) -> Iterator[_Row]:
    """The rows that name their session."""
    for row in _rows(path, bad):
        with bad:
            row.text("session_id")
            yield row


def _rows(path: Path, bad: BadRows) -> Iterator[_Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            f"{path}: reading parquet needs pyarrow: pip install 'tppo-kernels[data]'"
        ) from None
    number = 0
    try:
        with open(path, "rb") as content, pyarrow.parquet.ParquetFile(content) as file:
            columns = file.schema_arrow.names
            for column in REQUIRED:
                if column not in columns:
                    raise DataError(
                        f"{path}: no column '{column}', expected {', '.join(REQUIRED + OPTIONAL)}; "
                        f"it has {', '.join(columns)}"
                    )
            wanted = [column for column in (*REQUIRED, *OPTIONAL) if column in columns]
            for batch in file.iter_batches(batch_size=ROWS, columns=wanted):
                yield from _of_batch(path, number, batch, bad)
                number += batch.num_rows
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        message = " ".join(str(error).split())
        raise DataError(f"{path}: not a sound parquet file: {message}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not number:
        raise DataError(f"{path}: no rows, expected searches")


def _of_batch(path: Path, before: int, batch: Any, bad: BadRows) -> Iterator[_Row]:
    """The rows of a batch behind so many others.  Nobody has checked that their texts are UTF-8, or
    that Python has such a time.
    """
    try:
        found = batch.to_pylist()
    except (ValueError, OverflowError):  # in one of the rows: ask them one by one
        found = None
    for i in range(batch.num_rows):
        number = before + i + 1
        with bad:
            try:
                values = batch.slice(i, 1).to_pylist()[0] if found is None else found[i]
            except (ValueError, OverflowError) as error:
                reason = " ".join(str(error).split())
                raise DataError(
                    f"{path}: row {number}: a value that cannot be read, expected UTF-8: {reason}"
                ) from None
            yield _Row(path, number, values)


def _characters(row: _Row) -> int:
    """About how many characters a row holds."""
    return sum(len(str(value)) for value in row.values.values())


def _id(row: _Row) -> str:
    if row.values.get("query_id") is None:
        return str(row.number)
    return row.text("query_id")


def _past(row: _Row, given: Any) -> Iterator[Event]:
    """Events of [[search, time], ...]."""
    if not isinstance(given, list):
        raise row.error("past_search_terms", "a list of [search, time]")
    for index, entry in enumerate(given):
        fields = list(entry.values()) if isinstance(entry, dict) else entry
        fields = [fields] if isinstance(fields, str) else fields
        if not (isinstance(fields, list) and fields and is_text(fields[0])):
            raise DataError(
                f"{row.path}: row {row.number}: column 'past_search_terms[{index}]': "
                f"was {short(entry)}, expected [search, time]"
            )
        time = collapse(str(fields[1])) if len(fields) > 1 and fields[1] is not None else ""
        yield Event("search", collapse(fields[0]), time or None)


def _prefix(row: _Row, term: str) -> Iterator[Event]:
    """The newest prefix that does not give the whole search away."""
    given = row.values.get("prefixes") or []
    if not isinstance(given, list):
        raise row.error("prefixes", "a list of texts")
    prefixes: Sequence[Any] = [row.values.get("prefix"), *reversed(given)]
    for prefix in prefixes:
        if is_text(prefix) and collapse(prefix).casefold() != term.casefold():
            yield Event("prefix", collapse(prefix))
            return
