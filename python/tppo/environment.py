"""What a process of `tppo` is set up by: environment variables, of which one that makes no sense is
refused by its name, and the libraries that it loads.
"""

from __future__ import annotations

import difflib
import os

# Read by tppo and tppo_kernels, when building, and in the tests.
KNOWN = ("TPPO_BACKEND", "TPPO_CHECK", "TPPO_TRACEBACK", "TPPO_BUILD_CUDA", "TPPO_CUDA_ARCHS",
         "TPPO_TEST_FULL", "TPPO_SESSIONS", "TPPO_GPU_SMOKE")  # fmt: skip
MEETING = ("MASTER_ADDR", "MASTER_PORT")  # where the processes of torchrun find each other


def processes() -> tuple[int, int]:
    """(number of this process, how many there are), as torchrun says it; (0, 1) without torchrun.

    Errors: ValueError naming the variable that is missing or no number in its range.
    """
    given = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    if not given:
        return 0, 1
    if len(given) == 1:
        (other,) = {"RANK", "WORLD_SIZE"} - set(given)
        raise ValueError(
            f"environment variable {given[0]} was {os.environ[given[0]]!r} and {other} was not "
            f"set, expected both, as torchrun sets them, or neither: unset {given[0]}"
        )
    size = whole("WORLD_SIZE", 1, 2**31)
    rank = whole("RANK", 0, size)
    if size > 1:
        for name in MEETING:
            if not os.environ.get(name):
                raise ValueError(
                    f"environment variable {name} was not set, expected it where WORLD_SIZE is "
                    f"{size}: torchrun sets it"
                )
        whole("MASTER_PORT", 0, 2**16)
    return rank, size


def whole(name: str, low: int, limit: int) -> int:
    """The whole number in [low, limit) that a variable holds.  Raises ValueError otherwise."""
    value = os.environ.get(name)
    expected = f"expected a whole number from {low} to {limit - 1}"
    if value is None:
        raise ValueError(f"environment variable {name} was not set, {expected}: torchrun sets it")
    if not (value.isascii() and value.isdigit() and low <= int(value[:12]) < limit):
        raise ValueError(f"environment variable {name} was {value!r}, {expected}")
    return int(value)


def flag(name: str) -> bool:
    """Whether a variable is 1; 0, empty and not set are no.  Raises ValueError otherwise."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"environment variable {name} was {value!r}, expected 1 or 0")
    return value == "1"


def check() -> None:
    """Raise ValueError naming a variable whose value makes no sense."""
    processes()
    flag("TPPO_TRACEBACK")
    flag("TPPO_CHECK")


def ignored(*read: str | None) -> list[str]:
    """A line for each TPPO_ variable that nothing reads; `read` are names that the user gave."""
    lines = []
    for name in sorted(os.environ):
        if name.startswith("TPPO_") and name not in (*KNOWN, *read):
            close = difflib.get_close_matches(name, KNOWN, 1)
            remedy = f"; did you mean {close[0]}?" if close else ""
            lines.append(f"environment variable {name} is ignored: nothing reads it{remedy}")
    return lines


def check_backend() -> None:
    """Raise ValueError where TPPO_BACKEND names no backend."""
    import tppo_kernels

    if name := os.environ.get("TPPO_BACKEND"):
        try:
            with tppo_kernels.use_backend(name):
                pass
        except ValueError as error:
            raise ValueError(f"environment variable TPPO_BACKEND: {error}") from None


def load_libraries(threads: int | None = None) -> None:
    """Load torch, and transformers, which is told to leave the progress to us.

    threads: of torch; None leaves their number as it is.
    """
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)
