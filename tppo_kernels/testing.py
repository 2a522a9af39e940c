"""Sample inputs, and how accurate a result must be: for tests, benchmarks and code of others.

The policy: against fp64 from the same inputs, an operator's largest error is at most twice that of
plain PyTorch in the inputs' own dtype, plus a floor of `FLOOR` times the largest exact value; of a
sum whose terms may cancel, plus float32's eps of the sum of their magnitudes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ._core.backends import use_backend

FLOOR = 1e-6
SEQUENTIAL_FLOOR = 1e-5  # gae, whiten: rounding adds up along a sequence
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MASKS = ("none", "full", "left", "right", "interior", "row", "all-false")
POISONS = (float("nan"), float("inf"), float("-inf"), 1e38)


def sample_mask(kind: str, batch: int, tokens: int, seed: int = 0) -> Tensor | None:
    """A mask [B, T]: left- or right-padded, with holes inside, with one all-False row, ..."""
    if kind == "none":
        return None
    generator = torch.Generator().manual_seed(seed)
    position = torch.arange(tokens).expand(batch, tokens)
    length = torch.randint(1, tokens + 1, (batch, 1), generator=generator) if tokens else 0
    mask = {
        "full": lambda: torch.ones(batch, tokens, dtype=torch.bool),
        "left": lambda: position >= tokens - length,
        "right": lambda: position < length,
        "interior": lambda: torch.rand(batch, tokens, generator=generator) < 0.6,
        "row": lambda: torch.rand(batch, tokens, generator=generator) < 0.8,
        "all-false": lambda: torch.zeros(batch, tokens, dtype=torch.bool),
    }[kind]()
    if kind == "row" and batch:
        mask[0] = False
    return mask


def pack(x: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The first lengths[b] tokens of each row, one after another, and their `cu_seqlens`."""
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return torch.cat([x[b, :n] for b, n in enumerate(lengths)]), offsets


def strided(x: Tensor) -> Tensor:
    """The same values behind strides that no contiguous tensor has."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 3), 7, dtype=x.dtype) if x.dim() else x
    view = wide[..., 1:2 * x.shape[-1] + 1:2] if x.dim() else wide.clone()
    view.copy_(x)
    return view


def poisoned(x: Tensor, mask: Tensor, poison: float) -> Tensor:
    """x with `poison` where the mask is False."""  # mask broadcasts over trailing sizes
    wide = mask.reshape(*mask.shape, *([1] * (x.dim() - mask.dim())))
    return torch.where(wide, x, torch.full((), poison, dtype=x.dtype))


def max_error(actual: Tensor, exact: Tensor) -> float:
    """The largest absolute difference; NaN against anything is infinite, equal infinities are 0."""
    if actual.numel() == 0:
        return 0.0
    difference = (actual.double() - exact.double()).abs()
    difference = torch.where(actual.double() == exact.double(), 0.0, difference)
    return float(torch.where(difference.isnan(), float("inf"), difference).max())


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def assert_accurate(actual: Tensor, exact: Tensor, eager: Tensor | None = None, *,
                    floor: float = FLOOR, scale: Tensor | None = None, name: str = "result"
                    ) -> None:
    """max|actual - exact| <= 2 max|eager - exact| + floor max|exact| + eps max|scale|, same shapes.

    exact: computed in fp64 from the same inputs; eager: plain PyTorch in the inputs' own dtype.
    scale: of a sum, the same sum over the magnitudes of what it adds up.  Where these cancel, the
    exact value says nothing of what float32 has rounded on the way, and eager may be right by luck;
    eps is that of float32, 2^-23.
    """
    if actual.shape != exact.shape:
        raise AssertionError(f"{name} has shape {list(actual.shape)}, not {list(exact.shape)}")
    allowed = floor * _largest(exact) + (2 * max_error(eager, exact) if eager is not None else 0.0)
    if scale is not None:
        allowed += torch.finfo(torch.float32).eps * _largest(scale)
    error = max_error(actual, exact)
    if not error <= allowed:
        raise AssertionError(f"{name} is off by {error:.3e}, allowed {allowed:.3e}")


def assert_same_bits(actual: Any, expected: Any, name: str = "result") -> None:
    """Bitwise equality of tensors, or of (nested) tuples of them; NaN equals NaN."""
    if isinstance(expected, Tensor):
        same = actual.shape == expected.shape and actual.dtype == expected.dtype and bool(
            ((actual == expected) | ((actual != actual) & (expected != expected))).all())
        if not same:
            raise AssertionError(f"{name} differs: {actual} against {expected}")
    elif isinstance(expected, tuple):
        for field, (a, e) in enumerate(zip(actual, expected, strict=True)):
            assert_same_bits(a, e, f"{name}[{getattr(expected, '_fields', range(99))[field]}]")
    elif actual != expected:
        raise AssertionError(f"{name} is {actual!r}, expected {expected!r}")


def compare(op: str, backend: str, device: str) -> str | None:
    """Runs an operator's sample on a backend against the fp64 reference; None, or what is wrong.

    Results and the gradients of a random projection of them are compared.
    """
    module = importlib.import_module(f"tppo_kernels.ops.{op}")
    try:
        with use_backend(backend):
            actual = _run_sample(module.sample_inputs, op, torch.float32, device)
        with use_backend("reference"):
            exact = _run_sample(module.sample_inputs, op, torch.float64, "cpu")
            eager = _run_sample(module.sample_inputs, op, torch.float32, "cpu")
        for name, value in exact.items():
            assert_accurate(actual[name].cpu(), value, eager[name], name=name)
    except (AssertionError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _run_sample(sample_inputs: Callable, op: str, dtype: torch.dtype,
                device: str) -> dict[str, Tensor]:
    """Every floating result of the op's sample by name, and the gradient of each input."""

    def place(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x.to(device) if hasattr(x, "to") else x
        return x.to(device, dtype) if x.is_floating_point() else x.to(device)

    args, kwargs = sample_inputs()
    inputs = {**{str(i): place(x) for i, x in enumerate(args)},
              **{name: place(x) for name, x in kwargs.items()}}
    leaves = {name: x.requires_grad_() for name, x in inputs.items()
              if isinstance(x, Tensor) and x.is_floating_point() and x.dim()}
    result = getattr(importlib.import_module("tppo_kernels"), op)(
        *(inputs[str(i)] for i in range(len(args))), **{name: inputs[name] for name in kwargs})
    outputs = {name: x for name, x in _floats("result", result) if x.numel()}
    loss = sum((x * torch.linspace(-1, 1, x.numel(), device=device).to(x).reshape(x.shape)).sum()
               for x in outputs.values() if x.requires_grad)
    if isinstance(loss, Tensor):
        loss.backward()
    gradients = {f"gradient of argument {name}": x.grad for name, x in leaves.items()
                 if x.grad is not None}
    return {name: x.detach() for name, x in {**outputs, **gradients}.items()}


def _floats(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The floating tensors of a result and of the tuples in it, by name."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name, value
    elif isinstance(value, tuple):
        fields = getattr(value, "_fields", range(len(value)))
        for field, item in zip(fields, value, strict=True):
            yield from _floats(f"{name}.{field}", item)


def count_graphs(function: Callable[..., Any], calls: Sequence[tuple]) -> int:
    """How many graphs `torch.compile(fullgraph=True)` makes for a series of argument tuples."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for arguments in calls:
        compiled(*arguments)
    torch._dynamo.reset()
    return len(graphs)
