"""The specification of `linear_ppo_loss`: each chunk's gradients are computed in its forward."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._core.check import Reduction
from ..._math.chunks import Gradients
from ..._math.rows import Selection
from ..._math.sequence import compute_dtype, on, reduction_weights, spread, valid_mask
from ..linear_logprobs import reference as linear
from ..ppo_loss.reference import Formula, TokenTerms, token_terms

METRICS = 11  # sums, and a maximum at the end: the order of `PolicyMetrics`


class Tokens(NamedTuple):
    """The per-token arguments of the loss, [B, T] or [N], or of a chunk, [R]."""

    old_logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    share: Tensor
    ref_logprobs: Tensor | None
    weights: Tensor | None

    def chunk(self, selection: Selection, first: int, last: int) -> Tokens:
        """These arguments at some of the chosen rows; False and 0 in slots without a row."""
        return Tokens._make(None if x is None else selection.take(x.reshape(-1), first, last)
                            for x in self)

    def terms(self, logprobs: Tensor, entropy: Tensor, formula: Formula,
              cu_seqlens: Tensor | None = None) -> TokenTerms:
        """The formula of `ppo_loss` for these tokens."""
        dtype = self.share.dtype
        return token_terms(logprobs.to(dtype), self.old_logprobs, self.advantages, self.mask,
                           self.share, formula, entropy=entropy.to(dtype),
                           ref_logprobs=self.ref_logprobs, weights=self.weights,
                           cu_seqlens=cu_seqlens)


def tokens_of(old_logprobs: Tensor, advantages: Tensor, mask: Tensor | None,
              ref_logprobs: Tensor | None, weights: Tensor | None,
              counts: tuple[Tensor | None, Tensor | None, Tensor | None],
              cu_seqlens: Tensor | None, reduction: str, dtype: torch.dtype) -> Tokens:
    """Every per-token argument at every token, in the dtype of the computation."""
    valid = valid_mask(old_logprobs, mask)

    def every(x: Tensor) -> Tensor:
        return (x if x.shape == valid.shape else spread(x, valid, cu_seqlens)).to(dtype)

    share = reduction_weights(valid, Reduction(*counts, reduction), cu_seqlens, dtype)
    return Tokens(old_logprobs.to(dtype), every(advantages), valid, share,
                  None if ref_logprobs is None else every(ref_logprobs),
                  None if weights is None else every(weights))


def fwd(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None, bias: Tensor | None,
        rows: Tensor | None, temperature: Tensor, softcap: Tensor | None, logit_scale: Tensor,
        valid_vocab: int | None, capacity: int | None, budget: int, group: str | None,
        old_logprobs: Tensor, advantages: Tensor, ref_logprobs: Tensor | None,
        weights: Tensor | None, clip_low: Tensor, clip_high: Tensor, dual_clip: Tensor | None,
        max_log_ratio: Tensor, entropy_coef: Tensor, kl_coef: Tensor, num_tokens: Tensor | None,
        num_sequences: Tensor | None, norm_length: Tensor | None, cu_seqlens: Tensor | None,
        ratio: str, kl_estimator: str, reduction: str, entropy_grad: bool, grad_hidden: bool,
        grad_weight: bool, grad_bias: bool, *, steps: linear.Steps = linear.TORCH
        ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss [], metrics [11], logprobs, entropy, dhidden [M, D], dweight, dbias).

    The gradients are in the dtype of the computation; one that is not wanted is empty. See
    `tppo_kernels.linear_ppo_loss`.
    """
    formula = Formula(clip_low, clip_high, dual_clip, max_log_ratio, entropy_coef, kl_coef, ratio,
                      kl_estimator)
    wanted = (grad_hidden, grad_weight, grad_bias)
    with torch.autocast(hidden.device.type, enabled=False):
        head = linear.Head(hidden, weight, targets, mask, bias, rows, temperature, softcap,
                           logit_scale, valid_vocab, capacity, budget, group, steps)
        given = (hidden, weight, bias, old_logprobs, advantages, ref_logprobs, weights)
        dtype = compute_dtype(*given)
        tokens = tokens_of(old_logprobs, advantages, mask, ref_logprobs, weights,
                           (num_tokens, num_sequences, norm_length), cu_seqlens, reduction, dtype)
        mark = head.problem.selection.mark()
        if mark is not None:  # rows over capacity are in no sum: every sum becomes NaN
            tokens = tokens._replace(share=tokens.share / mark)
        run = _by_tokens if ratio == "token" else _by_sequences
        loss, metrics, stats, gradients = run(head, tokens, formula, cu_seqlens, wanted,
                                              entropy_grad)
        loss = loss.to(dtype)
        if ref_logprobs is None:  # a coefficient that is not 0 asks for a term that is not there
            loss = loss + on(torch.where(kl_coef == 0, 0.0, float("nan")), loss)
        put = head.problem.selection.put
        dhidden, dweight, dbias = gradients.results()
        if grad_hidden:
            m = linear.slots_of(head.problem.selection, rows, capacity)
            dhidden = torch.cat([dhidden, dhidden.new_zeros(m - dhidden.shape[0],
                                                            dhidden.shape[1])])
        return (loss, metrics.to(dtype), put(stats[0]).reshape(targets.shape),
                put(stats[1]).reshape(targets.shape), dhidden, dweight, dbias)


