"""The specification of `linear_logprobs` in plain PyTorch: chunks of rows, each a row formula.

The formula of a row is `token_logprobs`'s own; a faster backend replaces the row `Steps` only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._linear import Chunk, Gradients, Problem
from ..._sequence import select
from ...rows import Selection
from ..token_logprobs import reference as token

FP16_SCALE = 2.0 ** 15  # a kept fp16 exponential is normal down to e^-20


class Scale(NamedTuple):
    """How logits become z: softcap(logit_scale x) / temperature; temperature 0-d or [R]."""

    temperature: Tensor
    softcap: Tensor | None
    logit_scale: Tensor

    def factor(self) -> Tensor:
        """dz/dx without a softcap: 0-d, or [R, 1]."""
        t = self.temperature
        return self.logit_scale / (t[:, None] if t.dim() else t)


class Stats(NamedTuple):
    """What backward knows of each row; logsumexp(z) = top + log_sum, top this shard's own."""

    logprobs: Tensor  # [R]
    entropy: Tensor  # [R]
    top: Tensor  # [R]
    log_sum: Tensor  # [R]


def row_stats(x: Tensor, targets: Tensor, scale: Scale) -> Stats:
    """The results of `token_logprobs` for the logits x of a chunk."""  # [R, v]
    return Stats(*token.fwd(x, targets, None, *scale, None))


def row_gradient(g_logprobs: Tensor | None, g_entropy: Tensor | None, x: Tensor, targets: Tensor,
                 scale: Scale, stats: Stats) -> Tensor:
    """The gradient by the logits x; it may take the place of x."""  # [R, v]
    return token.bwd(g_logprobs, g_entropy, x, targets, None, *scale, None, *stats[1:])


def row_exponentials(x: Tensor, scale: Scale, stats: Stats, out: Tensor) -> None:
    """out = exp(z - top); may take the place of x. In fp16: times 2^15."""  # [R, v]
    t = scale.temperature
    z = token.scaled(x, t[:, None] if t.dim() else t, scale.softcap, scale.logit_scale)
    e = z.sub_(stats.top[:, None]).exp_()
    out.copy_(e.mul_(FP16_SCALE) if out.dtype == torch.float16 else e)


def row_gradient_of_kept(g_logprobs: Tensor | None, g_entropy: Tensor | None, e: Tensor,
                         targets: Tensor, owned: Tensor | None, scale: Scale, stats: Stats,
                         out: Tensor) -> None:
    """out = the gradient by the logits, from the exponentials that `row_exponentials` kept.

    z - top = log e. At the target it is logprob + log_sum, unrounded: 1 - p is a difference.
    """  # [R, v]
    d = torch.log(e.to(out.dtype) / FP16_SCALE if e.dtype == torch.float16 else e)
    at_target = targets[:, None]
    exact = (stats.logprobs + stats.log_sum)[:, None]
    d.scatter_(1, at_target, exact if owned is None
               else torch.where(owned[:, None], exact, d.gather(1, at_target)))
    one = out.new_ones(())
    dz = token.bwd(g_logprobs, g_entropy, d, targets, None, one, None, one, None, stats.entropy,
                   torch.zeros_like(stats.top), stats.log_sum)
    if owned is not None and g_logprobs is not None:
        dz[:, 0] -= select(g_logprobs, ~owned)
    if scale.softcap is not None:  # z = cap u / T, u = tanh, du = 1 - u^2
        t = scale.temperature
        u = (d + stats.top[:, None]) * (t[:, None] if t.dim() else t) / scale.softcap
        dz = dz * (1 - u.clamp(-1, 1).square())
    torch.mul(dz, scale.factor(), out=out)


class Steps(NamedTuple):
    """The row formulas of a backend."""

    stats: Any = row_stats
    gradient: Any = row_gradient
    exponentials: Any = row_exponentials
    gradient_of_kept: Any = row_gradient_of_kept


TORCH = Steps()


