"""States of a full sequence, lined up with its response tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..._core.check import LABELS, Check, offsets
from ..._core.derivatives import savable
from ..._core.eager import recorded
from ..._core.keywords import suggests
from ..._core.op import Op
from ..._core.record import build, flat
from ..._math.layout import ALIGNMENTS
from . import reference
from .reference import ResponseStatesCall, ResponseStatesGradient

_op = Op("response_states")


def sample_inputs() -> tuple[tuple, dict]:
    """Arguments of a small call, in fp64: for the self-test."""
    g = torch.Generator().manual_seed(0)
    full = torch.randn(3, 17, 4, generator=g, dtype=torch.float64)
    return (full, torch.tensor([5, 3, 9]), 8), {
        "align": "logprob", "mask": torch.rand(3, 8, generator=g) < 0.7}


def _check_values(call: ResponseStatesCall) -> None:
    full, prompt_length, mask, cu_seqlens, T, align = call
    batch, length = full.shape[0], full.shape[0 if cu_seqlens is not None else 1]
    if cu_seqlens is not None:
        offsets("response_states", cu_seqlens, length)
        batch = cu_seqlens.shape[0] - 1
    if mask is None and batch and T > length:  # before anything of the size of T is made
        raise ValueError(f"response_states: T is {T}, expected up to the {length} tokens of full")
    first, wanted = reference.window(prompt_length, mask, batch, T, align)
    position, inside = reference.positions(first, wanted.shape[1], cu_seqlens, length)
    wrong = (wanted & ~inside).nonzero()
    if len(wrong) == 0:
        return
    b, slot = wrong[0].tolist()
    prompt, at = int(prompt_length.expand(batch)[b]), int(position[b, slot])
    end = length if cu_seqlens is None else int(cu_seqlens[b + 1] - cu_seqlens[b])
    token = T - 1 if align == "bootstrap" and mask is None else slot
    if align == "bootstrap" and mask is not None:
        token = at - prompt
    raise ValueError(
        f"response_states: prompt_length is {prompt} and T is {T}: align={align!r} puts token "
        f"{token} of sequence {b} at position {at}, expected a position in [0, {end}); slots "
        "behind the end of a sequence are masked by `mask`")


def _fake_fwd(call: ResponseStatesCall) -> Tensor:
    full, _, _, cu_seqlens, T, align = call
    batch = full.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    inner = full.shape[2:] if cu_seqlens is None else full.shape[1:]
    return full.new_empty((batch, *inner) if align == "bootstrap" else (batch, T, *inner))


def _fake_bwd(call: ResponseStatesGradient) -> Tensor:
    grad, _, _, cu_seqlens, length, _, align = call
    inner = grad.shape[1:] if align == "bootstrap" else grad.shape[2:]
    return grad.new_empty((length, *inner) if cu_seqlens is not None
                          else (grad.shape[0], length, *inner))


_fwd = _op.define("response_states_fwd -> (Tensor states)", reference.fwd, _fake_fwd,
                  _check_values, record=ResponseStatesCall)
_bwd = _op.define("response_states_bwd -> (Tensor dfull)", reference.bwd, _fake_bwd,
                  record=ResponseStatesGradient)


class _ResponseStates(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        call = build(ResponseStatesCall, args)
        ctx.save_for_backward(*map(savable, (call.prompt_length, call.mask, call.cu_seqlens)))
        ctx.length = call.full.shape[0 if call.cu_seqlens is not None else 1]
        ctx.T, ctx.align = call.T, call.align
        return _fwd(call)

    # Not `first_only`, as the other operators have it: a gather is linear, so that its gradient
    # depends on no input, and torch's own refusal of a second derivative is enough.
    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        prompt_length, mask, cu_seqlens = ctx.saved_tensors
        call = ResponseStatesGradient(grad, prompt_length, mask, cu_seqlens, ctx.length, ctx.T,
                                      ctx.align)
        return _bwd(call), None, None, None, None, None


@suggests
def response_states(
        full: Tensor,  # [B, L, ...] or [N, ...]
        prompt_length: int | Tensor,  # [] or [B]
        T: int,
        align: str = "logprob",
        *,
        mask: Tensor | None = None,  # [B, T] bool or whole numbers
        cu_seqlens: Tensor | None = None,  # [B + 1] int32
        ) -> Tensor:
    """The states that belong to the response tokens t = 0..T-1 of each sequence.

        align "logprob", "value"   full[:, P - 1 : P + T - 1]    the state before token t
        align "reward"             full[:, P : P + T]            the state at token t
        align "bootstrap"          full[b, P + t_last]           the state at the last action token

    full: [B, L, ...] (hidden states, or one value a token), or packed [N, ...] with `cu_seqlens`
    [B + 1] int32 over prompt and response. prompt_length P: a number, or [B] (the width of the
    prompt where prompts are left-padded to one width). mask: [B, T], bool or whole numbers, the
    action mask of the response tokens, None for all. With responses of several lengths, T is the
    longest, and the mask is False behind the end of the shorter ones: those slots are never read,
    and are 0.

    Gives [B, T, ...], from packed input too; "bootstrap" [B, ...], with t_last the last True of the
    mask, T - 1 without one, and 0 for a sequence without an action token. The dtype is that of
    `full`, nothing is computed. Differentiable in `full`, deterministic.

    A valid slot outside its sequence is a ValueError on CPU (on a GPU where P is a number and no
    mask is given, or under TPPO_CHECK=1; otherwise it is NaN).
    """
    check = Check("response_states")
    packed = cu_seqlens is not None
    outer = 1 if packed else 2
    inner = range(outer, full.dim() if isinstance(full, Tensor) else outer)
    check.tensor("full", full, " ".join(["N" if packed else "B L", *(f"D{i}" for i in inner)]))
    if packed:
        check.packing(cu_seqlens)
    T = check.number("T", T, low=0, kind=int)
    check.choice("align", align, ALIGNMENTS)
    check.sizes["T"], check.owner["T"] = T, "T"
    mask = check.mask("mask", mask, "B T")
    if isinstance(prompt_length, Tensor):
        check.tensor("prompt_length", prompt_length, "B|", LABELS)
    else:
        least = 1 if align in ("logprob", "value") and T > 0 and mask is None else 0
        length: int = check.number("prompt_length", prompt_length, low=least, kind=int)
        end = length + T - int(align in ("logprob", "value"))  # no bool in a graph
        if mask is None and not packed and T > 0 and end > full.shape[1]:
            raise ValueError(
                f"response_states: prompt_length is {length} and T is {T}: align={align!r} "
                f"needs {end} states a sequence, full has L = {full.shape[1]}")
        prompt_length = torch.full((), length, dtype=torch.int64, device=full.device)
    return recorded(_ResponseStates, *flat(ResponseStatesCall(
        full, prompt_length, mask, cu_seqlens, T, align)))
