"""TPPO_CHECK=1: which operator made the first number that is not finite, where, and out of what.

`Op` hands a call to `watched` only while the variable is set; without it this file is not loaded.
What is watched are the outputs that the schema of a raw op names, the gradients of the backward
ops among them; buffers between a forward and its backward have no name there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .op import Op, explained

# Of backward records: what a forward has left for it, which may have slots that nothing reads.
LEFT = {"kept", "stats", "top", "log_sum", "lse", "scale", "moments"}
WITHOUT_SLOTS = {"weight", "bias"}  # their sizes may be those of the mask by chance


def watched(op: Op, raw: str, device: str, given: tuple, chosen: Callable, reference: Callable
            ) -> Callable:
    """The function `chosen` of a backend, which raises FloatingPointError naming the operator, the
    output, the first place and the input at fault where a result is not finite.

    reference: the specification, which after a failure says what is right.
    """
    entry = raw.rpartition("_")[2]

    def run(given: Any) -> Any:
        results = chosen(given)
        returns = getattr(torch.ops.tppo_kernels, raw).default._schema.returns
        outputs = results if isinstance(results, tuple) else (results,)
        for number, (output, returned) in enumerate(zip(outputs, returns, strict=True)):
            looked_at = returned.name and output.is_floating_point()
            if not looked_at or bool(output.isfinite().all()):
                continue
            found = explained(lambda: op.choose(device, given, entry, reference))
            backend = found.backend if found else "reference"
            what = f"the backward of {op.name}" if entry == "bwd" else op.name
            cause = (next(_spoilt_inputs(given), None)
                     or _judged(given, number, output, backend, reference))
            raise FloatingPointError(
                f"{what}: {_first(returned.name, output)}, on backend {backend}. {cause}")
        return results

    return run


def _first(name: str, x: Tensor, slots: Tensor | None = None) -> str:
    """Where the first value of x stands that is not finite, what it is, and how many there are."""
    bad = ~x.isfinite() if slots is None else ~x.isfinite() & slots
    place = bad.nonzero()[0].tolist()
    if len(place) == 2:
        where = f" at row {place[0]}, column {place[1]}"
    else:
        where = f" at {', '.join(map(str, place))}" if place else ""
    return (f"{name} is {x[tuple(place)].item()}{where} ({int(bad.sum())} of {x.numel()} values "
            "are not finite)")


def _inputs(record: tuple, mask: Tensor | None = None) -> Iterator[tuple[str, Tensor, Any]]:
    """(name, tensor, mask of its valid slots or None) of everything floating in a record."""
    fields = getattr(record, "_fields", None) or [""] * len(record)
    own = getattr(record, "mask", None)
    mask = own if own is not None else mask
    for name, value in zip(fields, record, strict=True):
        if isinstance(value, tuple):
            yield from _inputs(value, mask)
        elif isinstance(value, Tensor) and value.is_floating_point() and name not in LEFT:
            fits = (mask is not None and name not in WITHOUT_SLOTS
                    and value.shape[:mask.dim()] == mask.shape)
            yield name, value, mask if fits else None


def _spoilt_inputs(given: tuple) -> Iterator[str]:
    """A sentence for each input that is not finite at a valid slot; a scalar may be infinite."""
    for name, value, mask in _inputs(given):
        bad = value.isnan() if value.dim() == 0 else ~value.isfinite()
        slots = None
        if mask is not None:
            slots = mask.reshape(*mask.shape, *[1] * (value.dim() - mask.dim())).expand_as(bad)
            bad = bad & slots
        if bad.any():
            yield (f"Its input {_first(name, value, slots)}: it was spoilt before this call; look "
                   f"at what made {name}")


def _judged(given: tuple, number: int, output: Tensor, backend: str, reference: Callable) -> str:
    """What to make of finite inputs: does the specification give a finite result of them?"""
    largest = max(((float(x.abs().max()), name) for name, x, _ in _inputs(given)
                   if x.dim() and x.numel()), default=(0.0, "input"))  # fmt: skip
    finite = (f"Every input is finite at its valid slots; the largest number is {largest[0]:.3g} "
              f"in {largest[1]}")
    place = tuple((~output.isfinite()).nonzero()[0].tolist())
    if backend == "reference":
        return (f"{finite}. This is what the formula gives in {_dtype(output)}: smaller numbers, "
                "or float32 for 16 bits")
    try:
        right = reference(given)
    except (torch.OutOfMemoryError, RuntimeError):  # it makes all logits, or reads other buffers
        return f"{finite}. TPPO_BACKEND=reference tells whether the backend is at fault"
    right = (right if isinstance(right, tuple) else (right,))[number]
    if right.shape != output.shape or not right[place].isfinite():
        return (f"{finite}. The reference gives no finite number there either: an overflow of the "
                f"formula in {_dtype(output)}, or an argument out of its range")
    return (f"{finite}. The reference gives {right[place].item():.6g} there: backend {backend} is "
            "at fault. TPPO_BACKEND=reference goes on without it; please report it")


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