class Head:
    """A problem and the row formulas: what both linear operators do with one chunk of rows."""

    def __init__(self, hidden, weight, targets, mask, bias, rows, temperature, softcap,
                 logit_scale, valid_vocab, capacity, budget, group, steps: Steps = TORCH):
        self.problem = Problem(hidden, weight, targets, mask, bias, rows, temperature, valid_vocab,
                               capacity, budget, group)
        self.softcap, self.logit_scale, self.steps = softcap, logit_scale, steps

    def scale(self, chunk: Chunk) -> Scale:
        """The scaling of a chunk's logits."""
        return Scale(chunk.temperature, self.softcap, self.logit_scale)

    def stats(self, chunk: Chunk, x: Tensor) -> Stats:
        """Statistics of a chunk from its logits [R, v]; NaN where the target is no live column."""
        if x.shape[1] == 0:  # a shard of dead columns only
            none = x.new_zeros(x.shape[0])
            stats = Stats(none, none, none - float("inf"), none)
        else:
            stats = self.steps.stats(x, chunk.targets, self.scale(chunk))
        return stats if self.problem.group is None else self._merged(stats, chunk)

    def _merged(self, mine: Stats, chunk: Chunk) -> Stats:
        """The statistics over all shards: one all-gather of four numbers a row.

        (max, sum e^d, target z or 0, sum d e^d), d = z - max; top stays this shard's own.
        """
        logprobs, entropy, top, log_sum = (s.double() for s in mine)
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
        return Stats(*torch.where(chunk.good, merged, bad).to(mine.top.dtype).unbind())

    def gradient(self, chunk: Chunk, x: Tensor, stats: Stats, g_logprobs: Tensor | None,
                 g_entropy: Tensor | None) -> Tensor:
        """The gradient by the logits x [R, v] of a chunk, which it may overwrite."""
        if x.shape[1] == 0:
            return x
        scale = self.scale(chunk)
        surplus = None
        if chunk.owned is not None and g_logprobs is not None:
            u = 0 if self.softcap is None else torch.tanh(x[:, :1] * self.logit_scale
                                                          / self.softcap)
            # The row formula adds g at column 0 for a target of another shard.
            surplus = select(g_logprobs, ~chunk.owned)[:, None] * (1 - u * u) * scale.factor()
        dx = self.steps.gradient(g_logprobs, g_entropy, x, chunk.targets, scale, stats)
        if surplus is not None:
            dx[:, :1] -= surplus
        return dx

    def gradient_of_kept(self, chunk: Chunk, e: Tensor, stats: Stats, out: Tensor,
                         g_logprobs: Tensor | None, g_entropy: Tensor | None) -> Tensor:
        """As `gradient`, from the kept exponentials e [R, v]."""
        if e.shape[1] == 0:
            return out
        scale = self.scale(chunk)
        self.steps.gradient_of_kept(g_logprobs, g_entropy, e, chunk.targets, chunk.owned, scale,
                                    stats, out)
        return out


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the exponentials: fp16 for both 16-bit dtypes, because bf16's eight bits cost the
    gradient of the entropy its accuracy; fp32 and fp64 keep themselves."""
    return torch.float16 if dtype == torch.bfloat16 else dtype


def fwd(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None, bias: Tensor | None,
        rows: Tensor | None, temperature: Tensor, softcap: Tensor | None, logit_scale: Tensor,
        valid_vocab: int | None, capacity: int | None, budget: int, group: str | None,
        regime: str, *, steps: Steps = TORCH) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprobs [...], entropy [...], stats [4, M], kept); see `tppo_kernels.linear_logprobs`.

    kept: "store": exponentials [M, v]; "frozen": dlogprob/dhidden [M, D]; otherwise empty [0].
    """
    with torch.autocast(hidden.device.type, enabled=False):
        head = Head(hidden, weight, targets, mask, bias, rows, temperature, softcap, logit_scale,
                    valid_vocab, capacity, budget, group, steps)
        problem = head.problem
        m = slots_of(problem.selection, rows, capacity)
        stats = hidden.new_zeros((4, m), dtype=problem.dtype)
        kept = _room(head, m, regime)
        in_place = regime == "store" and kept.dtype == problem.dtype
        room = kept if in_place else problem.workspace()
        frozen = Gradients(problem, regime == "frozen", False, False)
        for chunk in problem.chunks():
            first = chunk.first if in_place else 0
            x = problem.logits(chunk.h, room[first:first + chunk.last - chunk.first])
            here = head.stats(chunk, x)
            stats[:, chunk.first:chunk.last] = torch.stack(here)
            if regime == "store" and x.shape[1]:
                steps.exponentials(x, head.scale(chunk), here, kept[chunk.first:chunk.last])
            if regime == "frozen":
                one = torch.ones_like(here.top)
                frozen.add(chunk, head.gradient(chunk, x, here, one, None))
        if frozen.hidden is not None:
            kept[:problem.selection.count] = frozen.hidden
        put = problem.selection.put
        return (put(stats[0]).reshape(targets.shape), put(stats[1]).reshape(targets.shape), stats,
                kept)


def slots_of(selection: Selection, rows: Tensor | None, capacity: int | None) -> int:
    """M: the slots that outputs have; a CPU that compacts by itself uses the first of N."""
    return selection.n if rows is None and capacity is None else selection.count


def _room(head: Head, m: int, regime: str) -> Tensor:
    hidden, columns = head.problem.hidden, head.problem.shard.columns
    if regime == "frozen":
        return hidden.new_zeros(m, hidden.shape[1])
    if regime == "store":
        kept = hidden.new_empty((m, columns), dtype=kept_dtype(hidden.dtype))
        kept[head.problem.selection.count:] = 0
        return kept
    return hidden.new_empty(0)


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
        room = problem.workspace()
        for chunk in problem.chunks():
            here = slice(chunk.first, chunk.last)
            g = [None if g is None else problem.selection.take(g, chunk.first, chunk.last)
                 .to(problem.dtype) for g in grads]
            row = Stats(*stats[:, here].unbind())
            x = room[:chunk.last - chunk.first]
            if kept.dim() == 2:
                dx = head.gradient_of_kept(chunk, kept[here], row, x, *g)
            else:
                dx = head.gradient(chunk, problem.logits(chunk.h, x), row, *g)
            gradients.add(chunk, dx)
        dhidden, dweight, dbias = gradients.results()
        if grad_hidden:
            dhidden = problem.selection.put(dhidden).reshape(hidden.shape)
        return dhidden, dweight, dbias


def frozen(g_logprobs: Tensor, kept: Tensor, mask: Tensor | None, rows: Tensor | None,
           capacity: int | None) -> Tensor:
    """The gradient of hidden from dlogprob/dhidden [M, D], in its dtype."""  # [..., D]
    selection = Selection(g_logprobs.numel(), mask, rows, capacity, kept.device)
    g = selection.take(g_logprobs.reshape(-1)).to(kept.dtype)
    dhidden = g[:, None] * kept[:selection.count]
    return selection.put(dhidden).reshape(*g_logprobs.shape, kept.shape[1])
