"""Calls with hostile inputs: drawn from a seed, or grown from inputs that reached new lines.

A target takes bytes. Where it has `examples`, an input is one of them or a changed copy of an
input that had reached an edge, a pair of lines that ran one after the other, which none before had
(`sys.settrace`; only files of `traced` are watched). Else it is eight random bytes, which the
target takes for a seed. Nothing beyond Python is needed: atheris has no wheel for every Python
that we support, ends its process at the first failing input, and knows nothing of JSON, of which
most of these inputs consist.

A call is a crash where it raises anything, or takes more than `SECONDS` of processor time; it is a
wrong value where it raises `Wrong`. A target itself catches the error that is documented for bad
input, holds its message to what it promises, and returns `REFUSED`.
"""

import contextlib
import io
import random
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mutations import changed

REFUSED = "refused"
SECONDS = 20.0
SOUND = 0.7  # of the changed inputs are changed copies of inputs that were not refused
KEPT = 20  # failing inputs of a target that are kept, of different places in the code


class Wrong(AssertionError):
    """A result that is not the right one, or an error that does not say what it must."""


class Hang(BaseException):
    """A call that does not come to an end."""


class Target(NamedTuple):
    """What is called."""

    name: str
    run: Callable[[bytes], Any]
    """Returns REFUSED for an input that gets the documented error; raises where it must not."""
    share: int
    """How many of a million calls."""
    examples: Callable[[], Sequence[bytes]] | None = None
    """Inputs to begin with; None: an input is a seed."""
    traced: tuple[str, ...] = ()
    """Parts of the paths of the files whose lines count as reached."""
    words: Sequence[bytes] = ()
    """What a change may put in."""


class Failure(NamedTuple):
    """A call that failed."""

    kind: str
    """crash or wrong"""
    message: str
    data: bytes


@dataclass
class Found:
    """What the calls of a target have shown."""

    target: str
    calls: int = 0
    refused: int = 0
    crashes: int = 0
    wrong: int = 0
    edges: set[tuple[Any, ...]] = field(default_factory=set)
    grown: int = 0
    """Inputs that reached something new."""
    failures: list[Failure] = field(default_factory=list)
    places: set[str] = field(default_factory=set)

    def add(self, failure: Failure, place: str) -> None:
        """Count a failure, and keep the first of each place in the code."""
        self.crashes += failure.kind == "crash"
        self.wrong += failure.kind == "wrong"
        if place not in self.places and len(self.failures) < KEPT:
            self.failures.append(failure)
        self.places.add(place)

    @property
    def lines(self) -> int:
        """How many lines were reached."""
        return len({edge[1:] for edge in self.edges})


class Coverage:
    """Collects the edges that run while it is entered, in files whose path holds a part given."""

    def __init__(self, traced: Sequence[str]):
        self.traced = traced
        self.edges: set[tuple[Any, ...]] = set()
        self._names: dict[Any, str | None] = {}

    def __enter__(self) -> "Coverage":
        self._before = sys.gettrace()
        if self.traced:
            sys.settrace(self._call)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(self._before)

    def _call(self, frame: Any, event: str, argument: Any) -> Any:
        code = frame.f_code
        if code not in self._names:
            file = code.co_filename
            watched = any(part in file for part in self.traced)
            self._names[code] = file.rpartition("/")[2] if watched else None
        name = self._names[code]
        if name is None:
            return None
        before, edges = 0, self.edges

        def line(frame: Any, event: str, argument: Any) -> Any:
            nonlocal before
            if event == "line":
                edges.add((before, name, frame.f_lineno))
                before = frame.f_lineno
            return line

        return line


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises Hang in the block after so many seconds of processor time."""

    def stop(number: int, frame: Any) -> None:
        raise Hang(f"more than {seconds:g} s of processor time")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def attempt(target: Target, data: bytes) -> tuple[Failure | None, str, bool]:
    """One call: how it failed, where in the code, and whether its input was refused."""
    try:
        with limited(SECONDS):
            return None, "", target.run(data) == REFUSED
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit, MemoryError and Hang are failures too
        frames = traceback.extract_tb(error.__traceback__)
        inner = [f for f in frames if "/tppo" in f.filename] or frames
        place = f"{type(error).__name__} at {inner[-1].filename}:{inner[-1].lineno}"
        kind = "wrong" if isinstance(error, Wrong) else "crash"
        asked = next((f.lineno for f in reversed(frames) if "/fuzz/" in f.filename), 0)
        text = str(error) if kind == "wrong" else f"{place}: {str(error)[:300]}"
        return Failure(kind, f"{target.name}: {text}", data), f"{place} {asked}", False


def search(
    target: Target, calls: int, seed: int = 0, before: Callable[[bytes], None] | None = None
) -> Found:
    """So many calls of a target; the same ones for the same seed.

    before: gets each input before the call, so that it is known where the process dies of it.
    """
    rng, found = random.Random(f"{target.name} {seed}"), Found(target.name)
    coverage = Coverage(target.traced)
    corpus: list[bytes] = []
    sound: list[bytes] = []  # those of them that were not refused
    first = list(target.examples()) if target.examples else []
    with contextlib.redirect_stderr(io.StringIO()) as told:
        for number in range(calls):
            if target.examples is None:
                data = rng.randbytes(8)
            elif number < len(first):
                data = first[number]
            else:
                pool = sound if sound and rng.random() < SOUND else corpus or first
                data = changed(rng, pool, target.words)
            if before is not None:
                before(data)
            known = len(coverage.edges)
            with coverage:
                failure, place, refused = attempt(target, data)
            found.refused += refused
            if failure is not None:
                found.add(failure, place)
            elif target.examples and (len(coverage.edges) > known or number < len(first)):
                corpus.append(data)
                if not refused:
                    sound.append(data)
            told.seek(0)
            told.truncate()
    found.calls, found.edges, found.grown = calls, coverage.edges, len(corpus)
    return found
