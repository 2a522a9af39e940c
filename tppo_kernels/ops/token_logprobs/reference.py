"""The specification of `token_logprobs` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._math.sequence import compute_dtype, select


def scaled(x: Tensor, temperature: Tensor, softcap: Tensor | None, logit_scale: Tensor) -> Tensor:
    """z = softcap(logit_scale x) / temperature; temperature 0-d, or one a row of x."""  # [N, v]
    z = x * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def tanh_slope(y: Tensor) -> Tensor:
    """1 - tanh(y)^2, which is a difference of equal numbers where tanh(y) is nearly 1."""
    e = torch.exp(-2 * y.abs())
    return 4 * e / (1 + e).square()


def rows(logits: Tensor, targets: Tensor, mask: Tensor | None, temperature: Tensor,
         valid_vocab: int | None) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """(x [N, v], targets [N], mask [N], temperature 0-d or [N, 1], good targets [N]).

    x: the live columns v in the dtype of the computation; masked rows, their targets and their
    temperatures are selected away. A bad target is replaced: no row is read out of bounds.
    """
    v = logits.shape[-1] if valid_vocab is None else valid_vocab
    valid = None if mask is None else mask.reshape(-1)
    x = logits.reshape(-1, logits.shape[-1])[:, :v]
    x = select(x, None if valid is None else valid[:, None], compute_dtype(logits))
    target = select(targets.reshape(-1).long(), valid)
    good = (target >= 0) & (target < v)
    if temperature.dim():
        temperature = temperature.to(x.dtype).reshape(-1)
        if valid is not None:
            temperature = torch.where(valid, temperature, torch.ones_like(temperature))
        temperature = temperature[:, None]
    return x, torch.where(good, target, torch.zeros_like(target)), valid, temperature, good


def fwd(logits: Tensor, targets: Tensor, mask: Tensor | None, temperature: Tensor,
        softcap: Tensor | None, logit_scale: Tensor,
        valid_vocab: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprobs, entropy, top, log_sum); logsumexp = top + log_sum, apart because of rounding.

    All of logits.shape[:-1]. The z of the target and of the largest column are taken in fp64: at
    |z| = 1e4 the rounding of each would cost 5e-4. A bad target makes its whole row NaN.
    """
    x, target, valid, temperature, good = rows(logits, targets, mask, temperature, valid_vocab)
    z = scaled(x, temperature, softcap, logit_scale)  # [N, v]
    best = z.argmax(-1, keepdim=True)  # [N, 1]
    top = torch.where(good, z.gather(1, best)[:, 0],
                      torch.full((), float("nan"), dtype=z.dtype, device=z.device))  # [N]
    d = z - top[:, None]
    e = torch.exp(d).scatter_(1, best, 0.0)  # without the largest term, which is 1
    rest = e.sum(-1)  # [N]
    log_sum = torch.log1p(rest) + (top - top)  # NaN where the largest z is not finite
    entropy = log_sum - (e * select(d, e != 0)).sum(-1) / (1 + rest)
    both = x.gather(1, torch.cat((target[:, None], best), 1)).double()  # [N, 2]
    both = scaled(both, temperature, softcap, logit_scale)
    logprobs = torch.where(good, both[:, 0] - both[:, 1] - log_sum, top).to(z.dtype)
    shape = logits.shape[:-1]
    return (select(logprobs, valid).reshape(shape), select(entropy, valid).reshape(shape),
            top.reshape(shape), log_sum.reshape(shape))


def bwd(grad_logprobs: Tensor | None, grad_entropy: Tensor | None, logits: Tensor, targets: Tensor,
        mask: Tensor | None, temperature: Tensor, softcap: Tensor | None, logit_scale: Tensor,
        valid_vocab: int | None, entropy: Tensor, top: Tensor, log_sum: Tensor) -> Tensor:
    """The gradient by logits, in their dtype, contiguous; 0 in masked rows and dead columns."""
    x, target, valid, temperature, _ = rows(logits, targets, mask, temperature, valid_vocab)
    z = scaled(x, temperature, softcap, logit_scale)  # [N, v]
    log_p = z - top.reshape(-1, 1) - log_sum.reshape(-1, 1)
    p = torch.exp(log_p)
    dz = torch.zeros_like(z)
    if grad_logprobs is not None:
        g = select(grad_logprobs.reshape(-1, 1).to(z.dtype),
                   None if valid is None else valid[:, None])
        at_target = -g * torch.expm1(log_p.gather(1, target[:, None]))  # 1 - p is a difference
        dz = (-g * p).scatter(1, target[:, None], at_target)
    if grad_entropy is not None:
        g = select(grad_entropy.reshape(-1, 1).to(z.dtype),
                   None if valid is None else valid[:, None])
        dz = dz - g * p * (select(log_p, p != 0) + entropy.reshape(-1, 1))
    if softcap is not None:
        dz = dz * tanh_slope(x * logit_scale / softcap)
    dx = select(dz * logit_scale / temperature, None if valid is None else valid[:, None])
    out = logits.new_zeros((dx.shape[0], logits.shape[-1]))
    out[:, :dx.shape[1]] = dx
    return out.reshape(logits.shape)
