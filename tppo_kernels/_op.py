"""The machinery of every operator: raw ops, their fakes and references, the choice of backend.

An operator owns raw ops `tppo_kernels::<op>_fwd` and `<op>_bwd`: functional, schema and fake in
Python, the reference as default kernel. On CPU and CUDA a chooser stands before it: the first
backend in order that is here and does not refuse the arguments runs; what it passed is logged once.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

from ._installed import interpreting, missing

BACKENDS = ("reference", "flash", "cpp", "triton", "cuda")
OPS: dict[str, Op] = {}
_LIB = torch.library.Library("tppo_kernels", "DEF")
_log = logging.getLogger("tppo_kernels")
_forced: list[str] = []
_explaining = ContextVar("_explaining", default=False)
_said: set[tuple] = set()


class BackendError(RuntimeError):
    """A forced backend cannot run these arguments; the message says why."""


class Explanation(NamedTuple):
    """Which backend a call takes, and why each one before it in the order was refused."""
    op: str
    backend: str
    refused: dict[str, str]

    def __str__(self) -> str:
        why = (f"\n  not {name}: {reason}" for name, reason in self.refused.items())
        return f"{self.op} runs on {self.backend}{''.join(why)}"


class _Explained(Exception):
    """Carries the explanation out of a dispatch that `explain` started; nothing has run."""


class Op:
    """One operator: the order of its backends by device, and its raw ops."""

    def __init__(self, name: str, cpu: tuple = ("reference",), cuda: tuple = ("reference",)):
        self.name, self.order = name, {"cpu": cpu, "cuda": cuda}
        OPS[name] = self

    def define(self, schema: str, reference: Callable, fake: Callable,
               check_values: Callable | None = None) -> Callable:
        """Registers a raw op and returns it; `check_values` reads tensor values (see `_run`)."""
        raw = schema.split("(")[0]
        _LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIB.impl(raw, reference, "CompositeExplicitAutograd")
        for device in ("cpu", "cuda"):
            run = functools.partial(self._run, device, raw, reference, check_values)
            _LIB.impl(raw, run, device.upper())
        torch.library.register_fake(f"tppo_kernels::{raw}", fake, lib=_LIB)
        return getattr(torch.ops.tppo_kernels, raw).default

    def _run(self, device: str, raw: str, reference: Any, check_values: Any, *args: Any) -> Any:
        """Values are checked where reading them is free (CPU), and on a GPU under TPPO_CHECK=1."""
        if check_values and (device == "cpu" or os.environ.get("TPPO_CHECK") == "1"):
            check_values(*args)
        chosen = self.choose(device, args)
        if _explaining.get():
            raise _Explained(chosen)
        if chosen.backend == "reference":
            return reference(*args)
        return getattr(self._module(chosen.backend), raw.rpartition("_")[2])(*args)

    def choose(self, device: str, args: tuple) -> Explanation:
        """The forced backend, or the first of the order that does not refuse."""
        forced = _forced[-1] if _forced else os.environ.get("TPPO_BACKEND")
        refused: dict[str, str] = {}
        for backend in (forced,) if forced else self.order[device]:
            reason = self._refusal(backend, device, args)
            if reason is None:
                return Explanation(self.name, backend, refused)
            refused[backend] = reason
            said = (self.name, backend, reason)
            if not (forced or _explaining.get() or said in _said):
                _said.add(said)
                _log.warning("%s: %s passed over: %s", *said)
        raise BackendError(f"{self.name}: no backend can run this: " + "; ".join(
            f"{name}: {reason}" for name, reason in refused.items()))

    def _module(self, backend: str) -> Any:
        return importlib.import_module(f"tppo_kernels.ops.{self.name}._{backend}")

    def _refusal(self, backend: str, device: str, args: tuple) -> str | None:
        if backend == "reference":
            return None
        if backend not in self.order[device]:
            if device != "cpu" or backend != "triton" or backend not in self.order["cuda"]:
                return f"it has no such backend on {device}, only {', '.join(self.order[device])}"
            if not interpreting():
                return ("it has no such backend on cpu without TRITON_INTERPRET=1, set before "
                        "Python starts")
        return missing(backend) or self._module(backend).supports(*args)


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


def explain(op: str | Callable, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend `op(*args, **kwargs)` would take, and why not a faster one; nothing runs."""
    import tppo_kernels
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in OPS:
        raise ValueError(f"op is {name!r}, expected one of {', '.join(sorted(OPS))}")
    token = _explaining.set(True)
    try:
        getattr(tppo_kernels, name)(*args, **kwargs)
    except _Explained as explained:
        return explained.args[0]
    finally:
        _explaining.reset(token)
    return Explanation(name, "reference", {})  # it made no dispatch: one implementation
