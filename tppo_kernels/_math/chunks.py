"""The products of the linear operators: chunks of rows, so that no [N, V] tensor comes to be.

All accumulate in fp32 and give fp32. On a GPU two factors of one 16-bit dtype are multiplied as
they are. Anything else is computed in the dtype of the computation: rows are cast a chunk at a
time, the weight a block of the vocabulary at a time, so no fp32 copy of it exists either.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .rows import Selection
from .sequence import compute_dtype

AUTO_BYTES, MOST_AUTO_BYTES = 1 << 30, 8 << 30
AUTO_SHARE = 16  # "auto" takes one part in so many of a GPU's memory, between those two
CPU_ROWS = 512  # beyond, dW's traffic is a few per cent, and the chunk leaves the caches
BLOCK_BYTES = 1 << 24  # of the weight, cast at a time
FEW_ROWS = 64  # up to here the time of a GPU's products is that of reading the weight


def auto_bytes(device: torch.device) -> int:
    """What `memory="auto"` may take: 1 GiB, or on a GPU a sixteenth of its memory, 1 to 8 GiB.

    The gradient of the weight is read and written once for every chunk of rows, so few large chunks
    are faster. The memory that the GPU has decides and not what is free of it: another chunk is
    another order of additions, and two identical calls shall give the same bits.
    """
    if device.type != "cuda":
        return AUTO_BYTES
    total = torch.cuda.get_device_properties(device).total_memory
    return max(AUTO_BYTES, min(MOST_AUTO_BYTES, total // AUTO_SHARE))


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
    h: Tensor  # [R, D] in the dtype of the factors
    targets: Tensor  # [R], columns of this shard; 0 where it is not the owner
    owned: Tensor | None  # [R] bool; None without a group
    good: Tensor  # [R]: the target is a live column of some shard
    temperature: Tensor  # 0-d, or [R]

    def mine(self) -> Tensor:
        """Whose target is a column of this shard."""  # [R]
        return self.good if self.owned is None else self.owned


def takes_halves(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the products take the 16-bit factors as they are: cuBLAS's do, of one dtype."""
    return hidden.is_cuda and hidden.dtype == weight.dtype and hidden.dtype.itemsize == 2


