"""Hostile batches of sequences, and how near a result must be to a formula in fp64.

A formula sees the valid tokens of each sequence, and nothing else: what stands at masked slots is
drawn from NaN, infinities and 1e38. An error is at most twice that of the formula in fp32, plus a
floor of `FLOOR` times the largest exact value or, for a sum, times the sum of what it adds up.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from guided import REFUSED, Target, Wrong
from torch import Tensor

import tppo_kernels as tk
from tppo_kernels._core.backends import missing

FLOOR = 1e-6
SEQUENTIAL = 1e-5  # gae and whiten, whose rounding adds up along a sequence
TINY = 1e-42  # the last bits of denormal numbers
BACKENDS = ("reference", "auto")
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16)
Results = dict[str, tuple[Tensor, float]]  # by name: the value, and what it adds up
T = TypeVar("T")


class Batch:
    """Sequences, padded or packed: which tokens are valid, and tensors in that layout."""

    def __init__(self, seed: int) -> None:
        self.choose, self.g = random.Random(seed), torch.Generator().manual_seed(seed % 2**63)
        pick = self.choose.choice
        self.batch, longest = pick((0, 1, 1, 2, 3, 4)), pick((0, 1, 2, 3, 5, 8, 17, 33))
        self.packed = pick((False, True))
        if self.packed:
            lengths = [self.choose.randint(0, longest) for _ in range(self.batch)]
            ends = torch.tensor([0, *lengths]).cumsum(0)
            self.cu: Tensor | None = ends.to(torch.int32)
            self.shape: tuple[int, ...] = (int(ends[-1]),)
            slots = [range(int(a), int(b)) for a, b in zip(ends, ends[1:], strict=False)]
        else:
            self.cu, self.shape = None, (self.batch, longest)
            slots = [range(b * longest, (b + 1) * longest) for b in range(self.batch)]
        self.valid = self._valid(slots)
        self.given = None if self.kind == "none" else self._as_given(self.valid)
        flat = self.valid.reshape(-1)
        self.rows = [
            torch.tensor([i for i in of_one if flat[i]], dtype=torch.long) for of_one in slots
        ]
        self.poison = pick((float("nan"), float("inf"), float("-inf"), 1e38, 0.0))

    def _valid(self, slots: Sequence[range]) -> Tensor:
        pick = self.choose.choice
        self.kind = pick(("none", "holes", "holes", "left", "right", "row", "nothing"))
        valid = torch.ones(self.shape, dtype=torch.bool).reshape(-1)
        for number, of_one in enumerate(slots):
            kept = self.choose.randint(0, len(of_one))
            for place, i in enumerate(of_one):
                valid[i] = {
                    "none": True,
                    "holes": self.choose.random() < 0.6,
                    "left": place >= kept,
                    "right": place < kept,
                    "row": number > 0,
                    "nothing": False,
                }[self.kind]
        return valid.reshape(self.shape)

    def _as_given(self, valid: Tensor) -> Tensor:
        """The mask in one of the dtypes that are taken, and in any strides."""
        kind = self.choose.choice((torch.bool, torch.bool, torch.int64, torch.uint8))
        return self.strided(valid.to(kind) * (1 if kind == torch.bool else 3))

    def strided(self, x: Tensor) -> Tensor:
        """The same values, in a third of the calls not contiguous."""
        if x.dim() == 0 or self.choose.random() < 0.67:
            return x
        if x.dim() > 1 and self.choose.random() < 0.3:
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        wide = torch.zeros((*x.shape[:-1], 2 * x.shape[-1] + 3), dtype=x.dtype)
        view = wide[..., 1 : 2 * x.shape[-1] + 1 : 2]
        view.copy_(x)
        return view

    def randn(self, *shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=self.g)

    def dtype(self) -> torch.dtype:
        return self.choose.choice(DTYPES)

    def tokens(self, *inner: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        """Values of tokens, hostile where masked."""
        x = (self.randn(*self.shape, *inner, scale=scale) + shift).to(self.dtype())
        mask = self.valid.reshape(*self.shape, *[1] * len(inner))
        return self.strided(torch.where(mask, x, torch.tensor(self.poison).to(x.dtype)))

    def sequences(self, scale: float = 1.0) -> Tensor:
        """A value of each sequence, hostile where it has no valid token."""
        x = self.randn(self.batch, scale=scale).to(self.dtype())
        for b, rows in enumerate(self.rows):
            if not len(rows):
                x[b] = self.poison
        return self.strided(x)

    def of(self, x: Tensor) -> list[Tensor]:
        """The valid tokens of each sequence."""
        flat = x.reshape(-1, *x.shape[len(self.shape) :])
        return [flat[rows] for rows in self.rows]

    def back(self, parts: Sequence[Tensor], inner: Sequence[int] = ()) -> Tensor:
        """Values of valid tokens in the layout of the batch, 0 elsewhere."""
        found = torch.zeros((self.valid.numel(), *inner), dtype=torch.float64)
        for rows, part in zip(self.rows, parts, strict=True):
            found[rows] = part.double()
        return found.reshape(*self.shape, *inner)

    def layout(self) -> dict[str, Tensor | None]:
        return {"mask": self.given, "cu_seqlens": self.cu}


class NearAnEdge(Exception):
    """The exact value decides nothing here: one of two gradients is right by rounding."""


def operator_target(name: str, run: Callable[[int], str | None], share: int) -> Target:
    """Calls `run` with a seed, on a backend; one near an edge is counted as refused."""

    def call(data: bytes) -> str | None:
        seed = int.from_bytes(data[:8], "little")
        try:
            return on_a_backend(seed, lambda: run(seed // 2))
        except NearAnEdge:
            return REFUSED

    return Target(name, call, share)


def on_a_backend(seed: int, call: Callable[[], T]) -> T:
    """The call on the reference or on what the library chooses."""
    if seed % 2 and missing("cpp") is None:
        return call()
    with tk.use_backend("reference"):
        return call()


def largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def error(got: Tensor, exact: Tensor) -> float:
    """The largest difference; infinite for NaN against a number."""
    if not got.numel():
        return 0.0
    a, b = got.double(), exact.double()
    same = (a == b) | (a.isnan() & b.isnan())
    off = torch.where(same, 0.0, (a - b).abs())
    return float(torch.where(off.isnan(), float("inf"), off).max())


def hold(
    name: str, got: Tensor, exact: Tensor, eager: Tensor, scale: float = 0.0, floor: float = FLOOR
) -> None:
    """Raises Wrong where a result is farther from the exact one than it may be."""
    if got.shape != exact.shape:
        raise Wrong(f"{name}: shape {list(got.shape)}, expected {list(exact.shape)}")
    off, theirs = error(got, exact), error(eager, exact)
    allowed = 2 * theirs + floor * max(scale, largest(exact)) + TINY
    if not off <= allowed:
        raise Wrong(f"{name}: off by {off:.3e}, allowed {allowed:.3e}: {got}, expected {exact}")


def exactly_zero(name: str, x: Tensor, batch: Batch) -> None:
    """Raises Wrong where a masked slot is not 0."""
    if bool((x[~batch.valid] != 0).any()):
        raise Wrong(f"{name}: {x[~batch.valid]} at masked slots, expected 0")


def differentiated(
    results: Mapping[str, tuple[Tensor, float]],
    slopes: Mapping[str, Tensor],
    leaves: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The gradients of a random projection of the results."""
    loss = sum(
        ((x * slopes[name].to(x.dtype)).sum() for name, (x, _) in results.items()), torch.zeros(())
    )
    if not loss.requires_grad:
        return {name: torch.zeros_like(x) for name, x in leaves.items()}
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(x) if g is None else g
        for (name, x), g in zip(leaves.items(), found, strict=True)
    }


