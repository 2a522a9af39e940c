"""Which backends there are, which of them this installation has, and which one is forced."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

BACKENDS = ("reference", "flash", "flash_attn", "efficient", "cpp", "triton", "cuda")
_forced: list[str] = []
_names_set: Any = getattr(os.environ, "_data", None)  # the dict behind os.environ
_encoded = functools.cache(os.environ.encodekey)


@functools.cache
def missing(backend: str) -> str | None:
    """Why this installation lacks a backend, and how to get it; None when it is here."""
    if backend == "triton":
        found = importlib.util.find_spec("triton")
        if found is None or found.origin is None:  # a mere folder of that name has no origin
            return "no Triton: pip install 'tppo-kernels[triton]'"
    if backend == "flash_attn" and importlib.util.find_spec("flash_attn_2_cuda") is None:
        return "no flash-attn: pip install 'tppo-kernels[flash-attn]' beside a CUDA build of torch"
    if backend in ("cpp", "cuda"):
        try:
            why_no_cuda = importlib.import_module("tppo_kernels._C").why_no_cuda
        except ImportError as error:
            return f"no compiled part ({error}): install a C++ compiler, then tppo-kernels anew"
        if backend == "cuda" and why_no_cuda:
            return f"the extension has no CUDA part: {why_no_cuda}"
    return None


def variable(name: str) -> str | None:
    """An environment variable as it is now; where it is not set, which is the rule, without the
    exception that `os.environ.get` raises and catches at several times the cost."""
    if _names_set is not None and _encoded(name) not in _names_set:
        return None
    return os.environ.get(name)


def interpreting() -> bool:
    """Whether Triton runs on CPU tensors: TRITON_INTERPRET=1, set before Python starts."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def forced() -> str | None:
    """The backend that `use_backend` or TPPO_BACKEND asks for."""
    return _forced[-1] if _forced else variable("TPPO_BACKEND")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces one backend on every operator inside the block, backward included.

    An operator that cannot run on it raises `BackendError` with the reason. Process-wide, because
    backward may run on another thread. `TPPO_BACKEND=name` does the same for a whole process.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}, expected one of {', '.join(BACKENDS)}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()
