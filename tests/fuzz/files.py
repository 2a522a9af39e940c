"""What the targets share: a folder of this process, and when a text is sound."""

import functools
import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any


class _Folder:
    """A temporary folder that goes with the process."""

    def __init__(self) -> None:
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # where fsync is free
        self.path = Path(tempfile.mkdtemp(prefix="fuzz-", dir=memory))
        weakref.finalize(self, shutil.rmtree, self.path, True)


@functools.cache
def _folder() -> _Folder:
    return _Folder()


def folder() -> Path:
    """A folder for the files of a call; it is removed when the process ends."""
    return _folder().path


def sound_text(value: Any) -> bool:
    """A string that is not blank and that UTF-8 can hold."""
    if not isinstance(value, str) or not value.strip():
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
