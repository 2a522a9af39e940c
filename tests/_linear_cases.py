"""What tests of the linear operators share: inputs, logits in fp64, a GPU's products on a CPU."""

import contextlib

import torch

import tppo_kernels as tk
from tppo_kernels import _linear

LIMIT = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 3e-3}
SHAPED = {"temperature": 0.7, "softcap": 4.0, "logit_scale": 0.5}
ROWS = ("inside", "rows", "capacity", "more capacity")


def choose(kind, mask):
    n = int(mask.sum())
    return {"inside": {}, "rows": {"rows": tk.valid_rows(mask)}, "capacity": {"capacity": n},
            "more capacity": {"capacity": n + 5}}[kind]


def sample(batch, tokens, d=24, v=190, dtype=torch.float32, seed=0, spread=1.0):
    """hidden [B, T, D], weight [V, D], targets [B, T], bias [V]."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, tokens, d, generator=g).to(dtype)
    weight = (spread * torch.randn(v, d, generator=g) / d ** 0.5).to(dtype)
    targets = torch.randint(v, (batch, tokens), generator=g)
    return hidden, weight, targets, (0.3 * torch.randn(v, generator=g)).to(dtype)


def textbook(hidden, weight, targets, mask=None, *, bias=None, temperature=1.0, softcap=None,
             logit_scale=1.0, valid_vocab=None):
    """Logits, all of them, in the dtype of the inputs."""
    z = hidden @ weight.T
    z = logit_scale * (z if bias is None else z + bias)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    if isinstance(temperature, torch.Tensor) and temperature.dim():
        temperature = temperature[..., None]
    z = (z / temperature)[..., :valid_vocab]
    if mask is not None:
        targets = torch.where(mask, targets, 0)
    log_p = torch.log_softmax(z, -1)
    logprobs = log_p.gather(-1, targets[..., None])[..., 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    if mask is None:
        return logprobs, entropy
    return torch.where(mask, logprobs, 0), torch.where(mask, entropy, 0)


def grads(function, hidden, weight, targets, mask=None, *, bias=None, part="both", frozen=False,
          seed=0, **options):
    """(logprobs, entropy, gradients of hidden, weight, bias), of a random projection."""
    leaves = [hidden.detach().clone(), weight.detach().clone()]
    leaves += [] if bias is None else [bias.detach().clone()]
    for leaf in leaves[:1] if frozen else leaves:
        leaf.requires_grad_()
    more = {} if bias is None else {"bias": leaves[2]}
    out = function(leaves[0], leaves[1], targets, mask, **more, **options)
    g = torch.randn(2, *targets.shape, generator=torch.Generator().manual_seed(seed)).to(out[0])
    loss = sum((x * w).sum() for x, w, name in zip(out, g, ("logprobs", "entropy"), strict=True)
               if part in (name, "both"))
    loss.backward()
    return (*(x.detach() for x in out), *(leaf.grad for leaf in leaves))


def distance(actual, exact):
    scale = float(exact.double().norm())
    return float((actual.double() - exact.double()).norm()) / (scale or 1.0)


def assert_close(actual, exact, dtype, top=10.0):
    for a, e in zip(actual[:2], exact[:2], strict=True):
        allowed = 1e-10 if dtype == torch.float64 else 1e-4 + 2.4e-7 * top
        assert float((a.double() - e).abs().max() if e.numel() else 0.0) <= allowed
    for a, e in zip(actual[2:], exact[2:], strict=True):
        assert (a is None) == (e is None)
        if e is not None:  # one number alone rounds by up to 2^-8
            assert distance(a, e) <= max(LIMIT[dtype], 1.01 * distance(e.to(dtype), e))


def double(*tensors):
    return [x.double() if x.is_floating_point() else x for x in tensors]


@contextlib.contextmanager
def halves():
    """The products of a GPU: 16-bit factors as they are, accumulators and asked results in fp32."""
    library = torch.library.Library("aten", "IMPL")

    def mm(a, b, out_dtype):
        return a.to(out_dtype) @ b.to(out_dtype)

    library.impl("mm.dtype", mm, "CPU")
    library.impl("mm.dtype_out", lambda a, b, out_dtype, *, out: out.copy_(mm(a, b, out_dtype)),
                 "CPU")
    library.impl("addmm.dtype_out", lambda c, a, b, out_dtype, *, beta=1, alpha=1, out:
                 out.copy_(c + mm(a, b, out_dtype)), "CPU")
    on_a_gpu = _linear.takes_halves
    _linear.takes_halves = lambda hidden, weight: (hidden.dtype == weight.dtype
                                                   and hidden.dtype.itemsize == 2)
    try:
        yield
    finally:
        _linear.takes_halves = on_a_gpu
        library._destroy()
