"""The specification of `linear_logprobs` in plain PyTorch: chunks of rows, each a row formula.

The formula of a row is `token_logprobs`'s own; a faster backend replaces the row `Steps` only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._math.chunks import Chunk, Gradients, Problem
from ..._math.rows import Selection
from ..._math.sequence import compute_dtype, select
from ..token_logprobs import reference as token

FP16_SCALE = 2.0 ** 15  # a kept fp16 exponential is normal down to e^-20
KEPT_BLOCK = 512  # columns whose exponentials have a maximum of their own on a GPU
FIT_BITS = 14  # a gradient by logits in fp16 is brought to 2^14 at most: the largest is 2^16


class Scale(NamedTuple):
    """How logits become z: softcap(logit_scale x) / temperature; temperature 0-d or [R]."""

    temperature: Tensor
    softcap: Tensor | None
    logit_scale: Tensor

    def factor(self) -> Tensor:
        """dz/dx without a softcap: 0-d in fp64, or [R, 1] in the dtype of the temperature."""
        t = self.temperature
        return self.logit_scale.double() / (t[:, None] if t.dim() else t)


class Stats(NamedTuple):
    """What backward knows of each row; logsumexp(z) = top + log_sum, top this shard's own."""

    logprobs: Tensor  # [R]
    entropy: Tensor  # [R]
    top: Tensor  # [R]
    log_sum: Tensor  # [R]
    shifts: Tensor | None = None  # [blocks, R]: of kept exponentials, in the place of top

    @staticmethod
    def of(stats: Tensor, first: int, last: int) -> Stats:
        """The columns first to last of the tensor [4 + blocks, M] that forward returns."""
        logprobs, entropy, top, log_sum, *shifts = stats[:, first:last].unbind()
        return Stats(logprobs, entropy, top, log_sum, stats[4:, first:last] if shifts else None)

    def put(self, stats: Tensor, first: int, last: int) -> None:
        """The reverse; without shifts of its own each block has `top`."""
        stats[:4, first:last] = torch.stack(self[:4])
        stats[4:, first:last] = self.top if self.shifts is None else self.shifts


def row_stats(x: Tensor, targets: Tensor, scale: Scale) -> Stats:
    """The results of `token_logprobs` for the logits x of a chunk."""  # [R, v]
    return Stats(*token.fwd(x, targets, None, *scale, None))


def surplus(g_logprobs: Tensor | None, x: Tensor, owned: Tensor | None,
            scale: Scale) -> Tensor | None:
    """What the row formula adds at column 0 for a target of another shard, which stands as 0."""
    if owned is None or g_logprobs is None:
        return None
    slope = 1.0 if scale.softcap is None else token.tanh_slope(
        x[:, :1] * scale.logit_scale / scale.softcap)
    return select(g_logprobs, ~owned)[:, None] * slope * scale.factor()  # [R, 1]


def write(dx: Tensor, out: Tensor) -> None:
    """out = dx, rounded; or two numbers whose sum it is, all of the first ones above."""
    rows = dx.shape[0]  # [R, v] -> [R, v] or [2 R, v]
    out[:rows].copy_(dx)
    if out.shape[0] > rows:
        torch.sub(dx, out[:rows], out=out[rows:])


def row_gradient(g_logprobs: Tensor | None, g_entropy: Tensor | None, x: Tensor, targets: Tensor,
                 owned: Tensor | None, scale: Scale, stats: Stats, out: Tensor) -> None:
    """out = the gradient by the logits x; may take their place. See `write`."""  # [R, v]
    extra = surplus(g_logprobs, x, owned, scale)
    dx = token.bwd(g_logprobs, g_entropy, x, targets, None, *scale, None, *stats[1:4])
    if extra is not None:
        dx[:, :1] -= extra
    write(dx, out)


def row_kept(x: Tensor, targets: Tensor, scale: Scale, out: Tensor) -> Stats:
    """`row_stats`; out = exp(z - top), times 2^15 in fp16; may take the place of x.

    Without a softcap, as `row_gradient_of_kept`: see `Head.keeps_logits`.
    """  # [R, v]
    stats = row_stats(x, targets, scale)
    t = scale.temperature
    z = token.scaled(x, t[:, None] if t.dim() else t, None, scale.logit_scale)
    e = z.sub_(stats.top[:, None]).exp_()
    out.copy_(e.mul_(FP16_SCALE) if out.dtype == torch.float16 else e)
    return stats


