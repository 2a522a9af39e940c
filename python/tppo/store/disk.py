"""A full disk is reported in one sentence, whichever library meets it first."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class DiskFull(RuntimeError):
    """A file could not be written for want of space; the message names the place and the remedy."""


@contextmanager
def space_for(folder: Path, what: str, remedy: str, nbytes: int | None = None) -> Iterator[None]:
    """Run a block that writes to `folder`; raises DiskFull where there is no space for it.

    nbytes: what it needs, where that is known beforehand.
    """
    before = _free(folder)
    try:
        yield
    except Exception as error:  # safetensors, torch and tokenizers each have a type of their own
        reason = _reason(error)
        if reason is None or isinstance(error, DiskFull):
            raise
        named = getattr(error, "filename", None)
        folder = Path(named).parent if isinstance(named, str) else folder
        space = f"{_amount(_free(folder))} are free there now"
        if nbytes is not None:
            space = f"{_amount(nbytes)} are needed, {_amount(before)} were free there"
        raise DiskFull(
            f"{folder}: {what} cannot be written: {reason}; {space}. {remedy}"
        ) from error


def _free(folder: Path) -> int:
    """The free bytes of the disk that a folder is on, or is to be on."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _reason(error: BaseException | None) -> str | None:
    """The system's message about a full disk, None for any other error.

    torch's own error has the system's as its context; Rust libraries quote the number in the text.
    """
    while error is not None:
        code = error.errno if isinstance(error, OSError) else None
        if quoted := re.search(r"\(os error (\d+)\)", str(error)):
            code = int(quoted[1])
        if code in _FULL:
            return os.strerror(code)
        error = error.__cause__ or error.__context__
    return None


def _amount(nbytes: float) -> str:
    """`512 B`, `1.5 MB`, `12.3 GB`"""
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} GB"