def compare(
    name: str,
    batch: Batch,
    leaves: Mapping[str, Tensor],
    actual: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    formula: Callable[[dict[str, Tensor]], Results],
    scales: Mapping[str, float] | None = None,
) -> None:
    """An operator's values and gradients against the formula in fp64 and in fp32.

    scales: what sums the gradients are, by leaf; of other leaves their largest value counts.
    """

    def fresh(dtype: torch.dtype | None) -> dict[str, Tensor]:
        return {
            key: (x.detach() if dtype is None else x.detach().to(dtype)).requires_grad_()
            for key, x in leaves.items()
        }

    ours, theirs, truth = fresh(None), fresh(None), fresh(torch.float64)
    exact = formula(truth)
    eager = formula({key: x.float() for key, x in theirs.items()})
    slopes = {key: torch.randn(x.shape, generator=batch.g) for key, (x, _) in exact.items()}
    got = actual(ours)
    for key, (value, scale) in exact.items():
        hold(f"{name}.{key}", got[key].detach(), value.detach(), eager[key][0].detach(), scale)
        for kind in (got[key], value):
            if kind.shape == batch.shape:
                exactly_zero(f"{name}.{key}", kind.detach(), batch)
    gradients = [
        differentiated(r, slopes, x)
        for r, x in (({k: (v, 0.0) for k, v in got.items()}, ours), (eager, theirs), (exact, truth))
    ]
    for key in leaves:
        a, e, t = (of[key] for of in gradients)
        if a.dtype != leaves[key].dtype:
            raise Wrong(f"{name}: gradient of {key} in {a.dtype}, expected {leaves[key].dtype}")
        hold(f"{name}: gradient of {key}", a, t, e, (scales or {}).get(key, 0.0))
        if key not in ("weight", "bias"):
            exactly_zero(f"{name}: gradient of {key}", a, batch)
