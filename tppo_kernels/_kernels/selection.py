"""Which rows of a batch the linear operators compute: chosen on the host or on the device."""

from __future__ import annotations

import torch
from torch import Tensor


class Selection:
    """The rows of N flattened tokens that are computed, in M slots; no host read off the CPU.

    rows: the caller's list. capacity: the first so many valid rows, found on the device. Neither:
    the valid rows on a CPU, fewer than M slots then; elsewhere every row.
    """

    def __init__(self, n: int, mask: Tensor | None, rows: Tensor | None, capacity: int | None,
                 device: torch.device):
        self.n = n
        self.lost: Tensor | None = None  # [N]: valid rows that have no slot
        valid = None if mask is None else mask.reshape(-1)
        everything = torch.arange(n, device=device)
        if rows is not None:
            here = (rows >= 0) & (rows < n)
            if valid is not None and n:
                here = here & valid[rows.clamp(0, n - 1)]
            self.slots = torch.where(here, rows, n)  # [M], N where a slot has no row
        elif capacity is not None:
            valid = torch.ones_like(everything, dtype=torch.bool) if valid is None else valid
            place = torch.where(valid, valid.cumsum(0) - 1, capacity).clamp(max=capacity)
            self.slots = everything.new_full((capacity + 1,), n)
            self.slots = self.slots.scatter(0, place, everything)[:capacity]
        elif valid is not None and device.type == "cpu":
            self.slots = everything[valid]
        else:
            self.slots = everything if valid is None else torch.where(valid, everything, n)
        self.count = self.slots.shape[0]
        self.whole = valid is None and rows is None and capacity is None  # every row, in order
        self.full = device.type == "cpu" and bool((self.slots < n).all())  # every slot has a row
        if valid is not None and (rows is not None or capacity is not None):
            reached = self._scatter(torch.ones_like(self.slots, dtype=torch.bool))
            lost = valid & ~reached
            self.lost = lost if device.type != "cpu" or bool(lost.any()) else None

    def take(self, x: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        """Slots first to last of x [N, ...]; 0 in a slot without a row."""  # [R, ...]
        if self.whole:
            return x[first:last]
        slots = self.slots[first:last]
        if self.full:
            return x[slots]
        if self.n == 0:
            return x.new_zeros(slots.shape[0], *x.shape[1:])
        here = (slots < self.n).reshape(-1, *[1] * (x.dim() - 1))
        return torch.where(here, x[slots.clamp(max=self.n - 1)], torch.zeros_like(x[:1]))

    def _scatter(self, x: Tensor) -> Tensor:
        out = x.new_zeros(self.n + 1, *x.shape[1:])
        return out.index_copy_(0, self.slots, x)[:self.n]

    def put(self, x: Tensor) -> Tensor:
        """x [M, ...] in its rows; 0 in all others, NaN in a valid one without a slot."""
        out = self._scatter(x[:self.count])
        if self.lost is None:
            return out
        return out.masked_fill_(self.lost.reshape(-1, *[1] * (x.dim() - 1)), float("nan"))

    def mark(self) -> Tensor | None:
        """What sums over rows are divided by: NaN where a valid one has no slot, never a plausible
        number; else 1, and None where that is known.
        """  # []
        if self.lost is None or not self.n:
            return None
        return torch.where(self.lost.any(), float("nan"), 1.0)
