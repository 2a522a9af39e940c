"""The lines of a large JSONL file in groups, in memory that holds numbers and no lines."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

from tppo.store.fingerprints import Fingerprints
from tppo.store.jsonl import Line, bounded_lines, parse_object


def grouped_lines(path: Path, key: Callable[[Line], str]) -> Iterator[Line]:
    """The lines of a file that is not compressed, those of one key one after another.

    Groups come by their first line, and the lines of a group in the order of the file.
    Errors: DataError naming file and line, and field where `key` does.
    """
    groups, offset = Fingerprints(), 0
    group, start, numbers = array("q"), array("q"), array("q")
    with open(path, "rb") as file:
        for number, raw in enumerate(bounded_lines(file, path), start=1):
            if raw.strip():
                line = Line(path, number, parse_object(path, number, raw))
                group.append(groups.setdefault(key(line), len(groups)))
                start.append(offset)
                numbers.append(number)
            offset += len(raw)
        for i in sorted(range(len(group)), key=group.__getitem__):  # stable: in the file's order
            file.seek(start[i])
            yield Line(path, numbers[i], parse_object(path, numbers[i], file.readline()))
