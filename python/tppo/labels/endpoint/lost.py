"""The items without a label, in a file beside the cache: which, why, and who lost them.

`{"id", "by": "endpoint"|"judge"|"item", "reason"}`, one JSON object a line. Those that the endpoint
lost are asked again by the next `tppo run`, also where the stage finished without them.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from tppo.errors import DataError
from tppo.labels.endpoint.live import Dropped
from tppo.labels.label import Label
from tppo.progress import say
from tppo.store.jsonl import read_jsonl, write_jsonl


@contextmanager
def recorded(
    results: Generator[Label | Dropped, None, None], path: Path
) -> Iterator[Iterator[Label]]:
    """The labels among the results; when the block ends, what was dropped is on disk.

    After an error the record of an earlier call stays in it: those items may not have been asked.
    """
    dropped: dict[str, dict[str, str]] = {}

    def labels() -> Iterator[Label]:
        for result in results:
            if isinstance(result, Label):
                yield result
            else:
                row = {"id": result.id, "by": result.by, "reason": result.reason}
                dropped[result.id] = row

    with closing(results):  # no question stays open after an error
        try:
            yield labels()
        except BaseException:
            _write(path, {**_read(path), **dropped})
            raise
    _write(path, dropped)


def lost_by_endpoint(path: Path) -> int:
    """How many items of the record the endpoint lost."""
    return sum(row.get("by") == "endpoint" for row in _read(path).values())


def forget(path: Path) -> None:
    """Remove the record, where labels come from no endpoint."""
    path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, dict[str, str]]:
    if not path.exists():
        return {}
    try:
        return {str(line.values.get("id")): line.values for line in read_jsonl(path)}
    except DataError as error:
        say(f"{error}: the items without a label are asked again")
        return {"?": {"id": "?", "by": "endpoint", "reason": "the record is damaged"}}


def _write(path: Path, rows: dict[str, dict[str, str]]) -> None:
    if rows:
        write_jsonl(path, rows.values())
    else:
        forget(path)