def row_gradient_of_kept(g_logprobs: Tensor | None, g_entropy: Tensor | None, e: Tensor,
                         targets: Tensor, owned: Tensor | None, scale: Scale, stats: Stats,
                         out: Tensor) -> None:
    """out = the gradient by the logits, from the exponentials that `row_kept` wrote.

    z - top = log e. At the target it is logprob + log_sum, unrounded: 1 - p is a difference.
    """  # [R, v]
    dtype = stats.top.dtype
    d = torch.log(e.to(dtype) / FP16_SCALE if e.dtype == torch.float16 else e)
    if stats.shifts is not None:
        d += (stats.shifts - stats.top).T.repeat_interleave(KEPT_BLOCK, 1)[:, :d.shape[1]]
    at_target = targets[:, None]
    exact = (stats.logprobs + stats.log_sum)[:, None]
    d.scatter_(1, at_target, exact if owned is None
               else torch.where(owned[:, None], exact, d.gather(1, at_target)))
    one = d.new_ones(())
    dz = token.bwd(g_logprobs, g_entropy, d, targets, None, one, None, one, None, stats.entropy,
                   torch.zeros_like(stats.top), stats.log_sum)
    if owned is not None and g_logprobs is not None:
        dz[:, 0] -= select(g_logprobs, ~owned)
    if out.dtype == dtype:
        torch.mul(dz, scale.factor(), out=out)
    else:
        write(dz * scale.factor(), out)


class Steps(NamedTuple):
    """The row formulas of a backend."""

    stats: Any = row_stats
    kept: Any = row_kept
    gradient: Any = row_gradient
    gradient_of_kept: Any = row_gradient_of_kept
    aligned: bool = False  # rows of logits and gradients begin at multiples of 16 bytes
    by_blocks: bool = False  # kept exponentials have shifts on every device


TORCH = Steps()


class Head:
    """A problem and the row formulas: what both linear operators do with one chunk of rows."""

    def __init__(self, hidden, weight, targets, mask, bias, rows, temperature, softcap,
                 logit_scale, valid_vocab, capacity, budget, group, steps: Steps = TORCH):
        self.problem = Problem(hidden, weight, targets, mask, bias, rows, temperature, valid_vocab,
                               capacity, budget, group, steps.aligned)
        self.softcap, self.logit_scale, self.steps = softcap, logit_scale, steps
        # Under a softcap, backward is given the logits instead of their exponentials: where tanh
        # is near 1, its slope 1 - tanh^2 is a difference that no rounded exponential holds.
        self.keeps_logits = softcap is not None
        self.fit: Tensor | None = None  # [], see `_fit`; of every chunk where the factors are bf16

    def scale(self, chunk: Chunk) -> Scale:
        """The scaling of a chunk's logits."""
        return Scale(chunk.temperature, self.softcap, self.logit_scale)

    def stats(self, chunk: Chunk, x: Tensor, kept: Tensor | None = None) -> Stats:
        """Statistics of a chunk from its logits [R, v]; NaN where the target is no live column.

        kept [R, v]: room for the exponentials, where backward shall have them, or the logits.
        """
        if x.shape[1] == 0:  # a shard of dead columns only
            none = x.new_zeros(x.shape[0])
            stats = Stats(none, none, none - float("inf"), none)
        elif kept is None or self.keeps_logits:
            if kept is not None and kept.data_ptr() != x.data_ptr():
                kept.copy_(x)
            stats = self.steps.stats(x, chunk.targets, self.scale(chunk))
        else:
            stats = self.steps.kept(x, chunk.targets, self.scale(chunk), kept)
        return stats if self.problem.group is None else self._merged(stats, chunk)

    def rows_of(self, kept: Tensor, chunk: Chunk) -> Tensor:
        """What is kept of a chunk."""  # [R, v]
        return kept[chunk.first:chunk.last, :self.problem.shard.columns]

    def _merged(self, mine: Stats, chunk: Chunk) -> Stats:
        """The statistics over all shards: one all-gather of four numbers a row.

        (max, sum e^d, target z or 0, sum d e^d), d = z - max; top stays this shard's own.
        """
        logprobs, entropy, top, log_sum = (s.double() for s in mine[:4])
        live = top > -float("inf")
        zero = torch.zeros_like(top)
        total = torch.where(live, log_sum.exp(), zero)
        weighted = torch.where(live, (log_sum - entropy) * total, zero)
        z = torch.where(chunk.mine(), logprobs + top + log_sum, zero)
        tops, totals, targets, weights = self.problem.gather(
            torch.stack([top, total, z, weighted])).unbind(1)  # [W, R] each
        highest = tops.amax(0)
        shift = torch.where(totals > 0, tops - highest, torch.zeros_like(tops))
        shrunk = totals * shift.exp()
        log_total = shrunk.sum(0).log()
        weighted = ((weights + shift * totals) * shift.exp()).sum(0)
        top = torch.where(live, top, zero)
        merged = torch.stack([targets.sum(0) - highest - log_total,
                              log_total - weighted / shrunk.sum(0), top, highest + log_total - top])
        bad = torch.full_like(merged, float("nan"))
        merged = torch.where(chunk.good, merged, bad).to(mine.top.dtype)
        return Stats(*merged.unbind())._replace(shifts=mine.shifts)

    def add_gradient(self, gradients: Gradients, chunk: Chunk, stats: Stats,
                     slopes: Sequence[Tensor | None], x: Tensor, room: Tensor, *,
                     kept: bool = False) -> None:
        """Adds the gradient of a chunk to the sums.

        slopes: of (logprobs, entropy) [R]. x [R, v]: its logits, or its kept exponentials. room:
        for the gradient by the logits; may be that of the logits.
        """
        scale, (g_logprobs, g_entropy) = self.scale(chunk), slopes
        rows = (chunk.last - chunk.first) * self.problem.products.summands
        fit = self._fit(scale, g_logprobs, g_entropy)
        if fit is not None:
            g_logprobs, g_entropy = (None if g is None else g * fit for g in slopes)
        out = room[:rows]
        if out.shape[1]:
            of_kept = kept and not self.keeps_logits
            step = self.steps.gradient_of_kept if of_kept else self.steps.gradient
            step(g_logprobs, g_entropy, x, chunk.targets, chunk.owned, scale, stats, out)
        gradients.add(chunk, out, fit)

    def _fit(self, scale: Scale, *slopes: Tensor | None) -> Tensor | None:
        """So many times as large, a chunk's gradient by its logits suits the 16 bits it goes into.

        fp16 has no range: a slope of 1e-4 times a probability of 1e-4 would be 0. A power of two
        for each chunk; p |log p + entropy| < 4. bf16 has no bits: rows of one slope, as a mean has
        them, would all be wrong by the same 2^-8. The largest slope of the first chunk becomes 1.
        """  # []
        factors = self.problem.products.factors
        if factors.itemsize > 2 or self.fit is not None:
            return self.fit
        given = [(w, g.abs()) for w, g in zip((1, 4), slopes, strict=True) if g is not None]
        factor = scale.factor().abs()
        factor = factor[:, 0] if factor.dim() else factor
        if factors == torch.bfloat16:
            top = largest(given[0][1] * factor)
            self.fit = torch.where(top > 0, 1 / top, 1.0).clamp(2.0 ** -100, 2.0 ** 100)
            return self.fit
        top = largest(sum(w * g for w, g in given) * factor)
        return torch.exp2((FIT_BITS - torch.log2(top).ceil()).clamp(-100, 100))


