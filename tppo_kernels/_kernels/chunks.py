"""The engine of the linear operators: chunks of rows, so that no [N, V] tensor is made.

A `Problem` is a call's rows and head: it computes the logits of one chunk after another in one
buffer. `Gradients` adds up what the gradient of each chunk's logits gives. What happens between the
two, the formula of a row, is the backend's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .._math.linear import LinearInputs, Scaling, process_group, shard_of
from .._math.sequence import compute_dtype
from .products import HalfProducts, Products
from .selection import Selection

AUTO_BYTES, MOST_AUTO_BYTES = 1 << 30, 8 << 30
AUTO_SHARE = 16  # "auto" takes one part in so many of a GPU's memory, between those two
CPU_ROWS = 512  # beyond, dW's traffic is a few per cent, and the chunk leaves the caches
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


def takes_halves(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the products take the 16-bit factors as they are: cuBLAS's do, of one dtype."""
    return hidden.is_cuda and hidden.dtype == weight.dtype and hidden.dtype.itemsize == 2


class Chunk(NamedTuple):
    """Some of the chosen rows: what their products and the formula of a row need."""

    first: int
    last: int
    h: Tensor  # [R, D] in the dtype of the factors
    targets: Tensor  # [R], columns of this shard; 0 where the target is in another
    owned: Tensor | None  # [R] bool: the target is a column of this shard; None without a group
    good: Tensor  # [R] bool: the target is a live column of some shard
    scaling: Scaling  # its temperature is 0-d, or [R]

    def here(self) -> Tensor:
        """Whose target is a column of this shard."""  # [R]
        return self.good if self.owned is None else self.owned


class Problem:
    """hidden @ weight.T + bias over the chosen rows, chunk by chunk."""

    def __init__(self, inputs: LinearInputs, aligned: bool):
        hidden, weight, bias = inputs.hidden, inputs.weight, inputs.bias
        self.dtype = compute_dtype(hidden, weight, bias)
        self.targets = inputs.targets.reshape(-1)  # [N]
        n = self.targets.numel()
        self.hidden = hidden.detach().reshape(n, hidden.shape[-1])  # [N, D]
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        self.scaling, temperature = inputs.scaling, inputs.scaling.temperature
        if temperature.dim():
            self.scaling = self.scaling._replace(
                temperature=temperature.reshape(-1).to(self.dtype))  # [N]
        self.group = process_group(inputs.group)
        self.shard = shard_of(inputs)
        self.selection = Selection(n, inputs.mask, inputs.rows, inputs.capacity, hidden.device)
        live = self.weight[:self.shard.columns]
        halves = self.dtype == torch.float32 and takes_halves(hidden, weight)
        few = self.selection.count <= FEW_ROWS
        self.products = HalfProducts(live, few) if halves else Products(live, self.dtype)
        self.budget, self.aligned = inputs.budget, aligned
        self.chunk_rows = 0  # set by `buffers`

    def buffers(self, logits: bool, gradient: bool) -> tuple[Tensor, Tensor]:
        """Memory for the logits of one chunk and for their gradient, reused by all chunks.

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

        def empty(rows: int, dtype: torch.dtype) -> Tensor:
            live = self.shard.columns
            padded = live + -live % 8 if self.aligned else live
            return self.hidden.new_empty((rows, padded), dtype=dtype)[:, :live]

        x = empty(self.chunk_rows, self.dtype) if logits else self.hidden.new_empty(0)
        return x, empty(summands * self.chunk_rows, dtype) if apart else x

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
            t = self.scaling.temperature
            if t.dim():
                has_row = selection.slots[first:last] < selection.n
                t = torch.where(has_row, selection.take(t, first, last), 1.0)
            h = selection.take(self.hidden, first, last).to(self.products.factors)
            yield Chunk(first, last, h, targets, owned, good, self.scaling._replace(temperature=t))

    def logits(self, chunk: Chunk, out: Tensor) -> Tensor:
        """hidden @ weight.T + bias of the live columns, written to `out`."""  # [R, v]
        self.products.logits(chunk.h, out)
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

    wanted: of hidden, weight and bias. waiting: the results stay in that dtype, because a gradient
    of the loss is still to come.
    """

    def __init__(self, problem: Problem, wanted: tuple[bool, bool, bool], *,
                 waiting: bool = False):
        self.problem = problem
        p, (size, d) = problem, problem.weight.shape
        rows, (hidden, weight, bias) = problem.selection.count, wanted
        given = (p.hidden, p.weight, p.weight if p.bias is None else p.bias)
        self.dtypes = [p.dtype if waiting else x.dtype for x in given]
        self.hidden = p.hidden.new_empty((rows, d), dtype=self.dtypes[0]) if hidden else None
        self.weight = p.weight.new_empty((size, d), dtype=p.dtype) if weight else None  # [V, D]
        self.bias = p.weight.new_empty(size, dtype=p.dtype).zero_() if bias else None  # [V]
        self.loss_scale: Tensor | None = None  # []: that of the sum for the weight
        if self.weight is not None:
            self.weight[problem.shard.columns if rows else 0:] = 0

    def add(self, chunk: Chunk, dz: Tensor, loss_scale: Tensor | None) -> None:
        """Adds what the gradient dz [summands R, v] by the logits of a chunk gives.

        loss_scale: dz is so many times the gradient; it may differ from chunk to chunk.
        """
        products, live = self.problem.products, self.problem.shard.columns
        if self.hidden is not None:
            group = self.problem.group
            dh = products.d_hidden(dz)
            if group is not None:  # each process has a part of the sum over V
                dist.all_reduce(dh, group=group)
            self.hidden[chunk.first:chunk.last] = dh if loss_scale is None else dh / loss_scale
        if self.weight is not None and live:
            before = self.loss_scale
            if before is not None and loss_scale is not None and loss_scale is not before:
                self.weight[:live] *= loss_scale / before
            products.add_d_weight(dz, chunk.h, chunk.first == 0, self.weight[:live])
        if self.bias is not None:
            new = dz.sum(0, dtype=self.bias.dtype)
            self.bias[:live] += new if loss_scale is None else new / loss_scale
        self.loss_scale = loss_scale

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """(hidden [M, D], weight [V, D], bias [V]) in `dtypes`; one not wanted is empty [0]."""
        mark, empty = self.problem.selection.mark(), self.problem.hidden.new_empty
        hidden, weight, bias = (empty(0, dtype=dtype) for dtype in self.dtypes)
        if self.weight is not None:
            weight = _over(self.weight, self.dtypes[1], self.loss_scale, mark)
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
