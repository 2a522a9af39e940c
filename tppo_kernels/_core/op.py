"""The machinery of every operator: raw ops, their fakes and references, the choice of backend.

An operator owns raw ops `tppo_kernels::<op>_fwd` and `<op>_bwd`: functional, schema and fake in
Python. Their kernel is a chooser: it runs the first backend in the order of the device that is
installed and does not refuse the arguments, and logs each one that it passes over once. Plain eager
calls go to the chooser without the dispatcher. docs/how-a-call-runs.md shows the way of a call.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import torch

from .backends import BACKENDS, RARE, forced, interpreting, missing, variable
from .eager import plain_device
from .record import Record, build, flat, schema

OPS: dict[str, Op] = {}
_LIB = torch.library.Library("tppo_kernels", "DEF")
_log = logging.getLogger("tppo_kernels")
_explaining = ContextVar("_explaining", default=False)
_logged: set[tuple] = set()
OTHER = "other devices"  # than a CPU or an NVIDIA GPU: plain torch runs there


class BackendError(RuntimeError):
    """A forced backend cannot run these arguments; the message has the reason."""


class Explanation(NamedTuple):
    """Which backend a call takes, and why each one before it in the order was refused."""
    op: str
    backend: str
    refused: dict[str, str]

    def __str__(self) -> str:
        why = (f"\n  not {name}: {reason}" for name, reason in self.refused.items())
        return f"{self.op} runs on {self.backend}{''.join(why)}"


def watched(*call: Any) -> Callable:
    """The function that looks at results under TPPO_CHECK=1; its file is loaded only then."""
    found: Callable = importlib.import_module("tppo_kernels._core.watch").watched(*call)
    return found


class _Explained(Exception):
    """Carries the explanation out of a dispatch that `explain` started; nothing has run."""


class Op:
    """One operator: the order of its backends by device, and its raw ops."""

    def __init__(self, name: str, cpu: tuple = ("reference",), cuda: tuple = ("reference",),
                 other: tuple = ("reference",)):
        self.name, self.order = name, {"cpu": cpu, "cuda": cuda, OTHER: other}
        self._modules: dict[str, Any] = {}
        OPS[name] = self

    def define(self, signature: str, reference: Callable, fake: Callable,
               check_values: Callable | None = None, *, record: type[Record],
               registers_autograd: bool = False) -> Callable[[Record], Any]:
        """Registers a raw op, such as "kl_fwd -> (Tensor kl)", with the fields of `record` as
        its arguments. Returns a function that calls it with a record and computes no gradient.

        `check_values` reads values: on CPU, where that is free, and on a GPU under TPPO_CHECK=1,
        which on both has the outputs that are named here watched for what is not finite.
        """
        raw, returns = signature.split(" ", 1)
        entry = raw.rpartition("_")[2]

        def ready(device: str, given: Record) -> Callable:
            checking = variable("TPPO_CHECK") == "1"
            if check_values and (checking or device == "cpu"):
                check_values(given)
            chosen = self.choose(device, given, entry, reference)
            return watched(self, raw, device, given, chosen, reference) if checking else chosen

        def kernel(device: str, *args: Any) -> Any:
            given = build(record, args)
            return ready(device, given)(given)

        def call(given: Record) -> Any:
            args = flat(given)
            if registers_autograd:
                return dispatched(*args)
            device = plain_device(args)
            if device is None:
                with torch.no_grad():
                    return dispatched(*args)
            graded = torch.is_grad_enabled()
            torch._C._set_grad_enabled(False)  # the context manager costs several times as much
            try:
                return ready(device, given)(given)
            finally:
                torch._C._set_grad_enabled(graded)

        _LIB.define(f"{raw}({schema(record)}) {returns}", tags=(torch.Tag.pt2_compliant_tag,))
        for key, device in (("CPU", "cpu"), ("CUDA", "cuda"), ("CompositeExplicitAutograd", OTHER)):
            _LIB.impl(raw, partial(kernel, device), key)
        torch.library.register_fake(f"tppo_kernels::{raw}",
                                    lambda *args: fake(build(record, args)), lib=_LIB)
        dispatched = getattr(torch.ops.tppo_kernels, raw).default
        return call

    def choose(self, device: str, call: tuple, entry: str, reference: Callable) -> Callable:
        """The function `entry` of the forced backend, or of the first one that does not refuse."""
        only = forced()
        refused: dict[str, str] = {}
        for backend in (only,) if only else self.order[device]:
            reason = self._refusal(backend, device, call)
            if reason is None:
                if _explaining.get():
                    raise _Explained(Explanation(self.name, backend, refused))
                return reference if backend == "reference" else getattr(
                    self._modules[backend], entry)
            refused[backend] = reason
            event = (self.name, backend, reason)
            if not (only or _explaining.get() or event in _logged):
                _logged.add(event)
                level = logging.DEBUG if backend in RARE else logging.WARNING
                _log.log(level, "%s: %s passed over: %s", *event)
        raise BackendError(f"{self.name}: no backend can run this: " + "; ".join(
            f"{name}: {reason}" for name, reason in refused.items()))

    def _refusal(self, backend: str, device: str, call: tuple) -> str | None:
        if backend == "reference":
            return None
        if backend not in BACKENDS:  # `use_backend` refuses such a name itself
            return f"TPPO_BACKEND is {backend!r}, expected one of {', '.join(BACKENDS)}"
        if backend not in self.order[device]:
            if device != "cpu" or backend != "triton" or backend not in self.order["cuda"]:
                return f"it has no such backend on {device}, only {', '.join(self.order[device])}"
            if not interpreting():
                return ("it has no such backend on cpu without TRITON_INTERPRET=1, set before "
                        "Python starts")
        reason = missing(backend)
        if reason is None:
            if backend not in self._modules:
                self._modules[backend] = importlib.import_module(
                    f"tppo_kernels.ops.{self.name}._{backend}")
            reason = self._modules[backend].supports(call)
        return reason


def explain(op: str | Callable, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend `op(*args, **kwargs)` would run on, and why on no faster one; nothing runs."""
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in OPS:
        raise ValueError(f"op is {name!r}, expected one of {', '.join(sorted(OPS))}")
    call = getattr(importlib.import_module(f"tppo_kernels.ops.{name}"), name)
    return explained(partial(call, *args, **kwargs)) or Explanation(name, "reference", {})


def explained(call: Callable[[], Any]) -> Explanation | None:
    """What a call up to the chooser finds; None where it reaches none: there is one backend."""
    token = _explaining.set(True)
    try:
        call()
    except _Explained as found:
        return found.args[0]
    finally:
        _explaining.reset(token)
    return None
