"""Batched token-level generalised advantage estimation."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..._core.check import FP32_MAX, Check, offsets
from ..._core.keywords import suggests
from ..._core.op import Op
from ..._kernels.values import values_between
from ..._math.sequence import compute_dtype, has_valid_token
from . import reference
from .reference import GaeCall

_op = Op("gae", cpu=("cpp", "reference"), cuda=("cuda", "triton", "reference"))

NBYTES_PER_TOKEN = 17  # rewards, values, advantages, returns in fp32, and the mask


class Gae(NamedTuple):
    """The two results of `gae`, fp32 (fp64 for fp64 inputs), detached."""

    advantages: Tensor  # [B, T] or [N]
    returns: Tensor  # [B, T] or [N]


def sample_inputs() -> tuple[tuple, dict]:
    """Arguments of a small call, in fp64: for the self-test and the benchmarks' gate."""
    g = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 3, 17, generator=g, dtype=torch.float64)
    return (rewards, values, torch.rand(3, 17, generator=g) < 0.7), {
        "gamma": 0.99, "bootstrap": torch.randn(3, generator=g, dtype=torch.float64)}


def _check_values(call: GaeCall) -> None:
    offsets("gae", call.cu_seqlens, call.rewards.shape[0])
    seen = partial(has_valid_token, call.rewards, call.mask, call.cu_seqlens)
    values_between("gae", "gamma", call.gamma, -FP32_MAX, FP32_MAX)
    values_between("gae", "lam", call.lam, 0.0, 1.0, seen)
    values_between("gae", "value_lam", call.value_lam, 0.0, 1.0, seen)


def _fake(call: GaeCall) -> tuple[Tensor, Tensor]:
    shape, dtype = call.rewards.shape, compute_dtype(call.rewards, call.values)
    return call.rewards.new_empty(shape, dtype=dtype), call.rewards.new_empty(shape, dtype=dtype)


_fwd = _op.define("gae_fwd -> (Tensor advantages, Tensor returns)", reference.fwd, _fake,
                  _check_values, record=GaeCall)


@suggests
def gae(
        rewards: Tensor,  # [B, T] or [N]
        values: Tensor,  # [B, T] or [N]
        mask: Tensor | None = None,  # [B, T] or [N] bool or whole numbers
        *,
        gamma: float | Tensor = 1.0,  # []
        lam: float | Tensor = 0.95,  # [] or [B]
        value_lam: float | Tensor | None = None,  # [] or [B]
        bootstrap: Tensor | None = None,  # [B]
        cu_seqlens: Tensor | None = None,  # [B + 1] int32
        ) -> Gae:
    """Advantages and returns of every action token, by one walk from the last token to the first.

    On the valid tokens 1..n of a sequence (masked tokens are not steps):

        delta_t = r_t + gamma V_{t+1} - V_t        V_{n+1} = bootstrap_b, 0 where none is given
        A_t     = delta_t + gamma lam A_{t+1}      A_{n+1} = 0
        return_t = V_t + A_t, with A_t at `value_lam` where it is given (decoupled GAE)

    rewards, values: [B, T], or packed [N] with `cu_seqlens` [B + 1] int32. mask: bool or whole
    numbers, the action mask. lam, value_lam: a number, 0-d, or [B], in [0, 1]. bootstrap: [B], the
    value of the state behind the last action token of a sequence that was cut. fp32, bf16 and fp16
    are computed in fp32; fp64 by the reference. Results are detached, and 0 where masked.

    Under `torch.compile` a Python float is a constant; give 0-d tensors for scalars that change.

    Raises ValueError / TypeError that name the argument. Source: Schulman et al. 2016 (GAE), eq.
    11-16; `value_lam`: VC-PPO (Yuan et al. 2025).
    """
    check = Check("gae")
    mask = check.sequences("rewards", rewards, mask, cu_seqlens)
    check.tensor("values", values, check.tokens(cu_seqlens))
    check.tensor("bootstrap", bootstrap, "B", optional=True)
    discount = check.scalar("gamma", gamma)
    lam_rows = check.per_sequence("lam", lam, low=0.0, high=1.0)
    value_rows = check.per_sequence("value_lam", value_lam, low=0.0, high=1.0, optional=True)
    return Gae(*_fwd(GaeCall(rewards, values, mask, discount, lam_rows, value_rows, bootstrap,
                             cu_seqlens)))
