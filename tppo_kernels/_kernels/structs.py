"""The structs of csrc/loss.h as the compiled backends of `ppo_loss` and `value_loss` fill them.

Tensors are addresses, 0 for none: whoever fills a struct keeps the tensors alive until the kernel
has been called.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import losses
from .losses import Batch, pair
from .memory import DTYPES, address

SCALARS = {**DTYPES, torch.float64: 3, torch.int64: 4, torch.int32: 5}  # ScalarType of csrc/loss.h


class Layout(NamedTuple):
    """Where sequences begin, and their mask."""

    B: int
    T: int
    N: int
    offsets: int  # [B + 1] int32, or none: rows of T
    mask: int  # [B, T] or [N] bool, or none
    mask_stride: int


class Column(NamedTuple):
    """A per-token tensor; element (b, t) at b * stride + t * step."""

    data: int
    dtype: int  # of DTYPES
    stride: int
    step: int


class Scalar(NamedTuple):
    """A number, or where it lies on a GPU."""

    value: float
    device: int
    dtype: int  # of SCALARS


class Share(NamedTuple):
    """The denominators of a reduction: `losses.Share`."""

    count_of: int
    count: Scalar  # type: ignore[assignment]  # a tuple has a method of that name
    length: Scalar
    by_length: bool


class Slopes(NamedTuple):
    """Derivatives that backward scales into `out`."""

    slopes: int  # [count]
    count: int  # type: ignore[assignment]
    dtype: int  # of `out`, of DTYPES
    out: int  # [count]


NO_COLUMN = Column(0, 0, 0, 1)
NO_SLOPES = Slopes(0, 0, 0, 0)


def layout(batch: Batch) -> Layout:
    """Of a batch."""
    return Layout(batch.batch, batch.tokens, batch.total, address(batch.cu_seqlens),
                  address(batch.mask), batch.mask_stride)


def columns(batch: Batch) -> list[Column]:
    """Of a batch, in its order."""
    return [NO_COLUMN if x is None else Column(x.data_ptr(), DTYPES[x.dtype], stride, step)
            for x, stride, step in zip(batch.columns, batch.strides, batch.steps, strict=True)]


def scalar(x: tuple[float, Tensor | None], alive: list) -> Scalar:
    """Of `losses.pair`; a tensor whose address is in it goes to `alive`."""
    value, there = x
    if there is None:
        return Scalar(value, 0, 0)
    alive.append(there)
    return Scalar(value, there.data_ptr(), SCALARS[there.dtype])


def share(given: losses.Share, alive: list) -> Share:
    """Of the denominators; tensors whose addresses are in it go to `alive`."""
    return Share(given.count_of, scalar(pair(given.denominator), alive),
                 scalar(pair(given.length), alive), given.by_length)


def slopes(given: Tensor, out: Tensor) -> Slopes:
    """Of `losses.like_slopes`."""
    return Slopes(given.data_ptr(), given.numel(), DTYPES[out.dtype], out.data_ptr())
