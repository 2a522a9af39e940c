"""The specification of `linear_logprobs`: all logits, and `token_logprobs`' own formula for them.

It makes every [N, V] tensor that the operator is there to avoid: a backend is judged by it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..._math.kept import FP16_SCALE, empty_outputs
from ..._math.linear import LinearInputs, process_group, shard_of, slot_count
from ..._math.sequence import compute_dtype, select
from ..token_logprobs import reference as token
from ..token_logprobs.reference import TokenLogprobsCall, TokenLogprobsGradient


class LinearLogprobsCall(NamedTuple):
    """The arguments of the raw forward op."""

    inputs: LinearInputs
    regime: str  # what is kept for backward: "none", "store", "recompute", "frozen"


class LinearLogprobsGradient(NamedTuple):
    """The arguments of the raw backward op of "store" and "recompute"."""

    g_logprobs: Tensor | None  # [...]
    g_entropy: Tensor | None  # [...]
    inputs: LinearInputs
    stats: Tensor  # [4 + blocks, M]
    kept: Tensor  # [M, v], or [0]
    grad_hidden: bool
    grad_weight: bool
    grad_bias: bool


class FrozenGradient(NamedTuple):
    """The arguments of the raw backward op of "frozen"."""

    g_logprobs: Tensor  # [...]
    kept: Tensor  # [M, D]
    mask: Tensor | None  # [...] bool
    rows: Tensor | None  # [M]
    capacity: int | None
    dtype: torch.dtype  # of hidden


class Rows:
    """Which of N rows are computed, and in which of the M slots what forward keeps of each lies."""

    def __init__(self, n: int, mask: Tensor | None, rows: Tensor | None, capacity: int | None,
                 device: torch.device):
        row = torch.arange(n, device=device)
        valid = torch.ones_like(row, dtype=torch.bool) if mask is None else mask.reshape(-1)
        listed = valid
        if rows is not None:
            listed = torch.isin(row, rows)
        elif capacity is not None:
            listed = valid.cumsum(0) <= capacity
        self.computed = valid & listed  # [N]
        self.lost = valid & ~listed  # [N]: valid rows without a slot, whose results are NaN
        row = torch.where(self.computed, row, n)
        if rows is not None:
            self.slots = torch.where(torch.isin(rows, row), rows, n)  # [M], N where there is no row
        elif capacity is not None or (mask is not None and device.type == "cpu"):
            self.slots = torch.cat([row, row.new_full((capacity or 0,), n)]).sort().values
            self.slots = self.slots[:slot_count(n, rows, capacity)]
        else:
            self.slots = row

    def take(self, x: Tensor) -> Tensor:
        """The rows of x in their slots: [N, ...] -> [M, ...], 0 in a slot without a row."""
        return torch.cat([x, x.new_zeros(1, *x.shape[1:])])[self.slots]

    def put(self, x: Tensor) -> Tensor:
        """The reverse: [M, ...] -> [N, ...], 0 where no row is computed, NaN where it is lost."""
        n = self.lost.shape[0]
        return self.spoil(x.new_zeros(n + 1, *x.shape[1:]).index_copy(0, self.slots, x)[:n])

    def spoil(self, x: Tensor) -> Tensor:
        """x [N, ...] with NaN in the rows that are lost."""
        return x.masked_fill(self.lost.reshape(-1, *[1] * (x.dim() - 1)), float("nan"))


def rows_of(inputs: LinearInputs) -> Rows:
    """The rows that a call computes."""
    return Rows(inputs.targets.numel(), inputs.mask, inputs.rows, inputs.capacity,
                inputs.hidden.device)


def states_of(inputs: LinearInputs, rows: Rows) -> tuple[Tensor, Tensor]:
    """(hidden [N, D], 0 where no row is computed, weight [V, D]) in the computation's dtype."""
    dtype = compute_dtype(inputs.hidden, inputs.weight, inputs.bias)
    hidden = inputs.hidden.reshape(inputs.targets.numel(), inputs.hidden.shape[-1])
    return select(hidden, rows.computed[:, None], dtype), inputs.weight.to(dtype)


def token_call(inputs: LinearInputs, rows: Rows) -> TokenLogprobsCall:
    """`token_logprobs` of hidden @ weight.T + bias, with the columns of every process."""
    hidden, weight = states_of(inputs, rows)
    x = hidden @ weight.T  # [N, V]
    if inputs.bias is not None:
        x = x + inputs.bias.to(x.dtype)
    if inputs.group is not None:
        group = process_group(inputs.group)
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x, group=group)
        x = torch.cat(parts, 1)
    temperature = inputs.scaling.temperature
    return TokenLogprobsCall(
        x, inputs.targets.reshape(-1), rows.computed, inputs.scaling._replace(
            temperature=temperature.reshape(-1) if temperature.dim() else temperature),
        inputs.valid_vocab)


