"""Triton kernels on CPU tensors, through the interpreter: a process of its own.

`TRITON_INTERPRET=1 python -m pytest tests/triton`: Triton reads the variable when it is imported,
so nothing here is collected without it. Keep it small: 64 rows, 4k columns, scans of 8 x 256.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["*.py"]

if INTERPRETED:
    import _bf16

    _bf16.patch()


@pytest.fixture
def triton():
    """Every operator runs on Triton inside the test."""
    import tppo_kernels as tk

    with tk.use_backend("triton"):
        yield


@pytest.fixture
def scalars_on_a_gpu(monkeypatch):
    """Call it with an op's `_triton` module: its scalars then arrive as on a GPU, by pointer."""

    def patch(module):
        monkeypatch.setattr(module, "scalar", lambda x: (0.0, x.to(torch.float32)))

    return patch
