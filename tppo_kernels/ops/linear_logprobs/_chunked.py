"""`linear_logprobs` chunk by chunk: the loop that every fast backend runs, and it in plain torch.

A chunk's logits are computed into a buffer, a step of the backend makes statistics of its rows or a
gradient of them, and the products of that gradient are added up. A faster backend brings `Steps` of
its own: functions that launch a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..._kernels.chunks import Chunk, Gradients, Problem
from ..._kernels.selection import Selection
from ..._math import kept as layout
from ..._math.kept import FP16_SCALE, Stats, empty_outputs
from ..._math.linear import LinearInputs, Scaling, slot_count
from ..._math.sequence import select
from ..token_logprobs import reference as token
from ..token_logprobs.reference import TokenLogprobsCall, TokenLogprobsGradient
from .reference import FrozenGradient, LinearLogprobsCall, LinearLogprobsGradient

SCALE_BITS = 14  # a gradient of logits in fp16 is scaled to 2^14 at most: fp16 ends at 2^16


class Rows(NamedTuple):
    """A chunk with its logits, as a step takes it."""

    chunk: Chunk
    x: Tensor  # [R, v]: logits, or in backward the exponentials that forward has kept
    exponentials: Tensor | None = None  # [R, v]: where forward writes them; may be x

    def call(self) -> TokenLogprobsCall:
        """`token_logprobs` of these logits."""
        return TokenLogprobsCall(self.x, self.chunk.targets, None, self.chunk.scaling, None)


class Slopes(NamedTuple):
    """The gradients of a chunk's results that come in, times a loss scale."""

    logprobs: Tensor | None  # [R]
    entropy: Tensor | None  # [R]
    loss_scale: Tensor | None  # []; None is 1


def row_exponentials(rows: Rows) -> Stats:
    """The statistics of the rows; writes exp(z - top), times 2^15 in fp16, for backward.

    Only without a softcap, as `row_gradient_of_exponentials`.
    """  # [R, v]
    assert rows.exponentials is not None
    stats, scaling = Stats(*token.fwd(rows.call())), rows.chunk.scaling
    t = scaling.temperature
    z = token.scaled(rows.x, scaling._replace(temperature=t[:, None] if t.dim() else t))
    e = z.sub_(stats.top[:, None]).exp_()
    half = rows.exponentials.dtype == torch.float16
    rows.exponentials.copy_(e.mul_(FP16_SCALE) if half else e)
    return stats


def write(dx: Tensor, out: Tensor) -> None:
    """out = dx, rounded; or two numbers whose sum it is, all of the first ones above."""
    rows = dx.shape[0]  # [R, v] -> [R, v] or [2 R, v]
    out[:rows].copy_(dx)
    if out.shape[0] > rows:
        torch.sub(dx, out[:rows], out=out[rows:])


def at_column_0(slopes: Slopes, rows: Rows) -> Tensor | None:
    """What the formula of a row adds at column 0 for a target of another shard, which stands as 0.

    [R, 1]; None without a group.
    """
    owned, scaling = rows.chunk.owned, rows.chunk.scaling
    if owned is None or slopes.logprobs is None:
        return None
    slope = 1.0 if scaling.softcap is None else token.tanh_slope(
        rows.x[:, :1] * scaling.logit_scale / scaling.softcap)
    return select(slopes.logprobs, ~owned)[:, None] * slope * scaling.factor()


def row_gradient(slopes: Slopes, rows: Rows, stats: Stats, out: Tensor) -> None:
    """out = the gradient of the logits; it may overwrite them. See `write`."""  # [R, v]
    too_much = at_column_0(slopes, rows)
    dx = token.bwd(TokenLogprobsGradient(*slopes[:2], rows.call(), *stats[1:4]))
    if too_much is not None:
        dx[:, :1] -= too_much
    write(dx, out)


