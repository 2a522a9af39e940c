"""Which backends this installation has, and how to get those that it lacks."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os


@functools.cache
def missing(backend: str) -> str | None:
    """Why this installation lacks a backend, and how to get it; None when it is here."""
    if backend == "triton":
        found = importlib.util.find_spec("triton")
        if found is None or found.origin is None:  # a mere folder of that name has no origin
            return "no Triton: pip install 'tppo-kernels[triton]'"
    if backend in ("cpp", "cuda"):
        try:
            why_no_cuda = importlib.import_module("tppo_kernels._C").why_no_cuda
        except ImportError as error:
            return f"no compiled part ({error}): install a C++ compiler, then tppo-kernels anew"
        if backend == "cuda" and why_no_cuda:
            return f"the extension has no CUDA part: {why_no_cuda}"
    return None


def interpreting() -> bool:
    """Whether Triton runs on CPU tensors: TRITON_INTERPRET=1, set before Python starts."""
    return os.environ.get("TRITON_INTERPRET") == "1"