def largest(x: Tensor) -> Tensor:
    """Of the finite ones, 0 without any."""  # [R] -> []
    return torch.where(x.isfinite(), x, 0).amax()


def kept_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None,
               softcap: Tensor | None) -> torch.dtype:
    """Of the exponentials: that of hidden, but fp16 for bf16, because its eight bits cost the
    gradient of the entropy its accuracy; fp64 where that is computed in. Of logits under a softcap:
    that of the computation."""
    dtype = compute_dtype(hidden, weight, bias)
    if dtype == torch.float64 or softcap is not None:
        return dtype
    return torch.float16 if hidden.dtype == torch.bfloat16 else hidden.dtype


def kept_width(columns: int, softcap: Tensor | None) -> int:
    """Numbers in a row of kept exponentials; rows of fp32 logits begin at multiples of 16 bytes."""
    return columns if softcap is None else columns + -columns % 4


def blocks_of(columns: int, device: torch.device, softcap: Tensor | None = None) -> int:
    """How many shifts the kept exponentials of a row have: on a CPU they are relative to top, and
    logits under a softcap to nothing."""
    return 0 if device.type == "cpu" or softcap is not None else -(-columns // KEPT_BLOCK)


def fwd(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None, bias: Tensor | None,
        rows: Tensor | None, temperature: Tensor, softcap: Tensor | None, logit_scale: Tensor,
        valid_vocab: int | None, capacity: int | None, budget: int, group: str | None,
        regime: str, *, steps: Steps = TORCH) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprobs [...], entropy [...], stats, kept); see `tppo_kernels.linear_logprobs`.

    stats [4 + blocks, M]: `Stats`. kept: "store": exponentials [M, v], relative to the shift of
    their block of columns, or without blocks to top; under a softcap the logits, each row padded
    (`kept_width`); "frozen": dlogprob/dhidden [M, D], unrounded; otherwise empty [0].
    """
    with torch.autocast(hidden.device.type, enabled=False):
        head = Head(hidden, weight, targets, mask, bias, rows, temperature, softcap, logit_scale,
                    valid_vocab, capacity, budget, group, steps)
        problem = head.problem
        m = slots_of(problem.selection, rows, capacity)
        stats, kept = kept_of(head, m, regime)
        in_place = regime == "store" and kept.dtype == problem.dtype and not steps.aligned
        room, room_dx = problem.rooms(not in_place, regime == "frozen")
        frozen = Gradients(problem, False, False, False)
        if regime == "frozen":
            frozen.hidden = kept[:problem.selection.count]
        for chunk in problem.chunks():
            of_chunk = head.rows_of(kept, chunk) if regime == "store" else None
            x = problem.logits(chunk.h, of_chunk if of_chunk is not None and in_place
                               else room[:chunk.last - chunk.first])
            row = head.stats(chunk, x, of_chunk)
            row.put(stats, chunk.first, chunk.last)
            if regime == "frozen":
                head.add_gradient(frozen, chunk, row, (torch.ones_like(row.top), None), x, room_dx)
        put = problem.selection.put
        return (put(stats[0]).reshape(targets.shape), put(stats[1]).reshape(targets.shape), stats,
                kept)


def slots_of(selection: Selection, rows: Tensor | None, capacity: int | None) -> int:
    """M: the slots that outputs have; a CPU that compacts by itself uses the first of N."""
    return selection.n if rows is None and capacity is None else selection.count


def kept_of(head: Head, m: int, regime: str) -> tuple[Tensor, Tensor]:
    """Zeroed stats [4 + blocks, M], and room for what a regime keeps of M slots."""
    problem = head.problem
    hidden, columns = problem.hidden, problem.shard.columns
    blocks, kept = 0, hidden.new_empty(0)
    if regime == "frozen":
        kept = hidden.new_zeros((m, hidden.shape[1]), dtype=problem.dtype)
    elif regime == "store":
        blocks = blocks_of(columns, torch.device("cuda") if head.steps.by_blocks
                           else hidden.device, head.softcap)
        dtype = kept_dtype(hidden, problem.weight, problem.bias, head.softcap)
        kept = hidden.new_empty((m, kept_width(columns, head.softcap)), dtype=dtype)
        kept[problem.selection.count:] = 0
    return hidden.new_zeros((4 + blocks, m), dtype=problem.dtype), kept


def bwd(g_logprobs: Tensor | None, g_entropy: Tensor | None, hidden: Tensor, weight: Tensor,
        targets: Tensor, mask: Tensor | None, bias: Tensor | None, rows: Tensor | None,
        temperature: Tensor, softcap: Tensor | None, logit_scale: Tensor, valid_vocab: int | None,
        capacity: int | None, budget: int, group: str | None, stats: Tensor, kept: Tensor,
        grad_hidden: bool, grad_weight: bool, grad_bias: bool, *,
        steps: Steps = TORCH) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden, weight and bias; one that is not wanted is empty.

    kept [M, v]: from the exponentials, 4NVD; kept [0]: from recomputed logits, 6NVD.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        head = Head(hidden, weight, targets, mask, bias, rows, temperature, softcap, logit_scale,
                    valid_vocab, capacity, budget, group, steps)
        problem = head.problem
        gradients = Gradients(problem, grad_hidden, grad_weight, grad_bias)
        grads = [None if g is None else g.reshape(-1) for g in (g_logprobs, g_entropy)]
        stored = kept.dim() == 2
        room, room_dx = problem.rooms(not stored, True)
        for chunk in problem.chunks():
            g = [None if g is None else problem.selection.take(g, chunk.first, chunk.last)
                 .to(problem.dtype) for g in grads]
            row = Stats.of(stats, chunk.first, chunk.last)
            x = (head.rows_of(kept, chunk) if stored
                 else problem.logits(chunk.h, room[:chunk.last - chunk.first]))
            head.add_gradient(gradients, chunk, row, g, x, room_dx, kept=stored)
        x = room = room_dx = hidden.new_empty(0)  # before the results are copied
        dhidden, dweight, dbias = gradients.results()
        if grad_hidden:
            dhidden = problem.selection.put(dhidden).reshape(hidden.shape)
        return dhidden, dweight, dbias


def frozen(g_logprobs: Tensor, kept: Tensor, mask: Tensor | None, rows: Tensor | None,
           capacity: int | None, dtype: torch.dtype) -> Tensor:
    """The gradient of hidden, of that dtype, from dlogprob/dhidden [M, D]."""  # [..., D]
    selection = Selection(g_logprobs.numel(), mask, rows, capacity, kept.device)
    g = selection.take(g_logprobs.reshape(-1))[:, None]
    kept = kept[:selection.count]
    dhidden = torch.mul(g, kept, out=torch.empty_like(kept, dtype=dtype))
    return selection.put(dhidden).reshape(*g_logprobs.shape, kept.shape[1])