def fwd(call: LinearLogprobsCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprobs [...], entropy [...], stats, kept); see `tppo_kernels.linear_logprobs` for the
    first two, and `_math.kept` for the others, which any backend's backward must be able to read.
    """
    inputs = call.inputs
    with torch.autocast(inputs.hidden.device.type, enabled=False):
        rows = rows_of(inputs)
        logits = token_call(inputs, rows)
        row = token.fwd(logits)  # logprobs, entropy, top, log_sum: [N] each
        shape = inputs.targets.shape
        logprobs, entropy = (rows.spoil(x).reshape(shape) for x in row[:2])
        return (logprobs, entropy, *_keep(call, rows, logits, torch.stack(row)))


def gradients(inputs: LinearInputs, g_logprobs: Tensor | None, g_entropy: Tensor | None
              ) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden [N, D], weight [V, D] and bias [V] in the computation's dtype.

    dx is `token_logprobs`' gradient of the logits x = hidden @ weight.T + bias, so that
    dhidden = dx @ weight, dweight = dx.T @ hidden, dbias = sum of dx over rows.
    """
    rows, shard = rows_of(inputs), shard_of(inputs)
    logits = token_call(inputs, rows)
    _, *kept = token.fwd(logits)
    dx = token.bwd(TokenLogprobsGradient(g_logprobs, g_entropy, logits, *kept))  # [N, V] of all
    dx = dx[:, shard.first:shard.first + shard.columns]  # the live columns of this one
    hidden, weight = states_of(inputs, rows)
    dhidden = dx @ weight[:shard.columns]
    if inputs.group is not None:
        dist.all_reduce(dhidden, group=process_group(inputs.group))
    dweight, dbias = torch.zeros_like(weight), weight.new_zeros(weight.shape[0])
    dweight[:shard.columns], dbias[:shard.columns] = dx.T @ hidden, dx.sum(0)
    nan = torch.where(rows.lost.any(), float("nan"), 0.0)  # no sum is what it should be
    return rows.spoil(dhidden), dweight + nan, dbias + nan


def bwd(call: LinearLogprobsGradient) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden, weight and bias in their dtypes; one that is not wanted is empty."""
    inputs, empty = call.inputs, call.inputs.hidden.new_empty
    like = (inputs.hidden, inputs.weight, inputs.weight if inputs.bias is None else inputs.bias)
    with torch.autocast(inputs.hidden.device.type, enabled=False):
        grads = gradients(inputs, call.g_logprobs, call.g_entropy)
    grads = (grads[0].reshape(inputs.hidden.shape), *grads[1:])
    wanted = (call.grad_hidden, call.grad_weight, call.grad_bias)
    dhidden, dweight, dbias = (g.to(x.dtype) if want else empty(0, dtype=x.dtype)
                               for g, x, want in zip(grads, like, wanted, strict=True))
    return dhidden, dweight, dbias


def frozen(call: FrozenGradient) -> Tensor:
    """The gradient of hidden, of that dtype, from dlogprob/dhidden [M, D]."""  # [..., D]
    g = call.g_logprobs
    rows = Rows(g.numel(), call.mask, call.rows, call.capacity, g.device)
    dhidden = rows.take(g.reshape(-1))[:, None] * call.kept
    return rows.put(dhidden.to(call.dtype)).reshape(*g.shape, call.kept.shape[1])


def _keep(call: LinearLogprobsCall, rows: Rows, logits: TokenLogprobsCall, stats_of_rows: Tensor
          ) -> tuple[Tensor, Tensor]:
    """(stats [4 + blocks, M], kept): see `_math.kept`. Here every block's shift is top."""
    inputs, shard = call.inputs, shard_of(call.inputs)
    stats, kept = empty_outputs(inputs, rows.slots.shape[0], call.regime)
    stats[:4] = rows.take(stats_of_rows.T).T
    stats[4:] = stats[2]
    x = logits.logits[:, shard.first:shard.first + shard.columns]  # [N, v]
    if call.regime == "frozen":
        one = torch.ones_like(stats_of_rows[0])
        kept = rows.take(gradients(inputs, one, None)[0])
    elif call.regime == "store" and inputs.scaling.softcap is not None:
        kept[:, :shard.columns] = rows.take(x)
    elif call.regime == "store":
        t = logits.scaling.temperature
        z = token.scaled(x, logits.scaling._replace(temperature=t[:, None] if t.dim() else t))
        e = torch.exp(z - stats_of_rows[2][:, None])
        kept = rows.take(e * FP16_SCALE if kept.dtype == torch.float16 else e).to(kept.dtype)
    return stats, kept
