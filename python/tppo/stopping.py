"""Ctrl-C and SIGTERM: a training finishes its step and saves, everything else ends at once.

A first signal raises `Stopped` where the program is, or, in a block that asked for it, waits until
the block looks at `asked`.  A second one ends the process, even from within a long computation.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from tppo.progress import say

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LAUNCHER_S = 5.0  # torchrun passes on a signal that the terminal has sent to all processes already


class Stopped(KeyboardInterrupt):
    """The user, or the system, wants the program to end; `lost` says what of its work is not kept.

    `code` is the exit status of a program that ends so: 130 after Ctrl-C, 143 after SIGTERM.
    """

    def __init__(self, signum: int, lost: str = "") -> None:
        super().__init__(signum)
        self.signum, self.lost = signum, lost

    @property
    def code(self) -> int:
        return 128 + self.signum

    @property
    def cause(self) -> str:
        """How a user calls the signal."""
        return "Ctrl-C" if self.signum == signal.SIGINT else signal.Signals(self.signum).name


class _State:
    """Of the process: signals are its own, too."""

    asked: int | None = None
    deferred = False
    listening = False


def asked() -> int | None:
    """The signal that asked the program to end, None if none has."""
    return _State.asked


def defer() -> None:
    """From here to the end of the `deferrable` block a first signal waits for `asked`."""
    _State.deferred = True


@contextmanager
def deferrable() -> Iterator[None]:
    """A block that may call `defer`; a signal that has waited until its end stops the program."""
    try:
        yield
    finally:
        _State.deferred = False
    if _State.asked is not None:
        raise Stopped(_State.asked, "nothing is lost")


@contextmanager
def listening() -> Iterator[None]:
    """Handle the signals as this module says; ignored ones (nohup) stay ignored.

    In another thread than the main one, where Python handles no signals, and inside of another
    such block, nothing is changed.
    """
    if _State.listening or threading.current_thread() is not threading.main_thread():
        yield
        return
    _State.asked, _State.deferred, _State.listening = None, False, True
    taken = [s for s in SIGNALS if signal.getsignal(s) not in (signal.SIG_IGN, None)]
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # The system's handler writes to the pipe even while a computation keeps Python from its own.
    earlier_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    earlier = {s: signal.signal(s, _handle) for s in taken}
    watcher = threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        _State.listening = False
        for s, handler in earlier.items():
            signal.signal(s, handler)
        _State.asked = None  # what runs next, in another thread perhaps, was not asked to stop
        signal.set_wakeup_fd(earlier_fd)
        os.close(writer)  # ends the watcher
        watcher.join()
        os.close(reader)


def _handle(signum: int, frame: FrameType | None) -> None:
    if _State.asked is None:
        _State.asked = signum
        if not _State.deferred:
            raise Stopped(signum)


def _watch(reader: int) -> None:
    """Answer a first signal at once where it has to wait; end the process at a second one."""
    first = None
    while got := os.read(reader, 1):
        if got[0] not in SIGNALS:
            continue
        if first is None:
            first = time.monotonic()
            if _State.deferred:
                say("stopping: the step under way is finished and saved; a second signal does not "
                    "wait for it")  # fmt: skip
        elif "TORCHELASTIC_RUN_ID" not in os.environ or time.monotonic() - first > LAUNCHER_S:
            if sys.stderr.isatty():
                os.write(2, b"\x1b[?25h\n")  # the cursor, which a live display hides
            os._exit(128 + got[0])
