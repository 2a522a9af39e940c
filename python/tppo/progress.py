"""Say what is going on: a live bar on a terminal, otherwise a plain line every two seconds.

Everything goes to stderr, so that stdout stays for results; under torchrun only rank 0 speaks.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:  # loaded where something is drawn: a method in somebody's script draws nothing
    from rich.progress import Progress, TaskID

T = TypeVar("T")

INTERVAL_S = 2.0
_here = threading.local()


def say(text: str) -> None:
    """One line for the reader, at once; it does not break a bar that is on the screen."""
    if _silent():
        return
    if _live.progress is not None:
        _live.progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
    else:
        try:
            print(text, file=sys.stderr, flush=True)
        except BrokenPipeError:  # nobody reads on; that is no reason to stop what is under way
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


@contextmanager
def silent() -> Iterator[None]:
    """A block in which this thread says nothing and draws no bar."""
    before, _here.silent = getattr(_here, "silent", False), True
    try:
        yield
    finally:
        _here.silent = before


def warn(text: str) -> None:
    """`say` in red where the terminal has colours."""
    if not _silent():
        from rich.console import Console

        Console(stderr=True).print(text, style="bold red", markup=False, highlight=False,
                                   soft_wrap=True)  # fmt: skip


@cache
def say_once(text: str) -> None:
    """`say`, but not what this process has said so before."""
    say(text)


def track(iterable: Iterable[T], description: str, total: int | None = None) -> Track[T]:
    """Iterate and show how far, how fast, how long still; `.note(text)` adds the latest figure."""
    return Track(iterable, description, total)


@contextmanager
def status(description: str, total: int | None = None) -> Iterator[Bar]:
    """Show that something is going on for as long as the block takes."""
    bar = Bar(description, total)
    try:
        yield bar
    finally:
        bar.close()


class Track(Generic[T]):
    """An iterable that reports on itself."""

    def __init__(self, iterable: Iterable[T], description: str, total: int | None) -> None:
        self.iterable, self.description = iterable, description
        length = getattr(iterable, "__len__", None)
        self.total = length() if total is None and length is not None else total
        self.bar: Bar | None = None

    def __iter__(self) -> Iterator[T]:
        with status(self.description, self.total) as self.bar:
            for item in self.iterable:
                yield item
                self.bar.advance()

    def note(self, text: str) -> None:
        """Show a short text, such as the current loss, beside the figures."""
        if self.bar is not None:
            self.bar.note(text)


class Bar:
    """One piece of work: on a terminal a line of the live display, else a thread that prints.

    A thread and not the loop itself, because a step that takes a minute must not be silent.
    """

    def __init__(self, description: str, total: int | None = None) -> None:
        self.description, self.total, self.count, self.text = description, total, 0, ""
        self.before = 0  # of `count`, done by an earlier process
        self.start = time.monotonic()
        self.closed = threading.Event()
        self.quiet = _silent()
        self.live = not self.quiet and sys.stderr.isatty()
        if self.live:
            self.task = _live.add(self)
        elif not self.quiet:
            self.thread = threading.Thread(target=self._print_lines, daemon=True)
            self.thread.start()

    def advance(self, n: int = 1) -> None:
        """Count n more pieces as done."""
        self.count += n
        if self.live:
            _live.update(self)

    def resume(self, n: int) -> None:
        """Begin after the n pieces of an earlier process, which say nothing of this one's rate."""
        self.before = n
        self.advance(n)

    def note(self, text: str) -> None:
        """Replace the short text beside the figures."""
        self.text = text
        if self.live:
            _live.update(self)

    def close(self) -> None:
        """End the display; work that took long enough to be shown gets a closing line."""
        if self.closed.is_set():
            return
        self.closed.set()
        if self.live:
            _live.remove(self)
        elif not self.quiet:
            self.thread.join()
        if time.monotonic() - self.start >= INTERVAL_S:
            say(self.line())

    def _print_lines(self) -> None:
        while not self.closed.wait(INTERVAL_S):
            say(self.line())

    def line(self) -> str:
        """`sft 120/400 (30 %) 12.3/s, 23 s left: loss 1.234`"""
        seconds = time.monotonic() - self.start
        parts = [self.description]
        if self.total is not None:
            share = f" ({100 * self.count // self.total} %)" if self.total else ""
            parts.append(f"{self.count}/{self.total}{share}")
        elif self.count:
            parts.append(str(self.count))
        done = self.count - self.before
        if done and seconds > 0:
            parts.append(f"{done / seconds:.3g}/s,")
        if done and self.total and self.count < self.total and not self.closed.is_set():
            parts.append(f"{_duration(seconds / done * (self.total - self.count))} left")
        else:
            parts.append(_duration(seconds))
        return " ".join(parts) + (f": {self.text}" if self.text else "")


class _Live:
    """The one live display of a terminal, on the screen while at least one bar is open."""

    def __init__(self) -> None:
        self.progress: Progress | None = None
        self.open = 0

    def add(self, bar: Bar) -> TaskID:
        if self.progress is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[figures]}", markup=False),
            )
            self.progress = Progress(*columns, console=Console(stderr=True), transient=True)
            self.progress.start()
        self.open += 1
        return self.progress.add_task(bar.description, total=bar.total, figures="")

    def update(self, bar: Bar) -> None:
        figures = bar.line().removeprefix(bar.description).strip()
        assert self.progress is not None
        self.progress.update(bar.task, completed=bar.count, figures=figures)

    def remove(self, bar: Bar) -> None:
        assert self.progress is not None
        self.progress.remove_task(bar.task)
        self.open -= 1
        if self.open == 0:
            self.progress.stop()
            self.progress = None


_live = _Live()


def _silent() -> bool:
    if getattr(_here, "silent", False):
        return True
    # RANK alone says nothing: without WORLD_SIZE no torchrun started this process.
    return "WORLD_SIZE" in os.environ and os.environ.get("RANK", "0") != "0"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes} min {rest:02d} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02d} min"
    )
