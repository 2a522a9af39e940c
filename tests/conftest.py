"""Every uninitialised tensor holds NaN, so that an unwritten output is seen; seeds are fixed."""

import functools
import os

import pytest
import torch

SPACE = " " in torch.__file__
_compile = torch.compile


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
