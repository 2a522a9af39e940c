"""The specification of `response_states` in plain PyTorch.

Both directions are gathers: a state lies at `first + slot`, so a slot lies at `position - first`.
A gather has one writer an output, hence the backward is deterministic.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._core.packed import sequence_index


class ResponseStatesCall(NamedTuple):
    """The arguments of a raw call."""

    full: Tensor  # [B, L, ...] or [N, ...]
    prompt_length: Tensor  # [] or [B]
    mask: Tensor | None  # [B, T] bool
    cu_seqlens: Tensor | None  # [B + 1] int32
    T: int
    align: str


class ResponseStatesGradient(NamedTuple):
    """The arguments of a raw call of backward."""

    grad: Tensor  # [B, T, ...], or [B, ...] for "bootstrap"
    prompt_length: Tensor  # [] or [B]
    mask: Tensor | None  # [B, T] bool
    cu_seqlens: Tensor | None  # [B + 1] int32
    length: int  # L or N
    T: int
    align: str


def window(prompt_length: Tensor, mask: Tensor | None, batch: int, T: int,
           align: str) -> tuple[Tensor, Tensor]:
    """(position of each sequence's first state [B], which states are wanted [B, S]).

    S is T; for "bootstrap" it is 1, the state at the last valid token.
    """
    device = prompt_length.device
    prompt = prompt_length.long().expand(batch)  # [B]
    wanted = torch.ones(batch, T, dtype=torch.bool, device=device) if mask is None else mask
    if align == "reward":
        return prompt, wanted
    if align != "bootstrap":
        return prompt - 1, wanted
    ordinal = torch.where(wanted, torch.arange(1, T + 1, device=device), 0)  # [B, T]
    count = torch.nn.functional.pad(ordinal, (1, 0)).amax(1)  # [B], 0 where nothing is valid
    return prompt + count - 1, (count > 0)[:, None]


def positions(first: Tensor, slots: int, cu_seqlens: Tensor | None,
              length: int) -> tuple[Tensor, Tensor]:
    """(position of each wanted state in its sequence, whether it lies inside)."""  # [B, S] each
    position = first[:, None] + torch.arange(slots, device=first.device)
    end = length if cu_seqlens is None else (cu_seqlens[1:] - cu_seqlens[:-1])[:, None]
    return position, (position >= 0) & (position < end)


def fwd(call: ResponseStatesCall) -> Tensor:
    """The wanted states, 0 where masked; NaN for a valid slot outside its sequence."""
    full, prompt_length, mask, cu_seqlens, T, align = call
    packed = cu_seqlens is not None
    batch = cu_seqlens.shape[0] - 1 if cu_seqlens is not None else full.shape[0]
    length, inner = (full.shape[0], full.shape[1:]) if packed else (full.shape[1], full.shape[2:])
    first, wanted = window(prompt_length, mask, batch, T, align)
    position, inside = positions(first, wanted.shape[1], cu_seqlens, length)
    keep = (wanted & inside).reshape(*wanted.shape, *[1] * len(inner))  # [B, S, ...]
    nan = torch.full((), float("nan"), dtype=full.dtype, device=full.device)
    other = torch.where(wanted.reshape(keep.shape), nan, torch.zeros_like(nan))
    if length == 0:
        states = other.expand(*wanted.shape, *inner).clone()
    else:
        start = 0 if cu_seqlens is None else cu_seqlens[:-1, None]
        row = (start + torch.where(inside, position, 0)).clamp(0, length - 1)
        batch_index = torch.arange(batch, device=full.device)[:, None]
        states = torch.where(keep, full[row] if packed else full[batch_index, row], other)
    return states.squeeze(1) if align == "bootstrap" else states


def bwd(call: ResponseStatesGradient) -> Tensor:
    """The gradient of `full`: `grad` at the states that were taken, 0 elsewhere."""
    grad, prompt_length, mask, cu_seqlens, length, T, align = call
    batch = grad.shape[0]
    first, wanted = window(prompt_length, mask, batch, T, align)
    grad = grad[:, None] if align == "bootstrap" else grad  # [B, S, ...]
    slots, inner = wanted.shape[1], grad.shape[2:]
    position = torch.arange(length, device=grad.device)
    if cu_seqlens is None:
        owner = torch.arange(batch, device=grad.device)[:, None]  # [B, 1]
        slot = position - first[:, None]  # [B, L]
    else:
        owner = sequence_index(length, cu_seqlens)  # [N]
        slot = position - cu_seqlens[owner] - first[owner]
    if slots == 0 or batch == 0:
        return grad.new_zeros(*slot.shape, *inner)
    inside = (slot >= 0) & (slot < slots)
    slot = slot.clamp(0, slots - 1)
    taken = (inside & wanted[owner, slot]).reshape(*slot.shape, *[1] * len(inner))
    return torch.where(taken, grad[owner, slot], grad.new_zeros(()))
