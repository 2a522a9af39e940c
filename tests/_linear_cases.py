"""What tests of the linear operators share: inputs, logits in fp64, a GPU's products on a CPU."""

import contextlib
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tppo_kernels as tk
from tppo_kernels._kernels import chunks as _linear
from tppo_kernels._math.linear import LinearInputs, Scaling

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


def inputs_of(hidden, weight, targets, mask=None, bias=None, *, rows=None, temperature=None,
              softcap=None, logit_scale=None, valid_vocab=None, capacity=None, budget=1 << 30):
    """The record that the raw linear ops share."""
    one = torch.tensor(1.0)
    scaling = Scaling(one if temperature is None else temperature, softcap,
                      one if logit_scale is None else logit_scale)
    return LinearInputs(hidden, weight, targets, mask, bias, rows, scaling, valid_vocab, capacity,
                        budget, None)


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


class Largest(TorchDispatchMode):
    """The most elements that the memory of any tensor made inside has room for."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


class Planned(TorchDispatchMode):
    """The products and the most bytes at once of what runs inside, on tensors without memory."""

    def __init__(self):
        super().__init__()
        self.nbytes = self.peak = 0
        self.flops, self.factors = 0, set()
        self._alive = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            a, b = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
            self.factors |= {a.dtype, b.dtype}
        if function is torch.ops.aten.addmm.dtype_out:  # has no form for these tensors
            return kwargs["out"]
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self._alive:
                self._count(x.untyped_storage())
        return out

    def _count(self, storage):
        key = storage._cdata
        self._alive[key] = storage.nbytes()
        self.nbytes += storage.nbytes()
        self.peak = max(self.peak, self.nbytes)
        weakref.finalize(storage, self._free, key)

    def _free(self, key):
        self.nbytes -= self._alive.pop(key)


def as_on_a_gpu(monkeypatch):
    """Steps whose host code takes tensors of the device "meta"; their launches do nothing."""
    from triton.runtime.jit import JITFunction

    from tppo_kernels.ops.linear_logprobs import _triton
    from tppo_kernels.ops.token_logprobs import _triton as token
    monkeypatch.setattr(JITFunction, "run", lambda *args, **kwargs: None)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    monkeypatch.setattr(_linear, "takes_halves", lambda *args: True)
    monkeypatch.setattr(token, "aligned", lambda x: (x, 0))
    for module in (_triton, token):
        monkeypatch.setattr(module, "launching_on", lambda x: contextlib.nullcontext())
    return _triton.STEPS
