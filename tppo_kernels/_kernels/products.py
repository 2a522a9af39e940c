"""The products of the linear operators: of a chunk of rows with a weight, results in fp32.

On a GPU two factors of one 16-bit dtype are multiplied as they are, and accumulate in fp32.
Anything else is computed in the dtype of the computation: rows are cast a chunk at a time, the
weight a block of the vocabulary at a time, so that no fp32 copy of it exists.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_BYTES = 1 << 24  # of the weight, cast at a time


class Products:
    """Products in the dtype of the computation, to which other factors are cast."""

    def __init__(self, weight: Tensor, dtype: torch.dtype):
        self.weight = weight  # [v, D], its live rows
        self.factors = dtype  # of hidden states and of the gradients of logits
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
