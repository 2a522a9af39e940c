"""The products of the linear operators: chunks of rows, so that no [N, V] tensor comes to be.

A product of bf16 or fp16 is computed in fp32: rows are cast a chunk at a time, the weight a block
of the vocabulary at a time, so no fp32 copy of it exists either.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ._sequence import compute_dtype
from .rows import Selection

AUTO_BYTES = 1 << 30
CPU_ROWS = 512  # beyond, dW's traffic is a few per cent, and the chunk leaves the caches
BLOCK_BYTES = 1 << 24  # of the weight, cast at a time


class Shard(NamedTuple):
    """The live columns of this process's part of the vocabulary."""

    first: int  # the global number of its first column
    columns: int  # v: how many are live
    total: int  # live columns of all parts


def resolve(group: str | None) -> Any:
    """The process group of a name; raw ops take the name."""
    name: Any = group
    return None if group is None else dist.distributed_c10d._resolve_process_group(name)


def shard_of(size: int, valid_vocab: int | None, group: str | None) -> Shard:
    """Parts are equal, in the order of ranks; columns >= valid_vocab are dead."""
    rank, world = 0, 1
    if group is not None:
        rank, world = dist.get_rank(resolve(group)), dist.get_world_size(resolve(group))
    total = size * world if valid_vocab is None else valid_vocab
    return Shard(rank * size, max(0, min(size, total - rank * size)), total)


class Chunk(NamedTuple):
    """Some of the rows: what their products need."""

    first: int
    last: int
    h: Tensor  # [R, D] in the dtype of the computation
    targets: Tensor  # [R], columns of this shard; 0 where it is not the owner
    owned: Tensor | None  # [R] bool; None without a group
    good: Tensor  # [R]: the target is a live column of some shard
    temperature: Tensor  # 0-d, or [R]

    def mine(self) -> Tensor:
        """Whose target is a column of this shard."""  # [R]
        return self.good if self.owned is None else self.owned


class Problem:
    """hidden @ weight.T + bias over the chosen rows, and its gradients, chunk by chunk."""

    def __init__(self, hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None,
                 bias: Tensor | None, rows: Tensor | None, temperature: Tensor,
                 valid_vocab: int | None, capacity: int | None, budget: int,
                 group: str | None):
        given = (hidden, weight) if bias is None else (hidden, weight, bias)
        self.dtype = compute_dtype(*given)
        self.hidden = hidden.detach().reshape(targets.numel(), hidden.shape[-1])  # [N, D]
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        self.targets = targets.reshape(-1)
        self.temperature = temperature.reshape(-1) if temperature.dim() else temperature
        self.group = resolve(group)
        self.shard = shard_of(weight.shape[0], valid_vocab, group)
        self.selection = Selection(targets.numel(), mask, rows, capacity, hidden.device)
        self.chunk_rows = self._chunk_rows(budget)

    def _chunk_rows(self, budget: int) -> int:
        """As many rows as the budget holds: an fp32 logit and one of the inputs' dtype each."""
        per_logit = torch.finfo(self.dtype).bits // 8 + self.hidden.element_size()
        rows = max(1, budget // (per_logit * max(1, self.shard.columns)))
        return min(rows, CPU_ROWS) if self.hidden.device.type == "cpu" else rows

    def workspace(self) -> Tensor:
        """Room for the logits of one chunk, reused by all."""  # [R, v]
        rows = min(self.chunk_rows, self.selection.count)
        return self.hidden.new_empty((rows, self.shard.columns), dtype=self.dtype)

    def chunks(self) -> Iterator[Chunk]:
        """The chosen rows, a chunk at a time."""
        selection, shard = self.selection, self.shard
        for first in range(0, selection.count, self.chunk_rows):
            last = min(first + self.chunk_rows, selection.count)
            targets = selection.take(self.targets, first, last).long()
            good = (targets >= 0) & (targets < shard.total)
            owned = None
            if self.group is not None:
                targets = targets - shard.first
                owned = (targets >= 0) & (targets < shard.columns)
                targets = torch.where(owned, targets, 0)
            t = self.temperature
            if t.dim():
                here = selection.slots[first:last] < selection.n
                t = torch.where(here, selection.take(t, first, last), torch.ones_like(t[:1]))
            yield Chunk(first, last, selection.take(self.hidden, first, last).to(self.dtype),
                        targets, owned, good, t)

    def _blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        """The live part of the weight in the dtype of the computation, a block at a time."""
        columns = self.shard.columns
        step = columns
        if self.weight.dtype != self.dtype:
            step = max(1, BLOCK_BYTES // (torch.finfo(self.dtype).bits // 8
                                          * max(1, self.weight.shape[1])))
        for first in range(0, columns, max(1, step)):
            last = min(first + step, columns)
            yield first, last, self.weight[first:last].to(self.dtype)

    def logits(self, h: Tensor, out: Tensor) -> Tensor:
        """h @ weight.T + bias of the live columns, written to `out`."""  # [R, v]
        for first, last, weight in self._blocks():
            torch.mm(h, weight.T, out=out[:, first:last])
        if self.bias is not None:
            out += self.bias[:self.shard.columns].to(self.dtype)
        return out

    def d_hidden(self, dz: Tensor) -> Tensor:
        """dz @ weight."""  # [R, D]
        new = dz.new_empty if dz.shape[1] else dz.new_zeros
        out = new(dz.shape[0], self.hidden.shape[1])
        for first, last, weight in self._blocks():
            if first == 0:
                torch.mm(dz[:, first:last], weight, out=out)
            else:
                torch.addmm(out, dz[:, first:last], weight, out=out)
        return out

    def gather(self, x: Tensor) -> Tensor:
        """x of every process of the group."""  # [...] -> [W, ...]
        out = x.new_empty(dist.get_world_size(self.group) * x.numel())
        dist.all_gather_into_tensor(out, x.reshape(-1), group=self.group)
        return out.reshape(-1, *x.shape)


