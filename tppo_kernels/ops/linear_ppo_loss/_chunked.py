"""`linear_ppo_loss` chunk by chunk: each chunk's gradients are computed in its forward.

The loop that every fast backend runs, and it in plain torch; see `linear_logprobs/_chunked.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._kernels.chunks import Gradients
from ..._kernels.selection import Selection
from ..._math.kept import Stats
from ..._math.linear import slot_count
from ..._math.sequence import compute_dtype, on
from ..linear_logprobs._chunked import TORCH, Head, Steps, supports
from ..ppo_loss.reference import METRICS, Formula, Tokens, token_terms, tokens_of
from .reference import LinearPolicyLossCall, LinearPolicyLossGradient

__all__ = ["bwd", "fwd", "supports"]


class Sums:
    """The loss and its metrics, added up over chunks of tokens."""

    def __init__(self, call: LinearPolicyLossCall, selection: Selection):
        self.selection, self.entropy_grad = selection, call.entropy_grad
        self.formula: Formula = call.terms.formula
        self.cu_seqlens = call.terms.cu_seqlens
        given = (call.inputs.hidden, call.inputs.weight, call.inputs.bias)
        self.slopes_dtype = compute_dtype(*given)
        self.dtype = compute_dtype(*given, *call.terms[:4])
        tokens = tokens_of(call.terms, call.inputs.mask, self.dtype)
        mark = selection.mark()
        if mark is not None:  # rows over capacity are in no sum: every sum becomes NaN
            tokens = tokens._replace(share=tokens.share / mark)
        self.tokens = tokens
        self.loss = tokens.share.new_zeros((), dtype=torch.float64)
        self.metrics = tokens.share.new_zeros(METRICS, dtype=torch.float64)

    def add(self, row: Stats, first: int, last: int) -> list[Tensor | None]:
        """Adds a chunk of the chosen tokens; gives the derivatives of logprobs and entropy [R]."""
        here = Tokens._make(None if x is None else self.selection.take(x.reshape(-1), first, last)
                            for x in self.tokens)  # False and 0 in slots without a row
        return self._add(row.logprobs, row.entropy, here, None)

    def add_all(self, stats: Tensor) -> list[Tensor | None]:
        """Adds all tokens at once, from stats [4 + blocks, M]; derivatives [N]."""
        shape, put = self.tokens.mask.shape, self.selection.put
        logprobs, entropy = (put(s).reshape(shape) for s in stats[:2])
        slopes = self._add(logprobs, entropy, self.tokens, self.cu_seqlens)
        return [None if s is None else s.reshape(-1) for s in slopes]

    def _add(self, logprobs: Tensor, entropy: Tensor, tokens: Tokens, cu_seqlens: Tensor | None
             ) -> list[Tensor | None]:
        terms = token_terms(logprobs.to(self.dtype), entropy.to(self.dtype), tokens, self.formula,
                            cu_seqlens)
        self.loss = self.loss + terms.loss.sum(dtype=torch.float64)
        new, old = terms.metrics.double(), self.metrics
        self.metrics = torch.cat([old[:-1] + new[:-1], torch.maximum(old[-1:], new[-1:])])
        return [terms.dlogprobs.to(self.slopes_dtype),
                terms.dentropy.to(self.slopes_dtype) if self.entropy_grad else None]

    def results(self) -> tuple[Tensor, Tensor]:
        """(loss [], metrics [11])."""
        loss = self.loss.to(self.dtype)
        if self.tokens.ref_logprobs is None:  # a coefficient asks for a term that is not there
            loss = loss + on(torch.where(self.formula.kl_coef == 0, 0.0, float("nan")), loss)
        return loss, self.metrics.to(self.dtype)


def fwd(call: LinearPolicyLossCall, *, steps: Steps = TORCH) -> tuple[Tensor, ...]:
    """(loss [], metrics [11], logprobs, entropy, dhidden [M, D], dweight, dbias).

    A token's ratio is known with its own log-prob: logits, loss and gradients of one chunk after
    another, and nothing of size V outlives its chunk. A sequence's ratio needs all of its tokens
    first: exponentials are kept, and a second walk over the chunks makes gradients from them.
    """
    inputs, wanted = call.inputs, (call.grad_hidden, call.grad_weight, call.grad_bias)
    by_sequence = call.terms.formula.ratio == "sequence"
    with torch.autocast(inputs.hidden.device.type, enabled=False):
        head = Head(inputs, steps)
        problem, steps = head.problem, head.steps
        sums, gradients = Sums(call, problem.selection), Gradients(problem, wanted, waiting=True)
        keeps = by_sequence and any(wanted)
        stats, kept = head.outputs(problem.selection.count, "store" if keeps else "none")
        buffer, dx_buffer = problem.buffers(True, any(wanted) and not by_sequence)
        for rows in head.forward_rows(buffer, kept if keeps else None):
            chunk = rows.chunk
            if rows.exponentials is None:
                row = Stats(*steps.stats(rows.call()))
            else:
                row = steps.exponentials(rows)
            row = head.merged(row, chunk)
            row.put(stats, chunk.first, chunk.last)
            if not by_sequence:
                given = sums.add(row, chunk.first, chunk.last)
                if any(wanted):
                    slopes = head.slopes(chunk, *given)
                    dx = head.gradient_buffer(dx_buffer, chunk)
                    steps.gradient(slopes, rows, row, dx)
                    gradients.add(chunk, dx, slopes.loss_scale)
        if by_sequence:
            given = sums.add_all(stats)
        if keeps:
            # their memory is free before the buffer for gradients is taken
            rows = buffer = dx_buffer = None  # type: ignore[assignment]
            gradient, dx_buffer = head.gradient_step(True), problem.buffers(False, True)[1]
            for rows in head.backward_rows(dx_buffer, kept):
                chunk = rows.chunk
                slopes = head.slopes(chunk, *_at(given, problem.selection, chunk.first, chunk.last))
                dx = head.gradient_buffer(dx_buffer, chunk)
                gradient(slopes, rows, Stats.of(stats, chunk.first, chunk.last), dx)
                gradients.add(chunk, dx, slopes.loss_scale)
        return _results(call, sums, head, stats, gradients)


def _at(slopes: Sequence[Tensor | None], selection: Selection, first: int, last: int
        ) -> list[Tensor | None]:
    """Derivatives [N] at a chunk of the chosen tokens."""
    return [None if s is None else selection.take(s, first, last) for s in slopes]


def _results(call: LinearPolicyLossCall, sums: Sums, head: Head, stats: Tensor,
             gradients: Gradients) -> tuple[Tensor, ...]:
    inputs, put = call.inputs, head.problem.selection.put
    logprobs, entropy = (put(s).reshape(inputs.targets.shape) for s in stats[:2])
    dhidden, dweight, dbias = gradients.results()
    if call.grad_hidden:
        slots = slot_count(inputs.targets.numel(), inputs.rows, inputs.capacity)
        dhidden = torch.cat([dhidden, dhidden.new_zeros(slots - dhidden.shape[0],
                                                        dhidden.shape[1])])
    return *sums.results(), logprobs, entropy, dhidden, dweight, dbias


def bwd(call: LinearPolicyLossGradient) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden [..., D], weight and bias: those of forward times grad_loss, each
    rounded once, here."""
    hidden, weight, bias = (
        torch.mul(x, call.grad_loss, out=torch.empty_like(x, dtype=dtype))
        for x, dtype in zip(call[1:4], call[-3:], strict=True))
    if hidden.dim() == 2:
        selection = Selection(call.targets.numel(), call.mask, call.rows, call.capacity,
                              hidden.device)
        hidden = selection.put(hidden).reshape(*call.targets.shape, hidden.shape[1])
    return hidden, weight, bias
