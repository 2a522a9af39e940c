"""Whitening of advantages, or of anything else, over the valid tokens of all processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..._core.check import FP32_MAX, Check, describe
from ..._core.keywords import suggests
from ..._core.op import Op
from ..._kernels.values import values_between
from ..._math.sequence import compute_dtype
from . import reference
from .reference import WhitenCall, WhitenStats

_op = Op("whiten", cpu=("cpp", "reference"), cuda=("triton", "reference"))

NBYTES_PER_TOKEN = 14  # x and the mask twice, the result: moments first, then whitening


def sample_inputs() -> tuple[tuple, dict]:
    """Arguments of a small call, in fp64: for the self-test."""
    g = torch.Generator().manual_seed(0)
    x = 3 + torch.randn(3, 17, generator=g, dtype=torch.float64)
    return (x, torch.rand(3, 17, generator=g) < 0.7), {}


def _check_values(call: WhitenCall) -> None:
    values_between("whiten", "eps", call.eps, 0.0, FP32_MAX)


def _fake(call: WhitenCall) -> Tensor:
    return call.x.new_empty(call.x.shape, dtype=compute_dtype(call.x))


_stats = _op.define("whiten_stats -> (Tensor moments)", reference.stats,
                    lambda call: call.x.new_empty(4, dtype=torch.float64), record=WhitenStats)
_fwd = _op.define("whiten_fwd -> (Tensor out)", reference.fwd, _fake, _check_values,
                  record=WhitenCall)


def check_group(check: Check, group: Any) -> None:
    """Checks that `group` is a process group to which this process belongs, or None."""
    if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(f"{check.op}: group is {describe(group)}, expected a "
                        "torch.distributed.ProcessGroup of this process, or None")


def over_group(moments: Tensor, group: Any) -> Tensor:
    """The statistics of all processes of the group; each takes part, with tokens or without."""
    if group is None:
        return moments
    parts = moments.new_empty(dist.get_world_size(group) * 4)
    dist.all_gather_into_tensor(parts, moments, group=group)
    return reference.merge(parts.reshape(-1, 4))  # in the order of ranks: the same bits on each


@suggests
def whiten(
        x: Tensor,  # [...]
        mask: Tensor | None = None,  # [...] bool or whole numbers
        *,
        unbiased: bool = True,
        shift_mean: bool = True,
        eps: float | Tensor = 1e-8,  # []
        group: Any = None) -> Tensor:
    """x shifted to mean 0 and scaled to variance 1 over its valid tokens.

        (x - mean) * rsqrt(var + eps)        + mean where `shift_mean` is False

    x: [B, T], packed [N], or any other shape; mask: bool or whole numbers, of the same shape: the
    train mask.
    var = M2 / (n - 1), or M2 / n where `unbiased` is False. var <= (1e-6 max|x|)^2 or n < 2 counts
    as no variance and gives 0 (or the mean). eps: a number >= 0, or 0-d.
    group: a ProcessGroup; (n, mean, M2, max|x|) are then those of all its processes, by one
    all-gather of four numbers. Every process must call, also one without a valid token.
    The result is fp32 (fp64 of fp64), detached, and 0 where masked.

    Source: n - 1 as verl, TRL and SkyRL, n as OpenRLHF; merging: Chan, Golub, LeVeque 1979.
    """
    check = Check("whiten")
    check.tensor("x", x, "...")
    mask = check.mask("mask", mask, "...")
    check.choice("unbiased", unbiased, (True, False))
    check.choice("shift_mean", shift_mean, (True, False))
    epsilon = check.scalar("eps", eps, low=0.0)
    check_group(check, group)
    moments = over_group(_stats(WhitenStats(x, mask)), group)
    return _fwd(WhitenCall(x, mask, moments, epsilon, unbiased, shift_mean))
