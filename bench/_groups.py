"""Groups of processes that end with the process which started them, however that one ends."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

# Its input ends when the last process that can write to it does; what is left then has no owner.
WATCHER = """
import os, signal, sys
left = set()
for line in sys.stdin:
    left ^= {int(line)}
for group in left:
    try:
        os.killpg(group, signal.SIGKILL)
    except OSError:
        pass
"""


def end_group(pid: int, how: signal.Signals) -> None:
    """Signals all that is left of a process group."""
    try:
        os.killpg(pid, how)
    except (ProcessLookupError, PermissionError):
        pass


@functools.cache
def _watcher() -> subprocess.Popen:
    """In a session of its own: neither Ctrl-C nor the end of this process's group reaches it."""
    return subprocess.Popen([sys.executable, "-I", "-S", "-c", WATCHER], stdin=subprocess.PIPE,
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                            start_new_session=True)


def watched(command: Sequence[str]) -> tuple[list[str], tuple[int, ...]]:
    """A command that puts its group under watch before it begins, for a session of its own, and the
    descriptors that it needs: were it the starter's to do, a kill between would leave it behind.
    """
    pipe = _watcher().stdin
    assert pipe is not None
    end = pipe.fileno()
    # The subshell alone dies where somebody has ended the watcher.
    script = f'(echo $$ >&{end}) 2>/dev/null; exec "$@" {end}>&-'
    return ["bash", "-c", script, "watched", *command], (end,)


def release(pid: int) -> None:
    """Takes a group out of the watch: it is ended already."""
    pipe = _watcher().stdin
    assert pipe is not None
    try:
        pipe.write(f"{pid}\n".encode())
        pipe.flush()
    except BrokenPipeError:
        pass  # somebody ended the watcher: what runs is as well as before, only without it
