"""AmazonQAC: parquet files of searches, each with the prefixes that were typed.

The test rows hold `past_search_terms`, pairs of a search and its time; in the training rows the
earlier rows of the same session, where they stand together, are the past.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tppo.errors import DataError, short
from tppo.sessions.readers.footer import column_sizes
from tppo.sessions.session import Event, Session, collapse, held
from tppo.store.fingerprints import Fingerprints
from tppo.store.jsonl import LONGEST, BadRows, is_text

REQUIRED = ("session_id", "final_search_term")
OPTIONAL = ("query_id", "past_search_terms", "prefix", "prefixes", "search_time")
ROWS = 1024  # rows held at a time, and fewer where they are long
EACH = 8  # bytes of a value beside its text
MOST_BYTES, MOST_VALUES = 1 << 30, 1 << 27  # of a column in a row group, unpacked


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
        with open(path, "rb") as content, _opened(content) as file:
            columns = file.schema_arrow.names
            for column in REQUIRED:
                if column not in columns:
                    raise DataError(
                        f"{path}: no column '{column}', expected {', '.join(REQUIRED + OPTIONAL)}; "
                        f"it has {', '.join(columns)}"
                    )
            wanted = [column for column in (*REQUIRED, *OPTIONAL) if column in columns]
            _check_sizes(path, content, wanted)
            for group in range(file.num_row_groups):  # one after the other: texts in lists that
                # are kept once have no form in which two groups could be one batch
                for batch in file.iter_batches(ROWS, row_groups=[group], columns=wanted):
                    for part in _parts(batch):
                        yield from _of_batch(path, number, part, bad)
                        number += part.num_rows
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        message = " ".join(str(error).split())
        raise DataError(f"{path}: not a sound parquet file: {message}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not number:
        raise DataError(f"{path}: no rows, expected searches")


def _opened(content: BinaryIO) -> Any:
    """A parquet file whose texts are read as they lie there: each of them once, and who has which.

    A text of a megabyte that a thousand rows share takes a kilobyte of the file.
    """
    from pyarrow.parquet import ParquetFile

    schema = ParquetFile(content).schema
    columns = [schema.column(i) for i in range(len(schema))]
    texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"
             and column.logical_type.type in ("STRING", "NONE")]  # fmt: skip
    content.seek(0)
    return ParquetFile(content, read_dictionary=texts)


def _check_sizes(path: Path, content: BinaryIO, wanted: Sequence[str]) -> None:
    """Errors: DataError for a row group of which a column alone would fill the memory."""
    before = content.tell()
    try:
        found = [*column_sizes(content)]
    except ValueError as error:
        raise DataError(f"{path}: not a sound parquet file: {error}") from None
    for group, name, values, nbytes in found:
        if name.partition(".")[0] not in wanted:
            continue
        if nbytes > MOST_BYTES or values > MOST_VALUES or nbytes > LONGEST * max(values, 1):
            raise DataError(
                f"{path}: row group {group + 1}: column '{name}' has "
                f"{nbytes:,} bytes unpacked and {values:,} values, expected at most "
                f"{MOST_BYTES:,} and {MOST_VALUES:,}, and {LONGEST:,} a value: is the file "
                "damaged? Smaller row groups are read as well"
            )
    content.seek(before)


def _parts(batch: Any) -> Iterator[Any]:
    """The rows of a batch, so many together as memory should hold at once, or one."""
    if batch.num_rows < 2 or _weight(batch.columns) <= LONGEST:
        yield batch
        return
    half = batch.num_rows // 2
    yield from _parts(batch.slice(0, half))
    yield from _parts(batch.slice(half))


def _weight(arrays: Sequence[Any]) -> int:
    """About how many bytes the values of columns take, of which each has its own copy of a text."""
    import pyarrow.compute
    from pyarrow import types

    total = 0
    for array in arrays:
        total += EACH * len(array)
        if types.is_dictionary(array.type):
            lengths = pyarrow.compute.binary_length(array.dictionary)
            total += pyarrow.compute.sum(lengths.take(array.indices)).as_py() or 0
        elif types.is_map(array.type):
            total += _weight([array.keys, array.items])
        elif types.is_nested(array.type) and not types.is_union(array.type):
            inner = array.flatten()  # of a struct its fields, of a list what is in the lists
            total += _weight(inner if isinstance(inner, list) else [inner])
        else:
            total += array.nbytes
    return total


def _of_batch(path: Path, before: int, batch: Any, bad: BadRows) -> Iterator[_Row]:
    """The rows of a batch behind so many others.  Nobody has checked that their texts are UTF-8, or
    that Python has such a time.
    """
    if batch.num_rows == 1 and _weight(batch.columns) > LONGEST:
        with bad:
            raise DataError(f"{path}: row {before + 1}: holds more than {LONGEST >> 20} MB, "
                            "expected shorter ones")  # fmt: skip
        return
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
