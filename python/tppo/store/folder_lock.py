"""One command at a time works in a run folder; readers are not kept out."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tppo.errors import DataError
from tppo.progress import say
from tppo.store.disk import space_for
from tppo.store.jsonl import read_object

LOCK = ".lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


class FolderLock:
    """The lock of a folder, held as long as a block of code, and within it as often as wanted.

    It is the system's own lock of an open file, so it ends with the process that holds it, however
    that ends.  The file names the process; it is never deleted, because between opening and
    locking it another process could otherwise lock a file that is no longer there.
    """

    def __init__(self, root: Path) -> None:
        self.root, self._depth = root, 0

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock.

        Raises RuntimeError, naming process and command, where another process holds it; DiskFull
        or NotWritable where the lock, or what the block writes, finds no space or may not be
        written.
        """
        if self._depth:
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
            return
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"{self.root}: {error.strerror}, expected a run folder, or a place for one that "
                "can be written to (--out)"
            ) from None
        remedy = "Make room and run the same command again."
        with space_for(self.root, "what this command writes", remedy):
            descriptor = os.open(self.root / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                self._take(descriptor)
                self._depth = 1
                try:
                    yield
                finally:
                    self._depth = 0
            finally:
                os.close(descriptor)

    def _take(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"{self.root}: {self._holder()} works in this run folder, and only one can at a "
                "time; wait for it, or give another --out"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            say(
                f"WARNING: {self.root}: its file system has no locks ({error.strerror}): "
                "let no second command work in this folder"
            )
        me = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(me) + "\n").encode(), 0)

    def _holder(self) -> str:
        found = read_object(self.root / LOCK) or {}
        if not {"pid", "host", "command", "since"} <= found.keys():
            return "another process"  # it has the lock and has not written its name yet
        where = "" if found["host"] == socket.gethostname() else f" on {found['host']}"
        return f"process {found['pid']}{where} (`{found['command']}`, since {found['since']})"


def holder(root: Path) -> dict[str, str] | None:
    """What the process that holds the lock of a folder says of itself: `command`, `since`; None
    where no process of this machine does.
    """
    found = read_object(root / LOCK) or {}
    if not isinstance(found.get("pid"), int) or found.get("host") != socket.gethostname():
        return None
    if not Path(f"/proc/{found['pid']}").exists():
        return None
    with open(root / LOCK, "rb") as file:  # another process may have got the number since
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return found
        except OSError:
            return None
    return None
