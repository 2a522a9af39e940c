"""Rewards of sequences, spans and tokens, put where the trajectory can be paid for them."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..._core.check import INT64_MAX, LABELS, Check, describe, offsets
from ..._core.keywords import suggests
from ..._core.op import Op
from ..._math.sequence import compute_dtype
from . import reference
from .reference import PlaceRewardsCall

_op = Op("place_rewards")


def sample_inputs() -> tuple[tuple, dict]:
    """Arguments of a small call, in fp64: for the self-test."""
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(3, 17, generator=g) < 0.7
    terminal = torch.randn(3, generator=g, dtype=torch.float64)
    dense = torch.randn(3, 17, generator=g, dtype=torch.float64)
    return (mask,), {"terminal": terminal, "dense": dense, "spans": [(0, 2, 9, 1.0)],
                     "span_at": "spread", "on_masked": "drop"}


class PlacedRewards(NamedTuple):
    """The results of `place_rewards`, on the device of the mask, detached."""

    rewards: Tensor  # [B, T] or [N], fp32 (fp64 where a tensor of rewards is fp64)
    dropped: Tensor  # 0-d int64: how many non-zero rewards `on_masked="drop"` left out


def _fake(call: PlaceRewardsCall) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(call.terminal, call.dense, call.span_values)
    return (call.mask.new_empty(call.mask.shape, dtype=dtype),
            call.mask.new_empty((), dtype=torch.int64))


_fwd = _op.define("place_rewards_fwd -> (Tensor rewards, Tensor dropped)", reference.fwd, _fake,
                  record=PlaceRewardsCall)


def _pairs(check: Check, spans: Iterable | None, dtype: torch.dtype,
           device: torch.device) -> tuple[Tensor, Tensor]:
    """Spans as tensors: (b, start, end) [S, 3] int64 and values [S]."""
    if isinstance(spans, Sequence) and len(spans) == 2 and all(
            isinstance(x, Tensor) and x.dim() for x in spans) and spans[0].dim() == 2:
        check.tensor("spans[0]", spans[0], "S 3", LABELS)
        check.tensor("spans[1]", spans[1], "S")
        return spans[0].long(), spans[1]
    where, values = [], []
    if isinstance(spans, (str, Tensor)) or not isinstance(spans, (Iterable, type(None))):
        raise TypeError(f"{check.op}: spans is {describe(spans)}, expected (b, start, end, value) "
                        "tuples, or a pair of tensors [S, 3] and [S]")
    for i, span in enumerate(spans or ()):
        try:
            b, start, end, value = span
            where.append([operator.index(b), operator.index(start), operator.index(end)])
            values.append(float(value))
            if max(map(abs, where[-1])) > INT64_MAX:
                raise OverflowError
        except (TypeError, ValueError, OverflowError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{check.op}: spans[{i}] is {describe(span)}, expected (b, start, end, "
                       "value), three whole numbers of 64 bits and a number") from error
    return (torch.tensor(where, dtype=torch.int64, device=device).reshape(-1, 3),
            torch.tensor(values, dtype=dtype, device=device))


@suggests
def place_rewards(
        mask: Tensor | None,  # [B, T] or [N] bool or whole numbers
        *,
        terminal: Tensor | None = None,  # [B]
        spans: Iterable | None = None,
        dense: Tensor | None = None,  # [B, T] or [N]
        span_at: str = "last",
        on_masked: str = "error",
        cu_seqlens: Tensor | None = None,  # [B + 1] int32
        ) -> PlacedRewards:
    """The token rewards [B, T] or [N] that the given rewards add up to, each on an action token.

        terminal [B]                 at the last action token of each sequence
        spans (b, start, end, v)     v at token end - 1 ("last"), v at every token of start..end-1
                                     ("each"), or v / (end - start) at every one ("spread")
        dense [B, T] or [N]          where it stands

    mask: bool or whole numbers, the action mask (None: all tokens; `dense` or `cu_seqlens` then
    give the shape). spans: an iterable of tuples, or a pair of tensors, (b, start, end) int [S, 3]
    and values [S]; start and end count the tokens of sequence b, packed too. Rewards on one slot
    add up, in double precision. A non-zero reward on a masked slot follows `on_masked`: "error"
    names the first such slot; "move_back" moves it to the last action token before it in its
    sequence, an error if there is none; "drop" leaves it out and counts it. A non-zero terminal
    reward of a sequence without an action token is an error always. A reward of 0 is none; NaN is
    one.

    Works on the host by its nature: it reads its inputs, so it is no part of a CUDA graph.
    """
    check = Check("place_rewards")
    tokens = check.tokens(cu_seqlens)
    if mask is None and dense is not None:
        check.tensor("dense", dense, tokens)
        mask = torch.ones(dense.shape, dtype=torch.bool, device=dense.device)
    elif mask is None and cu_seqlens is not None:
        check.packing(cu_seqlens)
        mask = torch.ones(max(0, int(cu_seqlens[-1])), dtype=torch.bool,
                          device=cu_seqlens.device)
    if mask is None:
        check.tensor("mask", mask, tokens)  # neither dense nor cu_seqlens gives its shape
    mask = check.mask("mask", mask, tokens)
    if cu_seqlens is not None:
        check.packing(cu_seqlens)
        offsets("place_rewards", cu_seqlens, mask.shape[0])
    check.tensor("terminal", terminal, "B", optional=True)
    check.tensor("dense", dense, tokens, optional=True)
    check.choice("span_at", span_at, ("last", "each", "spread"))
    check.choice("on_masked", on_masked, ("error", "move_back", "drop"))
    floats = [x for x in (terminal, dense) if x is not None]
    where, values = _pairs(check, spans, compute_dtype(*floats), mask.device)
    with torch.no_grad():
        return PlacedRewards(*_fwd(PlaceRewardsCall(
            mask, terminal, where, values, dense, cu_seqlens, span_at, on_masked)))
