"""Gradients of `linear_logprobs` and `token_logprobs` in random small calls, against fp64.

The formula below is the textbook's, differentiated by torch, and shares nothing with the operators.

Every gradient is within `LIMIT` of its norm, or its terms nearly cancel: then it is within `SHARE`
of the norm that they would have if all were positive, and `OF_Z` more for each unit of the row's
largest |z|, which is rounded to fp32. Under a softcap it is twice `OF_Z` more for each unit of the
magnitudes that tanh's argument u is added up of: behind the bend the slope is 4 exp(-2|u|), which
an error of u multiplies. A row nearly uniform under the entropy alone, or two rows of opposite
slopes, leave little of terms that are rounded before they are added.
"""

import random
from collections.abc import Iterable
from typing import NamedTuple

import torch
from guided import Target, Wrong

import tppo_kernels as tk
from tppo_kernels._core.op import missing

LIMIT = {torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 3e-3}
OF_Z = 2.0 ** -23
SHARE = {torch.float32: 2.0 ** -22, torch.bfloat16: 2.0 ** -11, torch.float16: 2.0 ** -11}
SHAPES = ((), (1,), (2,), (5, 1), (7,), (2, 2, 3), (3, 5), (12,), (1, 1), (31,))
VOCABULARIES = (1, 2, 2, 2, 3, 5, 7, 33, 63, 64, 65, 65, 100, 130, 257, 600, 2100)


class Call(NamedTuple):
    """One call: its tensors, options, and the slopes of its two results."""

    hidden: torch.Tensor  # [..., D]
    weight: torch.Tensor  # [V, D]
    bias: torch.Tensor | None  # [V]
    targets: torch.Tensor  # [...]
    mask: torch.Tensor | None  # [...]
    options: dict  # of the row formula
    memory: str | int | None  # None: `token_logprobs` of the logits
    slopes: torch.Tensor  # [2, ...]
    frozen: bool


def draw(seed: int) -> Call:
    """The call of a seed."""
    choose, g = random.Random(seed), torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    lead, d = choose.choice(SHAPES), choose.choice((1, 2, 3, 8, 8, 16, 24, 33))
    v = choose.choice(VOCABULARIES)
    dtype = choose.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16))
    spread = choose.choice((1.0, 1.0, d ** -0.5, 3 * d ** -0.5))
    hidden, weight = randn(*lead, d).to(dtype), (spread * randn(v, d)).to(dtype)
    bias = (0.3 * randn(v)).to(dtype) if choose.random() < 0.4 else None
    mask = torch.rand(lead, generator=g) < 0.7 if choose.random() < 0.4 else None
    valid = v - 1 if v > 2 and choose.random() < 0.15 else None
    temperature = choose.choice((1.0, 1.0, 0.7, 1.7, None))
    options = {"softcap": choose.choice((None, None, 1.5, 5.0, 5.0, 30.0)),
               "logit_scale": choose.choice((1.0, 1.0, 2.0, 0.5, -1.0)), "valid_vocab": valid,
               "temperature": temperature or 0.5 + torch.rand(lead, generator=g)}
    slopes = randn(2, *lead)
    slopes[choose.choice((0, 1))] *= choose.choice((1.0, 1.0, 0.0))
    memory = choose.choice((None, "auto", "auto", "store", "recompute", 4096))
    return Call(hidden, weight, bias, torch.randint(valid or v, lead, generator=g), mask, options,
                memory, slopes, choose.random() < 0.15)


def leaves(call: Call) -> list[torch.Tensor | None]:
    """Fresh hidden, weight, bias: those that are not frozen want a gradient."""
    given = [None if x is None else x.clone() for x in call[:3]]
    for x in given[:1] if call.frozen else given:
        if x is not None:
            x.requires_grad_()
    return given


def gradients(results, slopes, given) -> list[torch.Tensor]:
    loss = sum((x * g.to(x.dtype)).sum() for x, g in zip(results, slopes, strict=True))
    return list(torch.autograd.grad(loss, [x for x in given if x is not None and x.requires_grad]))


def actual(call: Call) -> list[torch.Tensor]:
    """The operator's gradients; through its logits in fp64 where it takes logits."""
    given = leaves(call)
    hidden, weight, bias = given
    if call.memory is not None:
        results = tk.linear_logprobs(hidden, weight, call.targets, call.mask, bias=bias,
                                     memory=call.memory, **call.options)
        return gradients(results, call.slopes, given)
    logits = logits_of(call)
    leaf = logits.to(call.hidden.dtype).requires_grad_()
    return gradients(tk.token_logprobs(leaf, call.targets, call.mask, **call.options), call.slopes,
                     [leaf])


def logits_of(call: Call) -> torch.Tensor:
    x = call.hidden.double() @ call.weight.double().T
    return x if call.bias is None else x + call.bias.double()


def tanh(u: torch.Tensor) -> torch.Tensor:
    """tanh(u), whose slope far from 0 is no difference of 1 and its square: that has few digits."""
    e = torch.exp(-2 * u.abs())
    return torch.where(u.abs() < 1, torch.tanh(u), u.sign() * (1 - e) / (1 + e))


