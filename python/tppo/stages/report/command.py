"""`tppo report`, and the thread that keeps report.html fresh while a command works in the folder.

This file loads no torch.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tppo.errors import DataError
from tppo.flags import parse
from tppo.progress import say, say_once
from tppo.settings import FilePath, section
from tppo.stages.report.found import sources
from tppo.stages.report.page import write_report
from tppo.store.disk import space_for

ABOUT = ("Write report.html into a run folder, finished or under way: the result, curves of every "
         "stage, answers of SFT and TPPO token by token, settings, versions, time and files. "
         "A command that works in a run folder writes it by itself.")  # fmt: skip
EVERY_S = 5.0  # between two looks whether a file has changed, at least
WRITING = 0.05  # share of the time, at most, that is spent on the page while other work goes on


@section
class ReportOptions:
    """Flags of `tppo report`."""

    out: FilePath = Path("runs/default")
    """The run folder; report.html is written into it."""
    watch: bool = False
    """Write the page again whenever a file of the run changes, until Ctrl-C; a page of a run that
    goes on loads itself again in the browser."""


def main(arguments: list[str]) -> None:
    """Entry point of `tppo report`."""
    options = parse(ReportOptions, "tppo report", ABOUT, arguments)
    with space_for(options.out, "report.html", "Make room and run the same command again."):
        print(write_report(options.out))
    seen = sources(options.out)
    while options.watch:
        time.sleep(EVERY_S)
        if (now := sources(options.out)) != seen:
            seen = now
            say(f"report: {write_report(options.out)}")


@contextmanager
def kept_fresh(out: Path) -> Iterator[None]:
    """Write report.html of a run folder whenever one of its files has changed while the block runs,
    and once more behind it, however it ends.

    A page that cannot be written is one line, and never ends the run.
    """
    ended = threading.Event()
    arguments = out, ended, sources(out)
    thread = threading.Thread(target=_follow, args=arguments, daemon=True, name="report")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        _try(out)


def _follow(out: Path, ended: threading.Event, seen: object) -> None:
    wait_s = EVERY_S
    while not ended.wait(wait_s):
        if (now := sources(out)) != seen:
            seen, start = now, time.monotonic()
            _try(out)  # which reads all rows: late in a long training that takes seconds
            wait_s = max(EVERY_S, (time.monotonic() - start) / WRITING)


def _try(out: Path) -> None:
    if not sources(out):  # no stage has begun
        return
    try:
        write_report(out)
    except (DataError, OSError, KeyError, TypeError) as error:
        say_once(f"WARNING: {out}: report.html could not be written: {error!r}")
