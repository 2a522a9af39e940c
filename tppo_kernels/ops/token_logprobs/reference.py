"""The specification of `token_logprobs` in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._math.linear import Scaling
from ..._math.sequence import compute_dtype, select


class TokenLogprobsCall(NamedTuple):
    """The arguments of the raw forward op."""

    logits: Tensor  # [..., V]
    targets: Tensor  # [...] int64 or int32
    mask: Tensor | None  # [...] bool
    scaling: Scaling
    valid_vocab: int | None  # columns from here on are dead


class TokenLogprobsGradient(NamedTuple):
    """The arguments of the raw backward op."""

    grad_logprobs: Tensor | None  # [...]
    grad_entropy: Tensor | None  # [...]
    call: TokenLogprobsCall
    entropy: Tensor  # [...]
    top: Tensor  # [...]
    log_sum: Tensor  # [...]


class EntropyCall(NamedTuple):
    """The arguments of `entropy`: the same without targets."""

    logits: Tensor  # [..., V]
    mask: Tensor | None  # [...] bool
    scaling: Scaling
    valid_vocab: int | None  # columns from here on are dead

    @property
    def targets(self) -> None:
        """None: every backend then leaves the log-probs out."""


class EntropyGradient(NamedTuple):
    """The arguments of the backward of `entropy`."""

    grad_entropy: Tensor  # [...]
    call: EntropyCall
    entropy: Tensor  # [...]
    top: Tensor  # [...]
    log_sum: Tensor  # [...]

    @property
    def grad_logprobs(self) -> None:
        """None, as where the log-probs of `token_logprobs` are not used."""


Call = TokenLogprobsCall | EntropyCall
Gradient = TokenLogprobsGradient | EntropyGradient


def scaled(x: Tensor, scaling: Scaling) -> Tensor:
    """z = softcap(logit_scale x) / temperature; temperature 0-d, or [N, 1]."""  # [N, v]
    z = x * scaling.logit_scale
    if scaling.softcap is not None:
        z = scaling.softcap * torch.tanh(z / scaling.softcap)
    return z / scaling.temperature


def tanh_slope(y: Tensor) -> Tensor:
    """1 - tanh(y)^2 in a form that does not cancel where tanh(y) is nearly 1."""
    e = torch.exp(-2 * y.abs())
    return 4 * e / (1 + e).square()


class Rows(NamedTuple):
    """A call whose masked rows, targets and temperatures are selected away."""

    x: Tensor  # [N, v], the live columns in the dtype of the computation
    target: Tensor  # [N], 0 in the place of a bad one, so that no row is read out of bounds
    good: Tensor  # [N] bool: the target is a live column, or there is none
    valid: Tensor | None  # [N] bool
    scaling: Scaling  # its temperature is 0-d, or [N, 1]

    def select(self, x: Tensor) -> Tensor:
        """x [N, ...] in valid rows, 0 in others."""
        valid = self.valid
        return select(x, valid if valid is None or x.dim() == 1 else valid[:, None], self.x.dtype)


def rows_of(call: Call) -> Rows:
    """The rows of a call; without targets those of column 0."""
    logits, valid_vocab, temperature = call.logits, call.valid_vocab, call.scaling.temperature
    v = logits.shape[-1] if valid_vocab is None else valid_vocab
    valid = None if call.mask is None else call.mask.reshape(-1)
    x = logits.reshape(-1, logits.shape[-1])[:, :v]
    x = select(x, None if valid is None else valid[:, None], compute_dtype(logits))
    target = x.new_zeros(x.shape[0], dtype=torch.int64)
    if call.targets is not None:
        target = select(call.targets.reshape(-1).long(), valid)
    good = (target >= 0) & (target < v)
    if temperature.dim():
        temperature = temperature.to(x.dtype).reshape(-1)
        if valid is not None:
            temperature = torch.where(valid, temperature, torch.ones_like(temperature))
        temperature = temperature[:, None]
    return Rows(x, torch.where(good, target, torch.zeros_like(target)), good, valid,
                call.scaling._replace(temperature=temperature))


def fwd(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprobs, entropy, top, log_sum); logsumexp = top + log_sum, apart because of rounding.

    All of logits.shape[:-1]. The z of the target and of the largest column are taken in fp64: at
    |z| = 1e4 the rounding of each would cost 5e-4. A bad target makes its whole row NaN.
    """
    rows = rows_of(call)
    z = scaled(rows.x, rows.scaling)  # [N, v]
    best = z.argmax(-1, keepdim=True)  # [N, 1]
    top = torch.where(rows.good, z.gather(1, best)[:, 0],
                      torch.full((), float("nan"), dtype=z.dtype, device=z.device))  # [N]
    d = z - top[:, None]
    e = torch.exp(d).scatter_(1, best, 0.0)  # without the largest term, which is 1
    rest = e.sum(-1)  # [N]
    log_sum = torch.log1p(rest) + (top - top)  # NaN where the largest z is not finite
    entropy = log_sum - (e * select(d, e != 0)).sum(-1) / (1 + rest)
    both = rows.x.gather(1, torch.cat((rows.target[:, None], best), 1)).double()  # [N, 2]
    both = scaled(both, rows.scaling)
    logprobs = torch.where(rows.good, both[:, 0] - both[:, 1] - log_sum, top).to(z.dtype)
    shape = call.logits.shape[:-1]
    return (rows.select(logprobs).reshape(shape), rows.select(entropy).reshape(shape),
            top.reshape(shape), log_sum.reshape(shape))


def bwd(backward: Gradient) -> Tensor:
    """The gradient of the logits, in their dtype, contiguous; 0 in masked rows and dead columns."""
    g_logprobs, g_entropy, call = backward.grad_logprobs, backward.grad_entropy, backward.call
    entropy, top, log_sum = backward[-3:]
    rows, logits = rows_of(call), call.logits
    z = scaled(rows.x, rows.scaling)  # [N, v]
    log_p = z - top.reshape(-1, 1) - log_sum.reshape(-1, 1)
    p = torch.exp(log_p)
    dz = torch.zeros_like(z)
    if g_logprobs is not None:
        g = rows.select(g_logprobs.reshape(-1, 1))
        target = rows.target[:, None]
        at_target = -g * torch.expm1(log_p.gather(1, target))  # 1 - p is a difference
        dz = (-g * p).scatter(1, target, at_target)
    if g_entropy is not None:
        g = rows.select(g_entropy.reshape(-1, 1))
        dz = dz - g * p * (select(log_p, p != 0) + entropy.reshape(-1, 1))
    temperature, softcap, logit_scale = rows.scaling
    if softcap is not None:
        dz = dz * tanh_slope(rows.x * logit_scale / softcap)
    dx = rows.select(dz * logit_scale / temperature)
    out = logits.new_zeros((dx.shape[0], logits.shape[-1]))
    out[:, :dx.shape[1]] = dx
    return out.reshape(logits.shape)
