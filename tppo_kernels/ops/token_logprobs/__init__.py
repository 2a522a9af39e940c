"""Log-probability of each target token and entropy of its distribution, from logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..._core.check import FP32_MAX, LABELS, Check
from ..._core.derivatives import first_only, savable, wanted
from ..._core.eager import recorded
from ..._core.keywords import suggests
from ..._core.op import Op
from ..._kernels.values import values_between
from ..._math.linear import Scaling
from ..._math.sequence import compute_dtype
from . import reference
from .reference import TokenLogprobsCall, TokenLogprobsGradient

IN_PLACE_BYTES = 64 << 20  # of gradient that a backward in place holds beside the logits
_op = Op("token_logprobs", cpu=("cpp", "reference"), cuda=("triton", "reference"))


def sample_inputs() -> tuple[tuple, dict]:
    """Arguments of a small call, in fp64: for the self-test."""
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(3, 17, 100, generator=g, dtype=torch.float64)
    targets = torch.randint(0, 90, (3, 17), generator=g)
    return (logits, targets, torch.rand(3, 17, generator=g) < 0.7), {
        "temperature": 0.7, "softcap": 10.0, "valid_vocab": 90}


class TokenLogprobs(NamedTuple):
    """The two results of `token_logprobs`, fp32 (fp64 for fp64 logits)."""

    logprobs: Tensor  # [...]
    entropy: Tensor  # [...]


def nbytes(logits: Tensor, *, backward: bool = False) -> int:
    """Bytes that the operator must move when every row is valid.

    Forward: the logits once, int64 targets, two fp32 results and two fp32 numbers kept for
    backward. Backward: the logits once more, their gradient, and the same numbers per row.
    """
    rows = logits.numel() // logits.shape[-1]
    size = logits.numel() * logits.element_size()
    forward = size + rows * (8 + 4 * 4)
    return forward + 2 * size + rows * (8 + 5 * 4) if backward else forward


def _check_fwd(call: TokenLogprobsCall) -> None:
    logits, targets, mask, (temperature, softcap, logit_scale), valid_vocab = call
    op, columns = "token_logprobs", logits.shape[-1] if valid_vocab is None else valid_vocab
    values_between(op, "targets", targets, 0, columns - 1, mask)
    values_between(op, "temperature", temperature, 0.0, FP32_MAX, mask, open_low=True)
    values_between(op, "softcap", softcap, 0.0, FP32_MAX, mask, open_low=True)
    values_between(op, "logit_scale", logit_scale, -FP32_MAX, FP32_MAX, mask)


def _fake_fwd(call: TokenLogprobsCall) -> tuple[Tensor, ...]:
    logits, dtype = call.logits, compute_dtype(call.logits)
    return tuple(logits.new_empty(logits.shape[:-1], dtype=dtype) for _ in range(4))


def _fake_bwd(backward: TokenLogprobsGradient) -> Tensor:
    return backward.call.logits.new_empty(backward.call.logits.shape)


_fwd = _op.define("token_logprobs_fwd -> (Tensor logprobs, Tensor entropy, Tensor, Tensor)",
                  reference.fwd, _fake_fwd, _check_fwd, record=TokenLogprobsCall)
_bwd = _op.define("token_logprobs_bwd -> (Tensor dlogits)", reference.bwd, _fake_bwd,
                  record=TokenLogprobsGradient)


class _Function(torch.autograd.Function):
    """The logits are an argument beside the record, because autograd sees no tensor inside one."""

    @staticmethod
    def forward(ctx, logits, call):
        logprobs, entropy, top, log_sum = _fwd(TokenLogprobsCall(logits, *call[1:]))
        ctx.valid_vocab = call.valid_vocab
        ctx.save_for_backward(logits, *map(savable, (call.targets, call.mask, *call.scaling)),
                              entropy, top, log_sum)
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @first_only(1)
    def backward(ctx, grad_logprobs, grad_entropy):
        if grad_logprobs is None and grad_entropy is None:
            return None, None
        return _bwd(_saved(ctx, grad_logprobs, grad_entropy)), None


def _saved(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
           ) -> TokenLogprobsGradient:
    logits, targets, mask, *scaling, entropy, top, log_sum = ctx.saved_tensors
    call = TokenLogprobsCall(logits, targets, mask, Scaling._make(scaling), ctx.valid_vocab)
    return TokenLogprobsGradient(grad_logprobs, grad_entropy, call, entropy, top, log_sum)


class _InPlaceFunction(_Function):
    """Backward writes the gradient over the logits.

    `copy_` raises their version, so that autograd refuses whatever would still need the logits: a
    second backward, or another operator that has saved them.
    """

    @staticmethod
    @first_only(1)
    def backward(ctx, grad_logprobs, grad_entropy):
        if grad_logprobs is None and grad_entropy is None:
            return None, None
        whole = _saved(ctx, grad_logprobs, grad_entropy)
        logits = whole.call.logits
        rows = logits.detach().view(-1, logits.shape[-1])  # [N, V], the logits' own memory
        size = max(1, IN_PLACE_BYTES // (rows.shape[-1] * rows.element_size()))
        for first in range(0, rows.shape[0], size):
            part = slice(first, first + size)
            rows[part].copy_(_bwd(_part(whole, rows, part)))
        return rows.view(logits.shape), None


def _part(whole: TokenLogprobsGradient, rows: Tensor, part: slice) -> TokenLogprobsGradient:
    """The same call with some of the rows [N, V] only."""
    def of(x: Tensor | None) -> Any:
        return None if x is None else x.reshape(-1)[part]

    _, targets, mask, scaling, valid_vocab = whole.call
    if scaling.temperature.dim():
        scaling = scaling._replace(temperature=of(scaling.temperature))
    call = TokenLogprobsCall(rows[part], of(targets), of(mask), scaling, valid_vocab)
    return TokenLogprobsGradient(of(whole.grad_logprobs), of(whole.grad_entropy), call,
                                 *map(of, whole[3:]))


def _check_in_place(logits: Tensor) -> None:
    """Raises ValueError where the gradient cannot take the place of the logits."""
    if is_compiling():
        raise ValueError("token_logprobs: inplace_backward is True under torch.compile, expected "
                         "False: a compiled backward plans its own memory")
    if logits.is_leaf:
        raise ValueError("token_logprobs: inplace_backward is True and logits is a leaf, expected "
                         "the result of an operation: a leaf keeps its values")
    if not logits.is_contiguous():
        raise ValueError(f"token_logprobs: inplace_backward is True and logits has strides "
                         f"{list(logits.stride())}, expected contiguous logits: their memory "
                         "becomes the gradient's; give logits.contiguous()")


def check_columns(check: Check, logits: Any, valid_vocab: Any) -> int | None:
    """Checks logits [..., V] with at least one column, of which `valid_vocab` are live."""
    check.tensor("logits", logits, "... V")
    columns = logits.shape[-1]
    if columns == 0:
        raise ValueError(f"{check.op}: logits has shape {list(logits.shape)}, expected at least "
                         "one column")
    if valid_vocab is None:
        return None
    live: int = check.number("valid_vocab", valid_vocab, low=1, high=columns, kind=int)
    return live


def check_scaling(check: Check, tokens: str, temperature: Any, softcap: Any, logit_scale: Any,
                  differentiable: str = "only logits are differentiable here") -> Scaling:
    """The checked arguments that shape z; temperature: a number, 0-d, or a value a token."""
    for name, value in (("softcap", softcap), ("logit_scale", logit_scale)):
        if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{check.op}: {name} requires a gradient, expected a constant: "
                             f"{differentiable}")
    if isinstance(temperature, Tensor) and temperature.dim():
        check.tensor("temperature", temperature, tokens)
        temperature = temperature.detach()
    else:
        temperature = check.scalar("temperature", temperature, above=0.0)
    return Scaling(temperature, check.scalar("softcap", softcap, above=0.0, optional=True),
                   check.scalar("logit_scale", logit_scale))


@suggests
def token_logprobs(
        logits: Tensor,  # [..., V]
        targets: Tensor,  # [...] int64 or int32
        mask: Tensor | None = None,  # [...] bool or whole numbers
        *,
        temperature: float | Tensor = 1.0,  # [], or [...]: one a row
        softcap: float | Tensor | None = None,  # []
        logit_scale: float | Tensor = 1.0,  # []
        valid_vocab: int | None = None,
        inplace_backward: bool = False,
) -> TokenLogprobs:
    """Log-probability of every target and entropy of every row, from one read of the logits.

        z       = softcap tanh(logit_scale logits / softcap) / temperature
                  (logit_scale logits / temperature without a softcap)
        logprob = z[target] - logsumexp(z)
        entropy = logsumexp(z) - sum(p z),  p = softmax(z),  0 * -inf = 0
        dz      = g_lp (1[target] - p) - g_ent p (log p + entropy)

    logits: [..., V] with any leading shape, also none; fp32, bf16 and fp16 are read as they are,
    computed in fp32; fp64 by the reference. Strided logits are read in place as long as the last
    stride is 1. On a GPU a row costs backward several times the instructions, though the same
    bytes, where it begins at another address modulo 16 bytes than the gradient's row does: slices
    as logits[:, :-1] where V is no multiple of 8 (of 4 in fp32); forward reads any row alike.
    targets: [...] int64 or int32. mask: [...] bool or whole numbers; masked rows are not read, and
    give 0. temperature: a number, 0-d, or exactly [...] (nothing broadcasts), > 0, a constant.
    Columns >= valid_vocab count as -inf: not read, gradient exactly 0.
    inplace_backward: the gradient takes the place of the logits, 64 MiB of rows at a time, so that
    no second [..., V] tensor is made; the same bits, at up to twice the memory traffic. The
    logits are lost then: they must be contiguous and no leaf, and a second backward, or that of
    another operator that needs them, is autograd's RuntimeError. Not under `torch.compile`.

    Both results are differentiable in logits, once; the gradient has the logits' dtype. A target
    whose logit is -inf gives logprob -inf and the gradient of the formula, with p = 0 there. A row
    of -inf only, or with a NaN or +inf, gives NaN, as torch's log_softmax does. Under
    `torch.compile` a Python float is a constant; give 0-d tensors for scalars that change.

    Raises ValueError / TypeError that name the argument; a target outside [0, V), or
    [0, valid_vocab), at a valid slot too: on a GPU only under TPPO_CHECK=1, otherwise its row is
    NaN. Source: TRL's selective_log_softmax and entropy_from_logits, as one operator.
    """
    check = Check("token_logprobs")
    valid_vocab = check_columns(check, logits, valid_vocab)
    check.tensor("targets", targets, "...", LABELS)
    mask = check.mask("mask", mask, "...")
    scaling = check_scaling(check, "...", temperature, softcap, logit_scale)
    call = TokenLogprobsCall(logits, targets, mask, scaling, valid_vocab)
    if not wanted(logits):
        return TokenLogprobs(*_fwd(call)[:2])
    if inplace_backward:
        _check_in_place(logits)
        return TokenLogprobs(*recorded(_InPlaceFunction, logits, call))
    return TokenLogprobs(*recorded(_Function, logits, call))
