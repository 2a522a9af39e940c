"""What is done to a process from inside: each function is called in a child before its command."""

import ctypes
import errno
import functools
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}  # of the audit hooks
FSYNC = "faults.fsync"
# What other threads do comes at other times in every run; of a page, one person asks at a time.
THREADS = ("MainThread", "labelling", "process_request_thread")
NEW_NAMES, NEW_USER = 0x00020000, 0x10000000  # CLONE_NEWNS, CLONE_NEWUSER
PRIVATE = (1 << 18) | (1 << 14)  # MS_PRIVATE | MS_REC


class Moments:
    """An audit hook that counts moments, and acts before one of them.

    A moment is what a command does to files of its run folder once its work has begun: opens for
    writing, renames, fsyncs, new folders, deletions.
    """

    def __init__(self, folder, begins, when=0, act=None):
        self.folder, self.begins = str(folder), begins
        self.when, self.act, self.count, self.begun = when, act, 0, not begins

    def __call__(self, event, arguments):
        if event == "open":
            path, mode, flags = arguments
            writes = set(mode) & set("wax+") if mode else flags & (os.O_WRONLY | os.O_RDWR)
            if not writes:
                return
        elif event in CHANGES or event == FSYNC:
            path = arguments[0]
        else:
            return
        if not threading.current_thread().name.strip(")").endswith(THREADS):
            return
        path = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        folder = arguments[-1]
        if event in CHANGES and not path.startswith("/") and type(folder) is int and folder >= 0:
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)  # shutil.rmtree
        if not path.startswith(self.folder):
            return
        self.begun = self.begun or self.begins in path
        self.count += self.begun
        if self.begun and self.count == self.when:
            self.act(path)


def watch(moments):
    """Install a hook in this process, and let it see fsync."""
    real = os.fsync

    def fsync(file):
        number = file if isinstance(file, int) else file.fileno()
        sys.audit(FSYNC, os.readlink(f"/proc/self/fd/{number}"))
        real(file)

    os.fsync = fsync
    sys.addaudithook(moments)


def signal_me(number, path):
    """Act: a signal to this process."""
    os.kill(os.getpid(), number)


def fail(code, path):
    """Act: the call fails."""
    raise OSError(code, os.strerror(code), path)


def marked(mark, act, path):
    """Act, and leave a mark that it came to this."""
    mark.touch()
    act(path)


def at_moment(folder, begins, when, act):
    """Act before a moment."""
    watch(Moments(folder, begins, when, act))


def count_moments(folder, begins, into):
    """Write how many moments there were when the process ends."""
    moments = Moments(folder, begins)
    watch(moments)
    return lambda: Path(into).write_text(str(moments.count))


def killed_in_write(nbytes):
    """The first file that grows beyond so many bytes is cut there, and the process with it."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))


def small_files(nbytes=4096):
    """No file may be larger, as where a quota is used up."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))


def clock_backwards():
    """Every reading of the clock is an hour before the one before it."""
    real, readings = time.time, []

    def back():
        readings.append(1)
        return real() - 3600 * len(readings)

    time.time = back


# --- disks: a mount that this process alone sees ---


def _called(name, *arguments):
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments):
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def own_mounts():
    """Mounts of this process are its own.  Errors: OSError where the system forbids it."""
    user, group = os.getuid(), os.getgid()
    try:
        _called("unshare", NEW_NAMES)
    except OSError:
        _called("unshare", NEW_NAMES | NEW_USER)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _called("mount", b"none", b"/", None, PRIVATE, None)


def mount(*arguments):
    """The command of this name.  Errors: OSError with what it says."""
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise OSError(errno.EPERM, f"mount: {done.stderr.strip()}")


@functools.cache
def why_no_mounts():
    """Why this machine lets no process mount a disk of its own; "" where it does."""
    for flags in ("-m", "-rm"):
        try:
            done = subprocess.run(["unshare", flags, "mount", "-t", "tmpfs", "none", "/mnt"],
                                  capture_output=True, text=True)  # fmt: skip
        except OSError as error:
            return str(error)
        if not done.returncode:
            return ""
    return done.stderr.strip()


def small_disk(folder, free, inodes=0):
    """The run folder lies on a disk with so many bytes, or inodes, left; when the process ends,
    what is there lies where it lay before.
    """
    own_mounts()
    folder.mkdir(exist_ok=True)
    files = [path for path in folder.rglob("*") if path.is_file()]
    used = sum(-(-path.stat().st_size // 4096) * 4096 for path in files)
    below = os.open(folder, os.O_RDONLY)
    options = f"size={max(4096, used + free // 4096 * 4096)}"
    if inodes:
        options += f",nr_inodes={sum(1 for _ in folder.rglob('*')) + 2 + inodes}"
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        mount("-t", "tmpfs", "-o", options, "none", folder)
        shutil.copytree(copy, folder, dirs_exist_ok=True)

    def back():
        under = Path(f"/proc/self/fd/{below}")
        for path in list(under.iterdir()):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(folder, under, dirs_exist_ok=True)

    return back


def read_only(folder):
    """Nothing can be written into the run folder."""
    own_mounts()
    folder.mkdir(exist_ok=True)
    mount("--bind", folder, folder)
    mount("-o", "remount,bind,ro", folder)