class Gradients:
    """Sums of a problem's gradients over its chunks, in the dtype of the computation."""

    def __init__(self, problem: Problem, hidden: bool, weight: bool, bias: bool):
        self.problem = problem
        size, d = problem.weight.shape
        rows = problem.selection.count
        new = problem.weight.new_empty
        self.hidden = problem.hidden.new_empty(rows, d) if hidden else None  # [M, D]
        self.weight = new((size, d), dtype=problem.dtype) if weight else None  # [V, D]
        self.bias = new(size, dtype=problem.dtype).zero_() if bias else None  # [V]
        if self.weight is not None:
            self.weight[problem.shard.columns if rows else 0:] = 0

    def add(self, chunk: Chunk, dz: Tensor) -> None:
        """Adds what the gradient dz [R, v] by the logits of a chunk gives."""
        live = self.problem.shard.columns
        if self.hidden is not None:
            dh = self.problem.d_hidden(dz)
            if self.problem.group is not None:  # each process has a part of the sum over V
                dist.all_reduce(dh, group=self.problem.group)
            self.hidden[chunk.first:chunk.last] = dh
        if self.weight is not None and live:
            if chunk.first == 0:
                torch.mm(dz.T, chunk.h, out=self.weight[:live])
            else:
                torch.addmm(self.weight[:live], dz.T, chunk.h, out=self.weight[:live])
        if self.bias is not None:
            self.bias[:live] += dz.sum(0)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """(hidden [M, D], weight [V, D], bias [V]) in the dtypes of the inputs; or empty [0]."""
        p, mark = self.problem, self.problem.selection.marked
        empty = p.hidden.new_empty
        return (empty(0) if self.hidden is None else self.hidden,
                empty(0, dtype=p.weight.dtype) if self.weight is None
                else mark(self.weight).to(p.weight.dtype),
                empty(0, dtype=self._bias_dtype()) if self.bias is None
                else mark(self.bias).to(self._bias_dtype()))

    def _bias_dtype(self) -> torch.dtype:
        return self.problem.weight.dtype if self.problem.bias is None else self.problem.bias.dtype
