"""The machinery of every operator: raw ops, their fakes and references, and the choice of backend.

An operator owns raw ops `tppo_kernels::<op>_fwd` and `..._bwd`: functional, with a Python schema and
fake, the reference as the default kernel. On CPU and CUDA a chooser stands before it: it walks the
operator's order of backends, takes the first that is installed and does not refuse the arguments,
and says once why a faster one was passed over.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

BACKENDS = ("reference", "cpp", "triton", "cuda")
OPS: dict[str, Op] = {}
_LIB = torch.library.Library("tppo_kernels", "DEF")
_log = logging.getLogger("tppo_kernels")
_forced: list[str] = []
_explaining: list[bool] = []
_said: set[tuple[str, str, str]] = set()


class BackendError(RuntimeError):
    """A forced backend cannot run these arguments; the message says why."""


class Explanation(NamedTuple):
    """Which backend a call takes, and why each one before it in the order was refused."""

    op: str
    backend: str
    refused: dict[str, str]

    def __str__(self) -> str:
        why = "".join(f"\n  not {name}: {reason}" for name, reason in self.refused.items())
        return f"{self.op} runs on {self.backend}{why}"


class _Explained(Exception):
    """Carries the explanation out of a dispatch that `explain` started; nothing has run."""

    def __init__(self, explanation: Explanation):
        super().__init__(str(explanation))
        self.explanation = explanation


@functools.cache
def missing(backend: str) -> str | None:
    """Why this installation lacks a backend, and how to get it; None when it is here."""
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'tppo-kernels[triton]'"
    if backend in ("cpp", "cuda"):
        try:
            compiled = importlib.import_module("tppo_kernels._C")
        except ImportError as error:
            return (f"the compiled part is not there ({error}): install a C++ compiler, then "
                    "`pip install --force-reinstall --no-cache-dir tppo-kernels`")
        if backend == "cuda" and compiled.why_no_cuda:
            return f"the extension has no CUDA part: {compiled.why_no_cuda}"
    return None


class Op:
    """One operator: the order of its backends by device, and its raw ops."""

    def __init__(self, name: str, *, cpu: tuple[str, ...] = ("reference",),
                 cuda: tuple[str, ...] = ("reference",)):
        self.name = name
        self.order = {"cpu": cpu, "cuda": cuda}
        OPS[name] = self

    def define(self, schema: str, reference: Callable, fake: Callable,
               check_values: Callable[..., None] | None = None) -> Callable:
        """Registers a raw op and returns it; `check_values` reads tensor values (see `_run`)."""
        raw = schema.split("(")[0]
        _LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIB.impl(raw, reference, "CompositeExplicitAutograd")
        for device in ("cpu", "cuda"):
            run = functools.partial(self._run, device, raw, reference, check_values)
            _LIB.impl(raw, run, device.upper())
        torch.library.register_fake(f"tppo_kernels::{raw}", fake, lib=_LIB)
        return getattr(torch.ops.tppo_kernels, raw).default

    def _run(self, device: str, raw: str, reference: Callable,
             check_values: Callable[..., None] | None, *args: Any) -> Any:
        """Values are checked where reading them is free (CPU), and on a GPU under TPPO_CHECK=1."""
        if check_values and (device == "cpu" or os.environ.get("TPPO_CHECK") == "1"):
            check_values(*args)
        chosen = self.choose(device, raw, args)
        if _explaining:
            raise _Explained(chosen)
        kernel = reference if chosen.backend == "reference" else getattr(
            self._module(chosen.backend), raw.rpartition("_")[2])
        return kernel(*args)

    def choose(self, device: str, raw: str, args: tuple) -> Explanation:
        """The forced backend, or the first of the order that does not refuse."""
        forced = _forced[-1] if _forced else os.environ.get("TPPO_BACKEND")
        if forced:
            _check_backend(forced)
            reason = self._refusal(forced, device, args)
            if reason:
                raise BackendError(f"{self.name}: backend {forced!r} cannot run this: {reason}")
            return Explanation(self.name, forced, {})
        refused: dict[str, str] = {}
        for backend in self.order[device]:
            reason = self._refusal(backend, device, args)
            if reason is None:
                break
            refused[backend] = reason
            if not _explaining and (self.name, backend, reason) not in _said:
                _said.add((self.name, backend, reason))
                _log.warning("%s: %s passed over: %s", self.name, backend, reason)
        else:
            raise BackendError(f"{self.name}: no backend can run this: {refused}")
        return Explanation(self.name, backend, refused)

    def _refusal(self, backend: str, device: str, args: tuple) -> str | None:
        if backend == "reference":
            return None
        if backend not in self.order[device]:
            return f"it has no such backend on {device}, only {', '.join(self.order[device])}"
        return missing(backend) or self._module(backend).supports(*args)

    def _module(self, backend: str) -> Any:
        return importlib.import_module(f"tppo_kernels.ops.{self.name}._{backend}")


def _check_backend(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}, expected one of {', '.join(BACKENDS)}")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces one backend on every operator inside the block, backward included.

    An operator that cannot run on it raises `BackendError` with the reason. Process-wide, like
    torch's own backend flags: backward may run on another thread. `TPPO_BACKEND=name` does the
    same for a whole process.
    """
    _check_backend(name)
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def explain(op: str | Callable, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend `op(*args, **kwargs)` would take, and why not a faster one; nothing runs."""
    import tppo_kernels

    name = op if isinstance(op, str) else op.__name__
    if name not in tppo_kernels.__all__ or not hasattr(tppo_kernels, name):
        raise ValueError(f"op is {name!r}, expected one of {', '.join(sorted(OPS))}")
    _explaining.append(True)
    try:
        getattr(tppo_kernels, name)(*args, **kwargs)
    except _Explained as explained:
        return explained.explanation
    finally:
        _explaining.pop()
    return Explanation(name, "reference", {})
