"""The specification of `place_rewards`: on the host, in double precision, in a fixed order."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._math.sequence import compute_dtype

OP = "place_rewards"


class PlaceRewardsCall(NamedTuple):
    """The arguments of a raw call."""

    mask: Tensor  # [B, T] or [N] bool
    terminal: Tensor | None  # [B]
    spans: Tensor  # [S, 3] int64: sequence, first token, the token behind the last
    span_values: Tensor  # [S]
    dense: Tensor | None  # [B, T] or [N]
    cu_seqlens: Tensor | None  # [B + 1] int32
    span_at: str
    on_masked: str


def fwd(call: PlaceRewardsCall) -> tuple[Tensor, Tensor]:
    """(rewards [B, T] or [N], dropped []); see `tppo_kernels.place_rewards`."""
    with torch.device("cpu"):  # whatever torch's default device is
        return _place(call)


def _place(call: PlaceRewardsCall) -> tuple[Tensor, Tensor]:
    """Every reward is one placement (slot, amount): dense ones, terminal ones, then spans in order.

    Slots count through the flattened mask.
    """
    mask, terminal, spans, span_values, dense, cu_seqlens, span_at, on_masked = call
    valid = mask.detach().cpu().reshape(-1)  # [S]
    begin, end = bounds(mask, cu_seqlens)  # [B] each
    back = torch.where(valid, torch.arange(len(valid)), -1)
    back = back.cummax(0).values if len(valid) else back  # the action token at or before a slot
    parts = [_dense(dense), _terminal(terminal, begin, end, back),
             _spans(spans.cpu(), span_values, begin, end, span_at)]
    slot, amount, source = (torch.cat(x) for x in zip(*parts, strict=True))
    placed = amount != 0  # a NaN is a reward
    slot, amount, source = slot[placed], amount[placed], source[placed]
    masked = ~valid[slot]
    dropped = int(masked.sum()) if on_masked == "drop" else 0
    if on_masked == "error" and bool(masked.any()):
        _refuse(slot, amount, source, masked, begin, end, mask, "an action token; `on_masked` "
                "\"move_back\" or \"drop\" allows it")
    if on_masked == "move_back":
        owner = torch.searchsorted(end, slot, right=True)
        nowhere = masked & (back[slot] < begin[owner])
        if bool(nowhere.any()):
            _refuse(slot, amount, source, nowhere, begin, end, mask,
                    "an action token at or before it to move to")
        slot = back[slot]
    if on_masked == "drop":
        slot, amount = slot[~masked], amount[~masked]
    rewards = torch.zeros(len(valid), dtype=torch.float64).index_add_(0, slot, amount)
    floats = [x for x in (terminal, dense, span_values) if x is not None]
    return (rewards.reshape(mask.shape).to(mask.device, compute_dtype(*floats)),
            torch.full((), dropped, device=mask.device))


def bounds(mask: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """The first slot of each sequence, and the one behind its last."""  # [B] each, int64
    if cu_seqlens is None:
        edges = torch.arange(mask.shape[0] + 1) * mask.shape[1]
    else:
        edges = cu_seqlens.cpu().long()
    return edges[:-1], edges[1:]


def _dense(dense: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(slot, amount, source -1) of a dense tensor."""
    amount = torch.zeros(0) if dense is None else dense.detach().cpu().reshape(-1)
    return torch.arange(len(amount)), amount.double(), torch.full((len(amount),), -1)


def _terminal(terminal: Tensor | None, begin: Tensor, end: Tensor,
              back: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(slot, amount, source -2) of the terminal rewards, at the last action tokens."""
    if terminal is None:
        return _dense(None)
    amount = terminal.detach().cpu().double()
    last = torch.where(end > begin, back[(end - 1).clamp(min=0)] if len(back) else begin - 1, -1)
    missing = (amount != 0) & (last < begin)
    if bool(missing.any()):
        b = int(missing.nonzero()[0])
        raise ValueError(f"{OP}: terminal is {float(amount[b]):g} for sequence {b}, which has no "
                         "action token, expected 0 there")
    placed = amount != 0
    return last[placed], amount[placed], torch.full((int(placed.sum()),), -2)


def _spans(spans: Tensor, values: Tensor, begin: Tensor, end: Tensor,
           span_at: str) -> tuple[Tensor, Tensor, Tensor]:
    """(slot, amount, source: the number of the span)."""
    b, first, last = spans.long().unbind(1)  # half-open [first, last)
    amount, number = values.detach().cpu().double(), torch.arange(len(spans))
    known = (b >= 0) & (b < len(begin))
    tokens = (end - begin)[torch.where(known, b, 0)] if len(begin) else torch.zeros_like(b)
    wrong = ~known | (first < 0) | (first >= last) | (last > tokens)
    if bool(wrong.any()):
        i = int(wrong.nonzero()[0])
        rest = (f"0 <= start < end <= {int(tokens[i])}, the tokens of sequence {int(b[i])}"
                if known[i] else f"a sequence in [0, {len(begin)})")
        raise ValueError(f"{OP}: spans[{i}] is (b, start, end) = {tuple(spans[i].tolist())}, "
                         f"expected {rest}")
    if len(spans) == 0 or span_at == "last":
        return begin[b] + last - 1 if len(spans) else number, amount, number
    count = last - first
    amount = amount / count if span_at == "spread" else amount
    number = number.repeat_interleave(count)
    inner = torch.arange(len(number)) - (count.cumsum(0) - count)[number]
    return (begin[b] + first)[number] + inner, amount[number], number


def _refuse(slot: Tensor, amount: Tensor, source: Tensor, wrong: Tensor, begin: Tensor,
            end: Tensor, mask: Tensor, expected: str) -> None:
    """Names the first offending slot of the layout, and what put a reward there."""
    i = int(torch.where(wrong, slot, 1 << 62).argmin())
    at, number = int(slot[i]), int(source[i])
    b = int(torch.searchsorted(end, at, right=True))
    name = f"spans[{number}]" if number >= 0 else "dense"
    packed = f" (packed slot {at})" if mask.dim() == 1 else ""
    raise ValueError(f"{OP}: {name} puts {float(amount[i]):g} on token {at - int(begin[b])} of "
                     f"sequence {b}{packed}, where mask is False, expected {expected}")
