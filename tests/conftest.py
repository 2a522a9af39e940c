"""Every uninitialised tensor holds NaN, so that an unwritten output is seen; seeds are fixed."""

import functools
import os
import signal

import pytest
import torch

SPACE = " " in torch.__file__
_compile = torch.compile


# A shell that starts the tests in the background has them ignore Ctrl-C, and so would the processes
# that the tests of signals start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header():
    lines = []
    if os.environ.get("TRITON_INTERPRET") != "1":
        lines.append("tests/triton is not collected: it wants a process of its own, "
                     "TRITON_INTERPRET=1 python -m pytest tests/triton")
    if SPACE:
        lines.append("torch lies on a path with a space, at which Inductor's C++ step splits its "
                     "own paths: torch.compile is tested with backend='aot_eager'")
    return lines


@pytest.fixture(autouse=True)
def _poisoned_empty(monkeypatch):
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if SPACE:
        monkeypatch.setattr(torch, "compile", functools.partial(_compile, backend="aot_eager"))
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def one_thread():
    """Sums of one thread, which are the same to the bit every time; for a whole file of tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
