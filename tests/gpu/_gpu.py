"""The device, the backends to try on it, and calls of the operators with everything they return."""

import importlib
import os

import pytest
import torch

import tppo_kernels as tk
from tppo_kernels._core.backends import missing
from tppo_kernels._core.op import OPS
from tppo_kernels.testing import sample_mask, strided

DEVICE = ("cuda" if torch.cuda.is_available() else
          "cpu" if os.environ.get("TPPO_GPU_SMOKE") == "1" else None)
D, K, V = 48, 3, 1003
on_a_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="streams, graphs and launches want a GPU")


def pairs(ops):
    """(op, backend) of everything that the device has an order for; what is missing says so."""
    return [pytest.param(op, backend, id=f"{op}-{backend}", marks=pytest.mark.skipif(
        bool(missing(backend)), reason=str(missing(backend))))
        for op in ops for backend in OPS[op].order[DEVICE or "cuda"]]


def inputs(op, batch, tokens, kind="interior", dtype=torch.float32, seed=0):
    """(args, kwargs) in fp64, of values that dtype holds exactly."""
    g = torch.Generator().manual_seed(seed)
    mask = sample_mask(kind, batch, tokens, seed)

    def r(*shape, scale=1.0, shift=0.0):
        return (shift + scale * torch.randn(*shape, generator=g)).to(dtype).double()

    grid = (batch, tokens)
    old = -r(*grid).abs()
    near = (old + r(*grid, scale=0.3)).to(dtype).double()
    return {
        "gae": lambda: ((r(*grid), r(*grid), mask), {
            "gamma": 0.99, "lam": 0.9, "value_lam": 0.97, "bootstrap": r(batch)}),
        "whiten": lambda: ((r(*grid, shift=3.0), mask), {"unbiased": False}),
        "token_advantages": lambda: ((r(*grid), r(*grid), mask), {
            "logprobs": near, "ref_logprobs": old, "kl_coef": 0.1, "gamma": 0.99}),
        "token_logprobs": lambda: (
            (r(*grid, V, scale=3.0), torch.randint(0, V, grid, generator=g), mask),
            {"temperature": 0.7}),
        "ppo_loss": lambda: ((near, old, r(*grid), mask), {
            "dual_clip": 1.5, "entropy": r(*grid).abs(), "entropy_coef": 0.1, "kl_coef": 0.3,
            "ref_logprobs": r(*grid), "weights": r(batch).abs()}),
        "value_loss": lambda: ((r(*grid), r(*grid), mask), {"old_values": r(*grid), "clip": 0.5}),
        "entropy": lambda: ((r(*grid, V, scale=3.0), mask), {"temperature": 0.7}),
        "kl": lambda: ((near, old, mask), {"estimator": "k3", "clamp": 0.1}),
        "reduce": lambda: ((r(*grid), mask), {"reduction": "seq-mean-token-mean"}),
        "token_head": lambda: ((r(*grid, D), r(K, D), r(K), mask), {}),
    }[op]()


GRIDS = ("gae", "whiten", "token_advantages", "token_logprobs", "ppo_loss", "value_loss",
         "token_head", "kl", "reduce", "entropy")


def sample(op):
    """The operator's own sample: (args, kwargs), in fp64."""
    return importlib.import_module(f"tppo_kernels.ops.{op}").sample_inputs()


def place(x, device, dtype, layout=lambda x: x):
    """An argument on the device; floating tensors in dtype, those with a size laid out anew."""
    if not isinstance(x, torch.Tensor):
        return x.to(device) if hasattr(x, "to") else x
    x = x.to(device, dtype) if x.is_floating_point() else x.to(device)
    return layout(x) if x.dim() else x


def placed(given, device=None, dtype=torch.float32, layout=lambda x: x):
    """(args, kwargs) on a device, leaves of the graph where they are floating."""
    args, kwargs = given
    args = [place(x, device or DEVICE, dtype, layout) for x in args]
    kwargs = {k: place(x, device or DEVICE, dtype, layout) for k, x in kwargs.items()}
    for x in (*args, *kwargs.values()):
        if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dim():
            x.requires_grad_()
    return args, kwargs


def floats(name, value):
    """The floating tensors of nested tuples, by name."""
    if isinstance(value, torch.Tensor):
        return {name: value} if value.is_floating_point() else {}
    if not isinstance(value, tuple):
        return {}
    fields = getattr(value, "_fields", range(len(value)))
    return {k: x for field, item in zip(fields, value, strict=True)
            for k, x in floats(f"{name}.{field}", item).items()}


def run(op, given):
    """Every result of the operator and the gradients of a projection of them, by name."""
    args, kwargs = given
    results = floats("result", getattr(tk, op)(*args, **kwargs))
    leaves = {str(k): x for k, x in [*enumerate(args), *kwargs.items()]
              if isinstance(x, torch.Tensor) and x.requires_grad}
    attached = [x for x in results.values() if x.requires_grad and x.numel()]
    if attached:
        slopes = [torch.linspace(-1, 1, x.numel(), device=x.device).to(x).reshape(x.shape)
                  for x in attached]
        grads = torch.autograd.grad(attached, list(leaves.values()), slopes, allow_unused=True)
        results.update({f"gradient of {name}": grad for name, grad in
                        zip(leaves, grads, strict=True) if grad is not None})
    return {name: x.detach() for name, x in results.items()}


def strided_on_device(x):
    """`testing.strided` on any device."""
    wide = strided(x.detach().cpu())
    return torch.empty_strided(wide.size(), wide.stride(), dtype=x.dtype,
                               device=x.device).copy_(wide)


def poison(given, mask, value):
    """(args, kwargs) with `value` at the masked slots of every tensor of tokens."""
    def at_masked(x):
        if not isinstance(x, torch.Tensor) or x.shape[:2] != mask.shape or x.dtype == torch.bool:
            return x
        wide = mask.reshape(*mask.shape, *[1] * (x.dim() - 2)).to(x.device)
        fill = torch.full((), value, dtype=x.dtype) if x.is_floating_point() else -100
        return torch.where(wide, x, fill)

    args, kwargs = given
    return [at_masked(x) for x in args], {k: at_masked(x) for k, x in kwargs.items()}
