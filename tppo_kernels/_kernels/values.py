"""The check of a tensor's values; it is here because it has a compiled part.

As every check of values it is called inside the raw ops: always on CPU, on a GPU only under
TPPO_CHECK=1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor


@functools.cache
def _int64_within() -> Callable[..., bool] | None:
    """The compiled check of labels, None without the compiled part, which is loaded on first use.

    `torch.aminmax` and reading its two results take longer than the values of most calls do.
    """
    try:
        from .._C import int64_within
    except ImportError:
        return None
    return int64_within


def _within(x: Tensor, low: float, high: float, open_low: bool) -> bool:
    """Whether all values of x, not 0-d, lie in the range, at the lowest cost; NaN does not."""
    if x.numel() == 0:
        return True
    compiled = _int64_within()
    if (compiled and x.dtype == torch.int64 and x.is_cpu and x.is_contiguous()
            and not open_low):
        return compiled(x.data_ptr(), x.numel(), low, high)
    least, most = torch.aminmax(x)
    smallest, largest = least.item(), most.item()
    return (low < smallest if open_low else low <= smallest) and largest <= high


def values_between(op: str, name: str, x: Tensor | None, low: float, high: float,
                   valid: Tensor | Callable[[], Tensor] | None = None, *,
                   open_low: bool = False) -> None:
    """Checks that the valid values of x lie in [low, high] (or (low, high]); names the first.

    `valid` may be a function, which is called only when a value lies outside.
    """
    if x is None:
        return
    if x.dim() == 0:
        value = x.item()
        if (low < value if open_low else low <= value) and value <= high:
            return
    elif _within(x, low, high, open_low):
        return
    good = (x > low if open_low else x >= low) & (x <= high)
    if valid is not None:
        valid = valid() if callable(valid) else valid
        good = good | (~valid.expand_as(x) if x.dim() else ~valid.any())
    if not bool(good.all()):
        bound = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if high == math.inf else ']'}"
        place = (~good).nonzero()[0].tolist()
        where = f"; the first stands at {', '.join(map(str, place))}" if place else ""
        raise ValueError(f"{op}: {name} holds {float(x[tuple(place)]):g}, expected values in "
                         f"{bound}{where}")
