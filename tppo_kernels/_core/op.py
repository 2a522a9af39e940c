"""The machinery of every operator: raw ops, their fakes and references, the choice of backend.

An operator owns raw ops `tppo_kernels::<op>_fwd` and `<op>_bwd`: functional, schema and fake in
Python, the reference as default kernel. On CPU and CUDA a chooser stands before it: the first
backend in order that is here and does not refuse the arguments runs; what it passed is logged once.
Plain eager calls go to the chooser past the dispatcher, which costs more than some kernels.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

from .backends import BACKENDS, RARE, forced, interpreting, missing, variable
from .eager import plain_device
from .record import build, flat
from .record import schema as arguments

OPS: dict[str, Op] = {}
_LIB = torch.library.Library("tppo_kernels", "DEF")
_log = logging.getLogger("tppo_kernels")
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


def _given(function: Callable, call: tuple) -> Any:
    """Gives a record as it is; arguments of a raw op without one are spread."""
    return function(*call) if type(call) is tuple else function(call)


class Op:
    """One operator: the order of its backends by device, and its raw ops."""

    def __init__(self, name: str, cpu: tuple = ("reference",), cuda: tuple = ("reference",)):
        self.name, self.order = name, {"cpu": cpu, "cuda": cuda}
        self._modules: dict[str, Any] = {}
        OPS[name] = self

    def define(self, schema: str, reference: Callable, fake: Callable,
               check_values: Callable | None = None, *, record: Any = None,
               registers_autograd: bool = False) -> Callable:
        """Registers a raw op, such as "gae_fwd -> (Tensor, Tensor)", with the fields of `record` as
        its arguments; returns what calls it with a record, and records no gradient by itself.

        `check_values` reads values: where that is free (CPU), and on a GPU under TPPO_CHECK=1.
        """
        raw = schema.split("(")[0].split(" ")[0]
        entry = raw.rpartition("_")[2]
        if record:
            schema = schema.replace(raw, f"{raw}({arguments(record)})", 1)

        def of(args: tuple) -> tuple:
            return build(record, args) if record else args

        def ready(device: str, call: tuple) -> Callable:
            if check_values and (device == "cpu" or variable("TPPO_CHECK") == "1"):
                _given(check_values, call)
            function = self.choose(device, call, entry, reference)
            return function if record else lambda args: function(*args)

        def kernel(device: str, args: tuple) -> Any:
            given = of(args)
            return ready(device, given)(given)

        def call(given: tuple) -> Any:
            args = flat(given)
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

        _LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIB.impl(raw, lambda *args: _given(reference, of(args)), "CompositeExplicitAutograd")
        for device in ("cpu", "cuda"):
            _LIB.impl(raw, lambda *args, _device=device: kernel(_device, args), device.upper())
        torch.library.register_fake(f"tppo_kernels::{raw}", lambda *args: _given(fake, of(args)),
                                    lib=_LIB)
        dispatched = getattr(torch.ops.tppo_kernels, raw).default
        if registers_autograd:
            return (lambda given: dispatched(*flat(given))) if record else dispatched
        return call if record else lambda *args: call(args)

    def choose(self, device: str, call: tuple, entry: str, reference: Callable) -> Callable:
        """`entry` of the forced backend, or of the first of the order that does not refuse."""
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
            said = (self.name, backend, reason)
            if not (only or _explaining.get() or said in _said):
                _said.add(said)
                level = logging.DEBUG if backend in RARE else logging.WARNING
                _log.log(level, "%s: %s passed over: %s", *said)
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
            module = self._modules.get(backend)
            if module is None:
                module = importlib.import_module(f"tppo_kernels.ops.{self.name}._{backend}")
                self._modules[backend] = module
            reason = _given(module.supports, call)
        return reason


def explain(op: str | Callable, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend `op(*args, **kwargs)` would take, and why not a faster one; nothing runs."""
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in OPS:
        raise ValueError(f"op is {name!r}, expected one of {', '.join(sorted(OPS))}")
    token = _explaining.set(True)
    try:
        getattr(importlib.import_module(f"tppo_kernels.ops.{name}"), name)(*args, **kwargs)
    except _Explained as explained:
        return explained.args[0]
    finally:
        _explaining.reset(token)
    return Explanation(name, "reference", {})  # it made no dispatch: one implementation
