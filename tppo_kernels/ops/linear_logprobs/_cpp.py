"""`linear_logprobs` on the CPU: torch's products, and the formulas of a row in C++."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ... import _C
from ..._core.record import flat
from ..._kernels.memory import refuses_fp64
from ..._math.kept import Stats
from ..token_logprobs._cpp import addresses, rows_of
from ..token_logprobs._cpp import fwd as stats
from ..token_logprobs.reference import TokenLogprobsCall
from . import _chunked
from ._chunked import Rows, Slopes, at_column_0
from .reference import LinearLogprobsGradient

__all__ = ["STEPS", "bwd", "frozen", "fwd", "supports"]


def supports(call: tuple) -> str | None:
    """The reason for refusing a record of either linear operator, or None."""
    if isinstance(call, LinearLogprobsGradient) and call.stats.shape[0] > 4:
        return "the exponentials were kept by blocks, as Triton does"
    return refuses_fp64(flat(call))


def _exponentials(rows: Rows) -> Stats:
    count, out = rows.x.shape[0], rows.exponentials
    assert out is not None
    given, alive = rows_of(rows.call())
    found = [rows.x.new_empty(count) for _ in range(4)]
    logprobs, entropy, top, log_sum = (x.data_ptr() for x in found)
    _C.token_logprobs_fwd(given, logprobs, entropy, top, log_sum)
    _C.linear_exponentials(given, top, out.dtype == torch.float16, out.data_ptr())
    return Stats(*found)


def _gradient(slopes: Slopes, rows: Rows, stats: Stats, out: Tensor) -> None:
    """In place or not: each block of a row is read before it is written."""
    too_much = at_column_0(slopes, rows)
    given, alive = rows_of(rows.call())
    numbers, dense = addresses(*slopes[:2], *stats[1:4])
    _C.token_logprobs_bwd(given, *numbers, rows.x.shape[1], out.data_ptr())
    if too_much is not None:
        out[:, :1] -= too_much


def _gradient_of_exponentials(slopes: Slopes, rows: Rows, stats: Stats, out: Tensor) -> None:
    chunk = rows.chunk
    here = (chunk.targets if chunk.owned is None
            else torch.where(chunk.owned, chunk.targets, -1))
    given, alive = rows_of(TokenLogprobsCall(rows.x, here, None, chunk.scaling, None))
    numbers, dense = addresses(*slopes[:2], *stats[:4])
    _C.linear_gradient(given, *numbers, out.data_ptr())


STEPS = _chunked.Steps(stats, _exponentials, _gradient, _gradient_of_exponentials)
fwd = functools.partial(_chunked.fwd, steps=STEPS)
bwd = functools.partial(_chunked.bwd, steps=STEPS)
frozen = _chunked.frozen
