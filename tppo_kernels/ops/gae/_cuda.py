"""`gae` on an NVIDIA GPU through the compiled extension, on the current stream.

17 B a token, each moved once, in one launch: a parallel scan by a warp or a block a sequence. Where
warps take sequences, a packed one that is long is taken by a block: the device knows its length.
Few long sequences are split over blocks, and a first launch reads them for the maps of their parts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import tppo_kernels._C as _C

from ..._kernels.launch import current_stream, launching_on, scalar
from ..._kernels.memory import DTYPES, address, supports
from .reference import GaeCall

__all__ = ["fwd", "supports"]

CHUNK = 2048  # tokens that a block takes at once
NARROW = 512  # tokens up to which a warp is enough for a sequence, where sequences are many
BUSY = 264  # blocks, two for each multiprocessor of a large GPU; the same on all, as results are


class Tokens(NamedTuple):
    """This and the following are structs of csrc/kernels.h; `data` is an address, 0 for none."""

    data: int  # [B, T] or [N]
    dtype: int
    stride: int  # elements from row to row


class Mask(NamedTuple):
    """As `Tokens`, of bool; none is all True."""

    data: int  # [B, T] or [N]
    stride: int


class PerSequence(NamedTuple):
    """A number a sequence, or one for all (stride 0); `value` where there is no address."""

    data: int  # [B] or []
    dtype: int
    stride: int
    value: float


class Sequences(NamedTuple):
    """Where sequences begin."""

    offsets: int  # [B + 1] int32, or none: B rows of T
    B: int
    T: int


class GaeInputs(NamedTuple):
    """What a walk reads."""

    sequences: Sequences
    rewards: Tokens
    values: Tokens
    mask: Mask
    gamma: PerSequence
    lam: PerSequence
    value_lam: PerSequence
    bootstrap: PerSequence


def dense(x: Tensor | None) -> Tensor | None:
    """Per-token data [B, T] or [N] with adjacent tokens; rows may lie apart."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def rows(x: Tensor | None) -> Tokens:
    """Of dense [B, T] or [N]."""
    return Tokens(0, 0, 0) if x is None else Tokens(x.data_ptr(), DTYPES[x.dtype], x.stride(0))


def mask_rows(mask: Tensor | None) -> Mask:
    """Of a dense mask."""
    return Mask(0, 0) if mask is None else Mask(mask.data_ptr(), mask.stride(0))


def column(x: Tensor | None) -> tuple[Tensor | None, PerSequence]:
    """A 0-d or [B] argument, or 0: what has to stay alive, and its struct."""
    value = 0.0
    if x is not None and x.dim() == 0:
        value, x = scalar(x)
    elif x is not None and x.dtype == torch.float64:
        x = x.float()
    if x is None:
        return None, PerSequence(0, 0, 0, value)
    return x, PerSequence(x.data_ptr(), DTYPES[x.dtype], x.stride(0) if x.dim() else 0, 0.0)


def plan(batch: int, tokens: int) -> tuple[bool, int]:
    """(whether a block walks a sequence, or a warp; into how many parts a sequence is split).

    By shapes alone: the same call gives the same bits. A split costs a second reading.
    """
    length = tokens // max(1, batch)
    if length <= NARROW and batch >= 1024:
        return False, 1
    chunks = -(-length // CHUNK)
    return True, min(chunks, -(-BUSY // batch)) if batch < BUSY and chunks >= 4 else 1


class Arguments:
    """The arguments of a walk as the extension takes them, and the tensors behind them, alive."""

    def __init__(self, call: GaeCall):
        rewards, values, mask, gamma, lam, value_lam, bootstrap, cu_seqlens = call
        self.batch = rewards.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.wide, self.parts = plan(self.batch, rewards.numel())
        tokens = [dense(x) for x in (rewards, values, mask)]
        offsets = None if cu_seqlens is None else cu_seqlens.contiguous()
        pairs = [column(x) for x in (gamma, lam, lam if value_lam is None else value_lam,
                                     bootstrap)]
        maps = None if self.parts == 1 else torch.empty(
            4 * self.batch * self.parts, dtype=torch.float32, device=rewards.device)
        self.alive = (tokens, offsets, pairs, maps)
        self.maps = address(maps)
        self.inputs = GaeInputs(
            Sequences(address(offsets), self.batch, rewards.shape[-1]), rows(tokens[0]),
            rows(tokens[1]), mask_rows(tokens[2]), *(struct for _, struct in pairs))


def fwd(call: GaeCall) -> tuple[Tensor, Tensor]:
    """(advantages, returns), fp32, of padded [B, T] or packed [N] inputs."""
    rewards = call.rewards
    advantages = torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device)
    returns = torch.empty_like(advantages)
    if rewards.numel():
        with launching_on(rewards):
            given = Arguments(call)
            _C.gae_fwd_cuda(given.inputs, given.wide, given.parts, given.maps,
                            advantages.data_ptr(), returns.data_ptr(), current_stream(rewards))
    return advantages, returns
