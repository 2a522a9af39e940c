"""What the backends of `ppo_loss` and `value_loss` share: how a batch lies in memory, and the
denominators of its reduction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._core.check import Reduction
from .memory import refuses_fp64

ONE, TOKENS, SEQUENCES, GIVEN = range(4)  # Share::Count of csrc/loss.h
WORKSPACE = 1024 * 13  # doubles: kMaxBlocks of csrc/loss.cuh x kPolicySums of csrc/ppo_loss.h


def supports(call: tuple) -> str | None:
    """The reason for refusing, or None."""
    # the tensors of tokens come first in a record, and in the terms of one
    return refuses_fp64((*call[:4], *getattr(call, "terms", ())[:4]))


class Share(NamedTuple):
    """scale = 1 / (count * length); c_b = 1 / tokens of b where `by_length`, else 1."""

    count_of: int
    denominator: Tensor | None
    length: Tensor | int
    by_length: bool

    @property
    def of_sequences(self) -> bool:
        """Whether it matters which sequence a token belongs to."""
        return self.by_length or self.count_of == SEQUENCES


def share_of(over: Reduction, like: Tensor) -> Share:
    """The denominators of a reduction, as `_math.sequence.reduction_weights` has them."""
    num_tokens, num_sequences, norm_length, reduction = over
    if reduction == "token-sum":
        return Share(ONE, None, 1, False)
    if reduction == "token-mean":
        return Share(TOKENS if num_tokens is None else GIVEN, num_tokens, 1, False)
    length: Tensor | int = 1
    if reduction == "seq-mean-token-sum-norm":
        length = like.shape[1] if norm_length is None else norm_length
    return Share(SEQUENCES if num_sequences is None else GIVEN, num_sequences, length,
                 reduction == "seq-mean-token-mean")


class Batch(NamedTuple):
    """B sequences of up to T tokens; element (b, t) of a column at b * stride + t * step.

    Packed tokens have stride 0 and count from `cu_seqlens[b]`. `columns`: as given, or copied
    where their tokens do not lie together.
    """

    batch: int
    tokens: int
    total: int
    cu_seqlens: Tensor | None
    mask: Tensor | None
    mask_stride: int
    columns: list[Tensor | None]
    strides: list[int]
    steps: list[int]


def arrange(columns: Sequence[Tensor | None], mask: Tensor | None, cu_seqlens: Tensor | None,
            by_sequence: bool) -> Batch:
    """The batch whose tokens are those of `columns[0]`, which is [B, T] or [N].

    Where it does not matter which sequence a token belongs to, no argument is [B] and all are
    dense, the tokens are cut into rows of a fixed length instead: the work is then spread evenly.
    """
    like = columns[0]
    assert like is not None
    total, padded = like.numel(), cu_seqlens is None
    kept: list[Tensor | None] = []
    strides, steps = [], []
    for x in (*columns, mask):
        stride, step = 0, 1
        if x is not None:
            step = int(x.shape == like.shape)
            if step and x.shape[-1] > 1 and x.stride(-1) != 1:
                x = x.contiguous()
            stride = 0 if step and not padded else x.stride(0)
        kept.append(x)
        strides.append(stride)
        steps.append(step)
    dense = not padded or all(x is None or x.is_contiguous() for x in kept)
    if not by_sequence and dense and all(steps):
        tile = 512 if total <= 1 << 19 else 4096
        return Batch(-(-total // tile), tile, total, None, kept[-1], tile, kept[:-1],
                     [tile] * len(columns), [1] * len(columns))
    offsets = None if cu_seqlens is None else cu_seqlens.contiguous()
    batch = like.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return Batch(batch, like.shape[-1], total, offsets, kept[-1], strides[-1], kept[:-1],
                 strides[:-1], steps[:-1])


def on_host(x: Tensor) -> bool:
    """Whether reading a 0-d tensor costs no synchronisation."""
    return x.is_cpu


def pair(x: Tensor | float | None, absent: float = 0.0) -> tuple[float, Tensor | None]:
    """A scalar as a kernel takes it: a number, or where it lies on a GPU, in its own type."""
    if not isinstance(x, Tensor):
        return absent if x is None else float(x), None
    return (x.item(), None) if on_host(x) else (0.0, x)


def policy_numbers(formula: Sequence) -> list[tuple[float, Tensor | None]]:
    """The nine scalars of `ppo_loss` as a kernel takes them; no bound is an infinite one."""
    return [pair(x, math.inf) for x in formula[:9]]


def workspace(like: Tensor) -> Tensor:
    """A buffer for the sums of every block; a kernel writes it before it reads it."""
    return torch.empty(WORKSPACE, dtype=torch.float64, device=like.device)


def like_slopes(slopes: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The derivatives and an empty result, with their elements in the same order in memory."""
    out = torch.empty_like(slopes, dtype=dtype)
    return (slopes if slopes.stride() == out.stride() else slopes.clone()), out