def exact(call: Call) -> tuple[list[torch.Tensor], list[float]]:
    """The gradients in fp64, and of each what rounding its terms may cost."""
    o, (hidden, weight, bias) = call.options, leaves(call)
    given = [None if x is None else x.detach().double().requires_grad_(x.requires_grad)
             for x in (hidden, weight, bias)]
    if call.memory is None:
        given = [logits_of(call).to(call.hidden.dtype).double().requires_grad_()]
        x = given[0]
    else:
        x = given[0] @ given[1].T
        x = x if given[2] is None else x + given[2]
    y = x * o["logit_scale"]
    capped = y if o["softcap"] is None else o["softcap"] * tanh(y / o["softcap"])
    t = o["temperature"]
    t = t.double()[..., None] if isinstance(t, torch.Tensor) else t
    v = o["valid_vocab"]
    log_p = torch.log_softmax((capped / t)[..., :v], -1)
    p, valid = log_p.exp(), True if call.mask is None else call.mask
    logprobs = log_p.gather(-1, call.targets[..., None])[..., 0]
    entropy = -(p * log_p).sum(-1)
    slopes = torch.where(torch.as_tensor(valid), call.slopes.double(), 0)
    results = gradients((logprobs, entropy), slopes, given)

    with torch.no_grad():
        a, b = slopes.abs()[..., None]
        terms = a * p + b * p * (log_p.abs() + entropy[..., None] + 1)
        terms = terms.scatter_add(-1, call.targets[..., None], a)
        terms = torch.nn.functional.pad(terms, (0, x.shape[-1] - terms.shape[-1]))
        terms = terms * abs(o["logit_scale"]) / t
        z = (capped / t)[..., :v].abs().amax(-1, keepdim=True)
        rounded = SHARE[call.hidden.dtype] + OF_Z * z
        if o["softcap"] is not None:
            u = (hidden.double().abs() @ weight.double().abs().T if call.memory is not None
                 else x.abs())  # the magnitude of what is added to u's numerator
            u = u if bias is None or call.memory is None else u + bias.double().abs()
            rounded = rounded + 2 * OF_Z * u * abs(o["logit_scale"]) / o["softcap"]
            terms = terms / torch.cosh(y / o["softcap"]).square()
        terms = terms * rounded
        if call.memory is None:
            return results, [float(terms.norm())]
        flat, h = terms.reshape(-1, terms.shape[-1]), hidden.double().reshape(-1, hidden.shape[-1])
        norms = [flat @ weight.double().abs(), flat.T @ h.abs(), flat.sum(0)]
    return results, [float(n.norm()) for n in norms[:len(results)]]


class Outcome(NamedTuple):
    """The worst gradient of a call: its error by the limit, and by what rounding may cost."""

    of_limit: float
    of_terms: float


def outcome(call: Call) -> Outcome:
    """The worst of a call's gradients; both numbers at most 1 is within, either is enough."""
    dtype, worst = call.hidden.dtype, Outcome(0.0, 0.0)
    for got, (wanted, terms) in zip(actual(call), zip(*exact(call), strict=True), strict=True):
        error, norm = float((got.double() - wanted).norm()), float(wanted.norm())
        if error == 0.0:
            continue
        if not error < float("inf"):
            return Outcome(float("inf"), float("inf"))
        rounded = float((wanted.to(dtype).double() - wanted).norm())
        allowed = max(LIMIT[dtype] * norm, 1.01 * rounded)  # of one number: half its last bit
        of_limit = error / allowed if allowed else float("inf")
        of_terms = max(0.0, error - 1.01 * rounded) / terms if terms else of_limit
        if min(of_limit, of_terms) >= min(worst):
            worst = Outcome(of_limit, of_terms)
    return worst


def describe(seed: int) -> str:
    call = draw(seed)
    options = {k: x for k, x in call.options.items() if not isinstance(x, torch.Tensor)}
    return (f"seed {seed}: {str(call.hidden.dtype)[6:]} {list(call.hidden.shape)}, "
            f"V {call.weight.shape[0]}, memory {call.memory}, {options}, frozen {call.frozen}")


BACKENDS = ("reference",) + ("cpp",) * (missing("cpp") is None)


def beyond(seed: int) -> tuple[str, bool]:
    """What is wrong with the call of a seed, "" if nothing is; whether it was within the second
    bound only."""
    found = outcome(draw(seed))
    if found.of_limit <= 1:
        return "", False
    told = (f"{found.of_limit:.3g} of the limit, {found.of_terms:.3g} of the terms: "
            f"{describe(seed)}")
    return ("" if found.of_terms <= 1 else told), True


def run(seeds: Iterable[int]) -> tuple[list[int], int]:
    """(seeds of calls that are beyond both bounds, how many were within the second one only)."""
    found = {seed: beyond(seed) for seed in seeds}
    wrong = [seed for seed, (told, _) in found.items() if told]
    return wrong, sum(second for _, second in found.values())


def call(data: bytes) -> None:
    seed = int.from_bytes(data[:8], "little")
    with tk.use_backend(BACKENDS[seed % len(BACKENDS)]):
        told, _ = beyond(seed // len(BACKENDS))
    if told:
        raise Wrong(told)


TARGETS = [Target("gradients of log-probs", call, 150_000)]
