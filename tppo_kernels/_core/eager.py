"""Whether a call is plain eager work: then it may skip the dispatcher and share constants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import profiler
from torch.compiler import is_compiling

_PLAIN = {Tensor, torch.nn.Parameter, type(None), bool, int, float, str, torch.dtype}
_CONSTANTS: dict[float, Tensor] = {}


def _plain(args: tuple | list) -> bool:
    """Whether all are plain values, or lists of them."""
    return all(type(x) in _PLAIN or type(x) is list and _plain(x) for x in args)


def plain_device(args: tuple) -> str | None:
    """The device type of a call that the dispatcher would add nothing to, else None.

    It adds something under a tracer, a mode or a transform, and for a subclass of Tensor; under a
    profiler, which learns of a raw op from the dispatcher, its name and its time. What is not a
    tensor must be a plain value.
    """
    if (is_compiling() or profiler._is_profiler_enabled or _len_torch_dispatch_stack()
            or peek_interpreter_stack() is not None or _get_tracing_state() is not None
            or not (_PLAIN.issuperset(map(type, args)) or _plain(args))):
        return None
    for x in args:
        if isinstance(x, Tensor):
            return "cpu" if x.is_cpu else "cuda" if x.is_cuda else None
    return None


def surely(condition: Any) -> bool:
    """A comparison of sizes; False where `torch.compile` cannot know it, for instance of the number
    of rows that a compiled function chose: a plain `if` would raise for a data-dependent guard."""
    if not is_compiling():
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(condition)


def recorded(function: Any, *args: Any) -> Any:
    """`function.apply(*args)` of an `autograd.Function`, without what its wrapper does for
    functorch where no transform is active."""
    if is_compiling() or peek_interpreter_stack() is not None:
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)


def constant(value: float) -> Tensor:
    """A number as a 0-d fp64 tensor on the CPU; eager calls share one for each value."""
    if is_compiling() or _len_torch_dispatch_stack():
        return torch.tensor(value, dtype=torch.float64, device="cpu")
    known = _CONSTANTS.get(value)
    if known is None:
        with torch.inference_mode(False):  # autograd refuses to save a tensor born inside it
            known = torch.tensor(value, dtype=torch.float64, device="cpu")
        if peek_interpreter_stack() is None:
            if len(_CONSTANTS) > 1000:
                _CONSTANTS.clear()
            _CONSTANTS[value] = known
    return known
