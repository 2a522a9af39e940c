"""Which backends there are, which of them this installation has, and which one is forced."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

BACKENDS = ("reference", "chunked", "flash_attn_3", "flash", "flash_attn", "efficient", "cpp",
            "triton", "cuda")
RARE = {"flash_attn_3"}  # built from source by few: that it is not here is no warning
_forced: ContextVar[str | None] = ContextVar("_forced", default=None)
_TO_AUTOGRAD = "tppo_kernels.forced"  # (thread, backend), carried along by torch's engine
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
    if backend == "flash_attn_3":
        try:
            importlib.import_module("flash_attn_interface")
        except ImportError as error:
            return (f"no FlashAttention-3 ({error}): build flash_attn_interface from the folder "
                    "hopper of flash-attention")
    if backend in ("cpp", "cuda"):
        try:
            why_no_cuda = importlib.import_module("tppo_kernels._C").why_no_cuda
        except ImportError as error:
            note = Path(__file__).parent.with_name("_why.txt")  # of setup.py, where a tool failed
            why = note.read_text(encoding="utf-8") if note.exists() else error
            return f"no compiled part ({why}): install a C++ compiler, then tppo-kernels anew"
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
    name = _forced.get()
    if name is None and torch._C._is_key_in_tls(_TO_AUTOGRAD):
        thread, passed = torch._C._get_obj_in_tls(_TO_AUTOGRAD)
        name = None if thread == threading.get_ident() else passed  # else: of another task here
    return variable("TPPO_BACKEND") if name is None else name


def _pass_on(name: str | None) -> None:
    """Lets the threads that autograd runs a backward on see the backend; a context variable does
    not reach them, but what is stashed on the thread that calls backward does.

    torch 2.11 cannot take back what is stashed, and aborts where a thread with something ends as
    Python does: there only the main thread passes its backend on.
    """
    remove = getattr(torch._C, "_remove_obj_from_tls", None)
    if remove is None and threading.current_thread() is not threading.main_thread():
        return
    if name is None and not torch._C._is_key_in_tls(_TO_AUTOGRAD):
        return
    if name is None and remove is not None:
        remove(_TO_AUTOGRAD)
        return
    passed = (threading.get_ident(), name)
    references = sys.getrefcount(passed)
    torch._C._stash_obj_in_tls(_TO_AUTOGRAD, passed)
    if sys.getrefcount(passed) == references:
        # torch 2.11 keeps the object without a reference of its own, yet gives one back for it
        # when another takes its place: without this one the memory would be freed while in use
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(passed))


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces one backend on every operator inside the block, backward included.

    An operator that cannot run on it raises `BackendError` with the reason. A context variable:
    other threads and tasks do not see it, but the threads on which autograd runs a backward that
    was called inside the block do (with torch 2.11: inside a block of the main thread). Enter it
    around a compiled function; within one, `fullgraph=True` refuses it.
    `TPPO_BACKEND=name` does the same for a whole process.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}, expected one of {', '.join(BACKENDS)}")
    if torch.compiler.is_compiling():
        raise RuntimeError("use_backend: entered within a compiled function, where it would choose "
                           "for no later call; enter it around the call of that function")
    token = _forced.set(name)
    _pass_on(name)
    try:
        yield
    finally:
        _forced.reset(token)
        _pass_on(_forced.get())