def row_gradient_of_exponentials(slopes: Slopes, rows: Rows, stats: Stats, out: Tensor) -> None:
    """out = the gradient of the logits, from the exponentials that forward has kept.

    z - top = log e. At the target it is logprob + log_sum, unrounded: 1 - p is a difference.
    """  # [R, v]
    e, targets, owned, scaling = rows.x, rows.chunk.targets, rows.chunk.owned, rows.chunk.scaling
    dtype = stats.top.dtype
    d = torch.log(e.to(dtype) / FP16_SCALE if e.dtype == torch.float16 else e)
    if stats.shifts is not None:
        shifts = (stats.shifts - stats.top).T  # [R, blocks]
        d += shifts.repeat_interleave(layout.KEPT_BLOCK, 1)[:, :d.shape[1]]
    at_target = targets[:, None]
    exact = (stats.logprobs + stats.log_sum)[:, None]
    d.scatter_(1, at_target, exact if owned is None
               else torch.where(owned[:, None], exact, d.gather(1, at_target)))
    one = d.new_ones(())
    dz = token.bwd(TokenLogprobsGradient(
        *slopes[:2], TokenLogprobsCall(d, targets, None, Scaling(one, None, one), None),
        stats.entropy, torch.zeros_like(stats.top), stats.log_sum))
    if owned is not None and slopes.logprobs is not None:
        dz[:, 0] -= select(slopes.logprobs, ~owned)
    if out.dtype == dtype:
        torch.mul(dz, scaling.factor(), out=out)
    else:
        write(dz * scaling.factor(), out)


class Steps(NamedTuple):
    """What a backend does with the logits of a chunk."""

    stats: Callable[[TokenLogprobsCall], tuple[Tensor, ...]] = token.fwd
    exponentials: Callable[[Rows], Stats] = row_exponentials
    gradient: Callable[[Slopes, Rows, Stats, Tensor], None] = row_gradient
    gradient_of_exponentials: Callable[[Slopes, Rows, Stats, Tensor], None] = (
        row_gradient_of_exponentials)
    aligned: bool = False  # rows of logits and gradients begin at multiples of 16 bytes
    by_blocks: bool = False  # kept exponentials have shifts on every device


TORCH = Steps()


def _no_columns(call: TokenLogprobsCall) -> tuple[Tensor, ...]:
    zero = call.logits.new_zeros(call.logits.shape[0])
    return zero, zero, zero - float("inf"), zero


def _no_gradient(slopes: Slopes, rows: Rows, stats: Stats, out: Tensor) -> None:
    """The gradient step of a shard that has dead columns only."""


