"""`linear_logprobs` on the CPU: torch's products, and the row formulas in C++."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ... import _C
from ..._kernels.memory import FP64
from ..token_logprobs import _cpp as token
from . import reference
from .reference import Scale, Stats

BWD_ARGUMENTS, STATS = 20, 15  # of the raw op, and the place of `stats` among them


def supports(*args: Any) -> str | None:
    """The reason for refusing, or None."""
    if any(isinstance(x, Tensor) and x.dtype == torch.float64 and x.dim() for x in args):
        return FP64
    if len(args) == BWD_ARGUMENTS and args[STATS].shape[0] > 4:
        return "the exponentials were kept by blocks, as Triton does"
    return None


def _stats(x: Tensor, targets: Tensor, scale: Scale) -> Stats:
    return Stats(*token.fwd(x, targets, None, *scale, None))


def _gradient(g_logprobs: Tensor | None, g_entropy: Tensor | None, x: Tensor, targets: Tensor,
              owned: Tensor | None, scale: Scale, stats: Stats, out: Tensor) -> None:
    """In place or not: each block of a row is read before it is written."""
    extra = reference.surplus(g_logprobs, x, owned, scale)
    rows = token._Rows(x, targets, None, *scale, None)
    grads = [None if g is None else token.dense(g) for g in (g_logprobs, g_entropy)]
    kept = [token.dense(s) for s in stats[1:4]]
    _C.token_logprobs_bwd(rows.tuple, *map(token.address, grads), *map(token.address, kept),
                          x.shape[1], out.data_ptr())
    if extra is not None:
        out[:, :1] -= extra


def _kept(x: Tensor, targets: Tensor, scale: Scale, out: Tensor) -> Stats:
    stats = _stats(x, targets, scale)
    rows = token._Rows(x, x.new_empty(x.shape[0], dtype=torch.int64), None, *scale, None)
    top = token.dense(stats.top)
    _C.linear_exponentials(rows.tuple, top.data_ptr(), out.dtype == torch.float16, out.data_ptr())
    return stats


def _gradient_of_kept(g_logprobs: Tensor | None, g_entropy: Tensor | None, e: Tensor,
                      targets: Tensor, owned: Tensor | None, scale: Scale, stats: Stats,
                      out: Tensor) -> None:
    here = targets if owned is None else torch.where(owned, targets, -1)
    rows = token._Rows(e, here, None, *scale, None)
    grads = [None if g is None else token.dense(g) for g in (g_logprobs, g_entropy)]
    kept = [token.dense(s) for s in stats[:4]]
    _C.linear_gradient(rows.tuple, *map(token.address, grads), *map(token.address, kept),
                       out.data_ptr())


STEPS = reference.Steps(_stats, _kept, _gradient, _gradient_of_kept)
fwd = functools.partial(reference.fwd, steps=STEPS)
bwd = functools.partial(reference.bwd, steps=STEPS)
frozen = reference.frozen