class Products:
    """Products in the dtype of the computation, to which other factors are cast."""

    def __init__(self, weight: Tensor, dtype: torch.dtype):
        self.weight = weight  # [v, D], its live rows
        self.factors = dtype  # of hidden states and of the gradients by the logits
        self.dtype = dtype
        self.summands = 1  # numbers that make up a gradient by a logit

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight in the dtype of the computation, a block at a time."""
        columns, d = self.weight.shape
        step = max(1, columns)
        if self.weight.dtype != self.dtype:
            step = max(1, BLOCK_BYTES // (self.dtype.itemsize * max(1, d)))
        for first in range(0, columns, step):
            here = slice(first, min(first + step, columns))
            yield here, self.weight[here].to(self.dtype)

    def logits(self, h: Tensor, out: Tensor) -> None:
        """out = h @ weight.T."""  # [R, v]
        for here, weight in self._blocks():
            torch.mm(h, weight.T, out=out[:, here])

    def d_hidden(self, dz: Tensor) -> Tensor:
        """dz @ weight."""  # [summands R, v] -> [R, D]
        new = dz.new_empty if dz.shape[1] else dz.new_zeros
        out = new(dz.shape[0], self.weight.shape[1])
        for i, (here, weight) in enumerate(self._blocks()):
            if i == 0:
                torch.mm(dz[:, here], weight, out=out)
            else:
                torch.addmm(out, dz[:, here], weight, out=out)
        return out

    def add_d_weight(self, dz: Tensor, h: Tensor, first: bool, out: Tensor) -> None:
        """out = dz.T @ h for the first chunk, out += it for others."""  # [summands R, v] -> [v, D]
        if first:
            torch.mm(dz.T, h, out=out)
        else:
            torch.addmm(out, dz.T, h, out=out)


class HalfProducts(Products):
    """Products of 16-bit factors as they are; sums and results in fp32.

    A 16-bit result could be added up from parts that cuBLAS has rounded to 16 bits: it may, unless
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction is off.

    A gradient by a logit that is rounded to 16 bits is wrong by up to 2^-8, which other rows make
    up for. Of `few` rows it is the sum of two 16-bit numbers: dz has the first of all rows, and
    below them the second; the products take no longer for it.
    """

    def __init__(self, weight: Tensor, few: bool):
        super().__init__(weight, torch.float32)
        self.factors = weight.dtype
        self.summands = 2 if few else 1

    def logits(self, h: Tensor, out: Tensor) -> None:
        torch.mm(h, self.weight.T, out_dtype=torch.float32, out=out)

    def d_hidden(self, dz: Tensor) -> Tensor:
        out = torch.mm(dz, self.weight, out_dtype=torch.float32)
        return out if self.summands == 1 else torch.add(*out.chunk(2))

    def add_d_weight(self, dz: Tensor, h: Tensor, first: bool, out: Tensor) -> None:
        h = h if self.summands == 1 else torch.cat([h, h])
        if first:
            torch.mm(dz.T, h, out_dtype=torch.float32, out=out)
        else:
            torch.addmm(out, dz.T, h, out_dtype=torch.float32, out=out)


class Problem:
    """hidden @ weight.T + bias over the chosen rows, and its gradients, chunk by chunk."""

    def __init__(self, hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None,
                 bias: Tensor | None, rows: Tensor | None, temperature: Tensor,
                 valid_vocab: int | None, capacity: int | None, budget: int,
                 group: str | None, aligned: bool):
        given = (hidden, weight) if bias is None else (hidden, weight, bias)
        self.dtype = compute_dtype(*given)
        self.hidden = hidden.detach().reshape(targets.numel(), hidden.shape[-1])  # [N, D]
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        self.targets = targets.reshape(-1)
        if temperature.dim():
            temperature = temperature.reshape(-1).to(self.dtype)
        self.temperature = temperature
        self.group = resolve(group)
        self.shard = shard_of(weight.shape[0], valid_vocab, group)
        self.selection = Selection(targets.numel(), mask, rows, capacity, hidden.device)
        live = self.weight[:self.shard.columns]
        halves = self.dtype == torch.float32 and takes_halves(hidden, weight)
        few = self.selection.count <= FEW_ROWS
        self.products = HalfProducts(live, few) if halves else Products(live, self.dtype)
        self.budget, self.aligned = budget, aligned
        self.chunk_rows = 0  # see `rooms`

    def rooms(self, logits: bool, gradient: bool) -> tuple[Tensor, Tensor]:
        """Room for the logits of one chunk and for the gradient by them, reused by all chunks.

        They are one where their dtypes are; one that is not asked for is empty. As many rows as the
        budget holds, in equal chunks; as many in every process of a group. Rows begin at multiples
        of 16 bytes if `aligned`: cuBLAS is slow on others.
        """  # [R, v], [summands R, v]
        size, dtype = self.weight.shape[0], self.products.factors
        summands = self.products.summands
        columns = size + -size % 8 if self.aligned else size
        apart = gradient and not (logits and dtype == self.dtype)
        per_logit = logits * self.dtype.itemsize + apart * summands * dtype.itemsize
        rows = max(1, self.budget // max(1, per_logit * min(columns, self.shard.total)))
        rows = min(rows, CPU_ROWS) if self.hidden.device.type == "cpu" else rows
        chunks = max(1, -(-self.selection.count // rows))
        self.chunk_rows = max(1, -(-self.selection.count // chunks))

        def room(rows: int, dtype: torch.dtype) -> Tensor:
            live = self.shard.columns
            padded = live + -live % 8 if self.aligned else live
            return self.hidden.new_empty((rows, padded), dtype=dtype)[:, :live]

        x = room(self.chunk_rows, self.dtype) if logits else self.hidden.new_empty(0)
        return x, room(summands * self.chunk_rows, dtype) if apart else x

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
                t = torch.where(here, selection.take(t, first, last), 1.0)
            h = selection.take(self.hidden, first, last).to(self.products.factors)
            yield Chunk(first, last, h, targets, owned, good, t)

    def logits(self, h: Tensor, out: Tensor) -> Tensor:
        """h @ weight.T + bias of the live columns, written to `out`."""  # [R, v]
        self.products.logits(h, out)
        if self.bias is not None:
            out += self.bias[:self.shard.columns].to(self.dtype)
        return out

    def gather(self, x: Tensor) -> Tensor:
        """x of every process of the group."""  # [...] -> [W, ...]
        out = x.new_empty(dist.get_world_size(self.group) * x.numel())
        dist.all_gather_into_tensor(out, x.reshape(-1), group=self.group)
        return out.reshape(-1, *x.shape)


class Gradients:
    """Sums of a problem's gradients over its chunks, in the dtype of the computation.

    waiting: they stay in it, because a gradient of the loss is still to come.
    """

    def __init__(self, problem: Problem, hidden: bool, weight: bool, bias: bool, *,
                 waiting: bool = False):
        self.problem = problem
        p, (size, d) = problem, problem.weight.shape
        rows = problem.selection.count
        given = (p.hidden, p.weight, p.weight if p.bias is None else p.bias)
        self.dtypes = [p.dtype if waiting else x.dtype for x in given]
        self.hidden = p.hidden.new_empty((rows, d), dtype=self.dtypes[0]) if hidden else None
        self.weight = p.weight.new_empty((size, d), dtype=p.dtype) if weight else None  # [V, D]
        self.bias = p.weight.new_empty(size, dtype=p.dtype).zero_() if bias else None  # [V]
        self.fit: Tensor | None = None  # []: the sum for the weight is so many times the gradient
        if self.weight is not None:
            self.weight[problem.shard.columns if rows else 0:] = 0

    def add(self, chunk: Chunk, dz: Tensor, fit: Tensor | None) -> None:
        """Adds what the gradient dz [summands R, v] by the logits of a chunk gives.

        fit: dz is so many times the gradient; another number for every chunk.
        """
        products, live = self.problem.products, self.problem.shard.columns
        if self.hidden is not None:
            group = self.problem.group
            dh = products.d_hidden(dz)
            if group is not None:  # each process has a part of the sum over V
                dist.all_reduce(dh, group=group)
            self.hidden[chunk.first:chunk.last] = dh if fit is None else dh / fit
        if self.weight is not None and live:
            if self.fit is not None and fit is not None and fit is not self.fit:
                self.weight[:live] *= fit / self.fit
            products.add_d_weight(dz, chunk.h, chunk.first == 0, self.weight[:live])
        if self.bias is not None:
            new = dz.sum(0, dtype=self.bias.dtype)
            self.bias[:live] += new if fit is None else new / fit
        self.fit = fit

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """(hidden [M, D], weight [V, D], bias [V]) in `dtypes`; one not wanted is empty [0]."""
        mark, empty = self.problem.selection.mark(), self.problem.hidden.new_empty
        hidden, weight, bias = (empty(0, dtype=dtype) for dtype in self.dtypes)
        if self.weight is not None:
            weight = _over(self.weight, self.dtypes[1], self.fit, mark)
        if self.bias is not None:
            bias = _over(self.bias, self.dtypes[2], mark)
        return hidden if self.hidden is None else self.hidden, weight, bias


def _over(x: Tensor, dtype: torch.dtype, *divisors: Tensor | None) -> Tensor:
    """x over those of the 0-d divisors that are there, rounded to dtype: in one pass at most, and
    in the place of x where it can."""
    given = [d for d in divisors if d is not None]
    if not given:
        return x.to(dtype)
    out = x if x.dtype == dtype else torch.empty_like(x, dtype=dtype)
    return torch.div(x, math.prod(given[1:], start=given[0]), out=out)
