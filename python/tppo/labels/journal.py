"""A journal of what people have said: a line each, on disk before the next question is asked.

A later line about the same thing by the same person replaces the earlier one; `undone` takes it
back.  A line that was cut off by a kill is passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

from pydantic import TypeAdapter, ValidationError

from tppo.progress import say
from tppo.store.jsonl import append_line, bounded_lines, is_as_written


class Said(Protocol):
    """What a person said of something."""

    @property
    def id(self) -> str:
        """Of what."""

    @property
    def annotator(self) -> str:
        """Who."""

    def check(self) -> None:
        """Errors: ValueError where it does not fit what it speaks of."""


Kind = TypeVar("Kind", bound=Said)


@dataclass(frozen=True)
class Without:
    """Something that a person left out, or a judgement that he took back."""

    id: str
    annotator: str
    how: Literal["skipped", "undone"]


class Journal(Generic[Kind]):
    """The journal of a run, read and continued.

    kind: what its lines hold, besides `Without`.  line: reads one that holds either.
    """

    def __init__(self, path: Path, kind: type[Kind], line: TypeAdapter[Any]) -> None:
        self.path, self.kind = path, kind
        self._known: dict[tuple[str, str], Kind | Without] = {}  # in the order of judging
        damaged: list[int] = []
        for number, raw in self._lines():
            try:
                if not is_as_written(raw):
                    raise ValueError("the line is not the one that was written")
                found = line.validate_json(raw)
                if isinstance(found, kind):
                    found.check()
            except (ValidationError, ValueError):
                damaged.append(number)
                continue
            self._note(found)
        if damaged:
            say(f"{path}: {len(damaged)} damaged lines are passed over, the first is line "
                f"{damaged[0]}; what they spoke of is asked again")  # fmt: skip

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        if self.path.exists():
            with open(self.path, "rb") as file:
                lines = bounded_lines(file, self.path)
                yield from ((n, line) for n, line in enumerate(lines, 1) if line.strip())

    def __iter__(self) -> Iterator[Kind]:
        """The judgements that stand, the oldest first."""
        return (found for found in self._known.values() if isinstance(found, self.kind))

    def __contains__(self, asked: tuple[str, str]) -> bool:
        """Whether (annotator, id) was judged or left out."""
        return asked in self._known

    def get(self, annotator: str, id: str) -> Kind | None:
        """What a person said of something, if he did."""
        found = self._known.get((annotator, id))
        return found if isinstance(found, self.kind) else None

    def add(self, entry: Kind | Without) -> None:
        """Keep a judgement, on disk first."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append_line(self.path, entry)
        self._note(entry)

    def leave_out(self, stale: Callable[[Kind], bool]) -> int:
        """Judgements of what is not asked about any more stay on the disk, and count for nothing
        here; how many there are.
        """
        found = [entry for entry in self if stale(entry)]
        for entry in found:
            del self._known[entry.annotator, entry.id]
        return len(found)

    def _note(self, entry: Kind | Without) -> None:
        key = entry.annotator, entry.id
        self._known.pop(key, None)
        if not isinstance(entry, Without) or entry.how == "skipped":
            self._known[key] = entry