def _by_tokens(head: linear.Head, tokens: Tokens, formula: Formula, cu_seqlens: Tensor | None,
               wanted: tuple[bool, bool, bool], entropy_grad: bool
               ) -> tuple[Tensor, Tensor, Tensor, Gradients]:
    """Logits, loss and gradients of one chunk after another; nothing of size V outlives its chunk.

    (loss, metrics, (logprobs, entropy) [2, M], gradients).
    """
    problem = head.problem
    gradients = Gradients(problem, *wanted, waiting=True)
    stats = problem.hidden.new_zeros((2, problem.selection.count), dtype=problem.dtype)
    loss = stats.new_zeros((), dtype=torch.float64)
    metrics = stats.new_zeros(METRICS, dtype=torch.float64)
    room, room_dx = problem.rooms(True, any(wanted))
    for chunk in problem.chunks():
        x = problem.logits(chunk.h, room[:chunk.last - chunk.first])
        row = head.stats(chunk, x)
        here = tokens.chunk(problem.selection, chunk.first, chunk.last)
        terms = here.terms(row.logprobs, row.entropy, formula)
        loss = loss + terms.loss.sum(dtype=torch.float64)
        new = terms.metrics.double()
        metrics = torch.cat([metrics[:-1] + new[:-1], torch.maximum(metrics[-1:], new[-1:])])
        stats[:, chunk.first:chunk.last] = torch.stack(row[:2])
        if any(wanted):
            g = (terms.dlogprobs, terms.dentropy if entropy_grad else None)
            head.add_gradient(gradients, chunk, row, _in(g, x.dtype), x, room_dx)
    return loss, metrics, stats, gradients


def _by_sequences(head: linear.Head, tokens: Tokens, formula: Formula, cu_seqlens: Tensor | None,
                  wanted: tuple[bool, bool, bool], entropy_grad: bool
                  ) -> tuple[Tensor, Tensor, Tensor, Gradients]:
    """As `_by_tokens` with a ratio that needs all tokens of a sequence: from kept exponentials."""
    problem = head.problem
    selection = problem.selection
    gradients = Gradients(problem, *wanted, waiting=True)
    stats, kept = linear.kept_of(head, selection.count, "store" if any(wanted) else "none")
    room = problem.rooms(True, False)[0]
    for chunk in problem.chunks():
        x = problem.logits(chunk.h, room[:chunk.last - chunk.first])
        row = head.stats(chunk, x, head.rows_of(kept, chunk) if any(wanted) else None)
        row.put(stats, chunk.first, chunk.last)
    logprobs, entropy = (selection.put(s).reshape(tokens.mask.shape) for s in stats[:2])
    terms = tokens.terms(logprobs, entropy, formula, cu_seqlens)
    if any(wanted):
        x = room = stats.new_empty(0)  # before the room for gradients is taken
        room_dx = problem.rooms(False, True)[1]
        slopes = _in((terms.dlogprobs, terms.dentropy if entropy_grad else None), stats.dtype)
        for chunk in problem.chunks():
            g = [None if s is None else selection.take(s.reshape(-1), chunk.first, chunk.last)
                 for s in slopes]
            head.add_gradient(gradients, chunk, linear.Stats.of(stats, chunk.first, chunk.last), g,
                              head.rows_of(kept, chunk), room_dx, kept=True)
    return terms.loss.sum(dtype=torch.float64), terms.metrics, stats, gradients


def _in(slopes: tuple[Tensor, Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    return [None if s is None else s.to(dtype) for s in slopes]


def bwd(grad_loss: Tensor, dhidden: Tensor, dweight: Tensor, dbias: Tensor, targets: Tensor,
        mask: Tensor | None, rows: Tensor | None, capacity: int | None, *dtypes: torch.dtype
        ) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden [..., D], weight and bias: those of forward times grad_loss.

    dtypes: of the three. Each is rounded once, here.
    """
    hidden, weight, bias = (
        torch.mul(x, grad_loss, out=torch.empty_like(x, dtype=dtype))
        for x, dtype in zip((dhidden, dweight, dbias), dtypes, strict=True))
    if hidden.dim() == 2:
        selection = Selection(targets.numel(), mask, rows, capacity, hidden.device)
        hidden = selection.put(hidden).reshape(*targets.shape, hidden.shape[1])
    return hidden, weight, bias