class Head:
    """What both linear operators do with the chunks of a call between two steps."""

    def __init__(self, inputs: LinearInputs, steps: Steps = TORCH):
        self.inputs, self.problem = inputs, Problem(inputs, steps.aligned)
        self.live = self.problem.shard.columns > 0
        if not self.live:
            steps = steps._replace(stats=_no_columns, gradient=_no_gradient,
                                   gradient_of_exponentials=_no_gradient)
        self.steps = steps
        # Under a softcap, backward is given the logits instead of their exponentials: see
        # `_math.kept`.
        self.keeps_logits = inputs.scaling.softcap is not None
        self.loss_scale: Tensor | None = None  # []: of every chunk where the factors are bf16

    def outputs(self, slots: int, regime: str) -> tuple[Tensor, Tensor]:
        """Memory for the statistics of so many rows, and for what a regime keeps of them."""
        stats, kept = empty_outputs(self.inputs, slots, regime, by_blocks=self.steps.by_blocks)
        if regime == "store":
            kept[self.problem.selection.count:] = 0
        return stats, kept

    def forward_rows(self, buffer: Tensor, kept: Tensor | None = None) -> Iterator[Rows]:
        """The chunks with their logits, in the buffer, or if that is empty where they are kept.

        kept [M, v]: where backward shall have the exponentials, or under a softcap the logits.
        """
        for chunk in self.problem.chunks():
            there = None if kept is None else self.kept_rows(kept, chunk)
            if there is None or buffer.numel():
                x = self.problem.logits(chunk, buffer[:chunk.last - chunk.first])
                if there is not None and self.keeps_logits:
                    there.copy_(x)
            else:
                x = self.problem.logits(chunk, there)
            yield Rows(chunk, x, None if self.keeps_logits or not self.live else there)

    def backward_rows(self, buffer: Tensor, kept: Tensor | None = None) -> Iterator[Rows]:
        """The chunks with what forward has kept, or else with their logits in the buffer."""
        for chunk in self.problem.chunks():
            yield Rows(chunk, self.problem.logits(chunk, buffer[:chunk.last - chunk.first])
                       if kept is None else self.kept_rows(kept, chunk))

    def kept_rows(self, kept: Tensor, chunk: Chunk) -> Tensor:
        """What is kept of a chunk."""  # [R, v]
        return kept[chunk.first:chunk.last, :self.problem.shard.columns]

    def gradient_step(self, kept: bool) -> Callable[[Slopes, Rows, Stats, Tensor], None]:
        """The step that makes a gradient of what `backward_rows` gives."""
        from_logits = self.keeps_logits or not kept
        return self.steps.gradient if from_logits else self.steps.gradient_of_exponentials

    def merged(self, own: Stats, chunk: Chunk) -> Stats:
        """The statistics over all shards: one all-gather of four numbers a row.

        (max, sum e^d, target z or 0, sum d e^d), d = z - max; top stays this shard's own. NaN where
        the target is no live column.
        """
        if self.problem.group is None:
            return own
        logprobs, entropy, top, log_sum = (s.double() for s in own[:4])
        live = top > -float("inf")
        zero = torch.zeros_like(top)
        total = torch.where(live, log_sum.exp(), zero)
        weighted = torch.where(live, (log_sum - entropy) * total, zero)
        z = torch.where(chunk.here(), logprobs + top + log_sum, zero)
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
        merged = torch.where(chunk.good, merged, bad).to(own.top.dtype)
        return Stats(*merged.unbind())._replace(shifts=own.shifts)

    def gradient_buffer(self, buffer: Tensor, chunk: Chunk) -> Tensor:
        """The part of the buffer that takes the gradient of the logits of a chunk.

        [summands R, v]
        """
        return buffer[:(chunk.last - chunk.first) * self.problem.products.summands]

    def slopes(self, chunk: Chunk, logprobs: Tensor | None, entropy: Tensor | None) -> Slopes:
        """The incoming gradients [R] times a loss scale, so that the gradient of a chunk's logits
        suits the 16 bits of its buffer.

        fp16 has no range: a slope of 1e-4 times a probability of 1e-4 would be 0. A power of two
        for each chunk; p |log p + entropy| < 4. bf16 has no bits: rows of one slope, as a mean has
        them, would all be wrong by the same 2^-8. The largest slope of the first chunk becomes 1.
        """
        scale = self._loss_scale(chunk.scaling, logprobs, entropy)
        if scale is None:
            return Slopes(logprobs, entropy, None)
        return Slopes(None if logprobs is None else logprobs * scale,
                      None if entropy is None else entropy * scale, scale)

    def _loss_scale(self, scaling: Scaling, *slopes: Tensor | None) -> Tensor | None:
        factors = self.problem.products.factors
        if factors.itemsize > 2 or self.loss_scale is not None:
            return self.loss_scale
        given = [(w, g.abs()) for w, g in zip((1, 4), slopes, strict=True) if g is not None]
        factor = scaling.factor().abs()
        factor = factor[:, 0] if factor.dim() else factor
        if factors == torch.bfloat16:
            top = _largest(given[0][1] * factor)
            self.loss_scale = torch.where(top > 0, 1 / top, 1.0).clamp(2.0 ** -100, 2.0 ** 100)
            return self.loss_scale
        top = _largest(sum(w * g for w, g in given) * factor)
        return torch.exp2((SCALE_BITS - torch.log2(top).ceil()).clamp(-100, 100))


