"""A disk that is full or read-only is one sentence, whichever library meets it first."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM}


class DiskFull(RuntimeError):
    """A file could not be written for want of space; the message names the place and the remedy."""


class NotWritable(RuntimeError):
    """A file of a folder may not be written; the message names the place and the remedy."""


@contextmanager
def space_for(folder: Path, what: str, remedy: str, nbytes: int | None = None) -> Iterator[None]:
    """Run a block that writes to `folder`; raises DiskFull where there is no space for it, and
    NotWritable where the folder is read-only.

    nbytes: what it needs, where that is known beforehand.
    """
    before = _free(folder)
    try:
        yield
    except Exception as error:  # safetensors, torch and tokenizers each have a type of their own
        code, named = _of_system(error)
        if isinstance(error, DiskFull | NotWritable):
            raise
        inside = named is not None and named.is_relative_to(folder.absolute())
        if code == errno.EROFS and (inside or named is None) or code in _FORBIDDEN and inside:
            raise NotWritable(
                f"{named or folder}: {what} cannot be written: {os.strerror(code)}. Make the "
                "folder writable and run the same command again, or give another --out"
            ) from error
        if code not in _FULL:
            raise
        folder, reason = folder if named is None else named.parent, os.strerror(code)
        space = f"{_amount(_free(folder))} are free there now"
        if nbytes is not None:
            space = f"{_amount(nbytes)} are needed, {_amount(before)} were free there"
        raise DiskFull(
            f"{folder}: {what} cannot be written: {reason}; {space}. {remedy}"
        ) from error


def delete(path: Path) -> None:
    """Remove a folder with all that is in it, a file, or a link and not what it leads to; nothing
    where there is none of them.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _free(folder: Path) -> int:
    """The free bytes of the disk that a folder is on, or is to be on."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _of_system(error: BaseException | None) -> tuple[int, Path | None]:
    """The number of the system's error that is behind one, 0 where none is, and its file.

    torch's own error has the system's as its context; Rust libraries quote the number in the text.
    """
    while error is not None:
        if quoted := re.search(r"\(os error (\d+)\)", str(error)):
            return int(quoted[1]), None
        if isinstance(error, OSError) and error.errno is not None:
            named = error.filename2 or error.filename
            return error.errno, Path(named).absolute() if isinstance(named, str) else None
        error = error.__cause__ or error.__context__
    return 0, None


def _amount(nbytes: float) -> str:
    """`512 B`, `1.5 MB`, `12.3 GB`"""
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} GB"