def _largest(x: Tensor) -> Tensor:
    """The largest of the finite values, 0 where there is none."""  # [R] -> []
    return torch.where(x.isfinite(), x, 0).amax()


def supports(call: object) -> str | None:
    """It takes everything."""
    return None


def fwd(call: LinearLogprobsCall, *, steps: Steps = TORCH
        ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprobs [...], entropy [...], stats, kept); see `reference.fwd`."""
    inputs, regime = call
    shape = inputs.targets.shape
    with torch.autocast(inputs.hidden.device.type, enabled=False):
        head = Head(inputs, steps)
        problem, steps = head.problem, head.steps
        slots = slot_count(problem.selection.n, inputs.rows, inputs.capacity)
        stats, kept = head.outputs(slots, regime)
        in_place = regime == "store" and kept.dtype == problem.dtype and not steps.aligned
        buffer, dx_buffer = problem.buffers(not in_place, regime == "frozen")
        gradients = Gradients(problem, (False, False, False))
        if regime == "frozen":
            gradients.hidden = kept[:problem.selection.count]
        for rows in head.forward_rows(buffer, kept if regime == "store" else None):
            chunk = rows.chunk
            if rows.exponentials is None:
                row = Stats(*steps.stats(rows.call()))
            else:
                row = steps.exponentials(rows)
            row = head.merged(row, chunk)
            row.put(stats, chunk.first, chunk.last)
            if regime == "frozen":
                slopes = head.slopes(chunk, torch.ones_like(row.top), None)
                dx = head.gradient_buffer(dx_buffer, chunk)
                steps.gradient(slopes, rows, row, dx)
                gradients.add(chunk, dx, slopes.loss_scale)
        put = problem.selection.put
        return put(stats[0]).reshape(shape), put(stats[1]).reshape(shape), stats, kept


def bwd(call: LinearLogprobsGradient, *, steps: Steps = TORCH) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden, weight and bias; one that is not wanted is empty.

    kept [M, v]: from the exponentials, 4NVD; kept [0]: from recomputed logits, 6NVD.
    """
    inputs, wanted = call.inputs, (call.grad_hidden, call.grad_weight, call.grad_bias)
    with torch.autocast(inputs.hidden.device.type, enabled=False):
        head = Head(inputs, steps)
        problem, take = head.problem, head.problem.selection.take
        gradients = Gradients(problem, wanted)
        grads = [None if g is None else g.reshape(-1) for g in (call.g_logprobs, call.g_entropy)]
        kept = call.kept if call.kept.dim() == 2 else None
        gradient = head.gradient_step(kept is not None)
        buffer, dx_buffer = problem.buffers(kept is None, True)
        for rows in head.backward_rows(buffer, kept):
            chunk = rows.chunk
            slopes = head.slopes(chunk, *(
                None if g is None else take(g, chunk.first, chunk.last).to(problem.dtype)
                for g in grads))
            dx = head.gradient_buffer(dx_buffer, chunk)
            gradient(slopes, rows, Stats.of(call.stats, chunk.first, chunk.last), dx)
            gradients.add(chunk, dx, slopes.loss_scale)
        # their memory is free before the results are copied
        rows = dx = buffer = dx_buffer = None  # type: ignore[assignment]
        dhidden, dweight, dbias = gradients.results()
        if call.grad_hidden:
            dhidden = problem.selection.put(dhidden).reshape(inputs.hidden.shape)
        return dhidden, dweight, dbias


def frozen(call: FrozenGradient) -> Tensor:
    """The gradient of hidden, of that dtype, from dlogprob/dhidden [M, D]."""  # [..., D]
    g, kept = call.g_logprobs, call.kept
    selection = Selection(g.numel(), call.mask, call.rows, call.capacity, kept.device)
    kept = kept[:selection.count]
    dhidden = torch.mul(selection.take(g.reshape(-1))[:, None], kept,
                        out=torch.empty_like(kept, dtype=call.dtype))
    return selection.put(dhidden).reshape(*g.shape, kept.shape[1])
