"""What other projects compute the same with, as functions of the benchmarks' inputs.

Each is called as its own trainer calls it: compaction to valid rows only where that trainer has it.
A builder imports its peer and returns the function; where it cannot, `collect` keeps the reason,
which the run says once. `pip install --no-deps` keeps them from replacing torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PACKAGES = ("trl", "verl", "liger-kernel", "cut-cross-entropy", "torchrl", "nvidia-cutlass-dsl")
IGNORED = -100
REASONS: dict[str, str] = {}  # why a peer has no row
Builder = Callable[[str], Callable]


def said(error: BaseException, width: int = 160) -> str:
    """An exception on one line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= width else text[:width - 3] + "..."


def collect(device: str, builders: dict[str, Builder]) -> dict[str, Callable]:
    """Those that can be had on this device, by name."""
    found: dict[str, Callable] = {}
    for name, build in builders.items():
        try:
            found[name] = build(device)
        except Exception as error:  # an import of a stranger may raise anything
            REASONS[name] = said(error)
    return found


def versions() -> dict[str, str]:
    """The release of each peer, for the machine's description."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _gpu_only(device: str) -> None:
    if device == "cpu":
        raise RuntimeError("runs on a GPU only")


def _masked(mask: Tensor, *results: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.where(mask, x, 0) for x in results)


def _ignoring(targets: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, targets, IGNORED)


# (hidden [N, D], weight [V, D], targets, mask [N], rows or None) -> (logprobs, entropy)


def trl(device: str, entropy: bool = True) -> Callable:
    """TRL's chunks of tokens and vocabulary; its trainers compact on a GPU, not on a CPU."""
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

    def call(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor, rows: Any) -> tuple:
        some = hidden if rows is None else hidden.index_select(0, rows)
        labels = targets if rows is None else targets[rows]
        results = [x for x in _ChunkedLogProbFunction.apply(
            some, weight, None, labels, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0,
            ("entropy",) if entropy else ())[:2] if x is not None]
        if rows is None:
            return _masked(mask, *results)
        return tuple(x.new_zeros(mask.shape).index_copy(0, rows, x) for x in results)

    return call


def bare(package: str, *rooms: str) -> None:
    """Makes modules of a package importable that ask for less than its `__init__` does: it and
    `rooms` in it become packages that nothing has run in, unless they are imported already."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"No module named {package!r}")
    top = Path(found.origin).parent
    for name in (package, *(f"{package}.{room}" for room in rooms)):
        if name not in sys.modules:
            module = ModuleType(name)
            module.__path__ = [str(top.joinpath(*name.split(".")[1:]))]
            sys.modules[name] = module


def verl(device: str) -> Callable:
    """verl's loop over chunks of 512 tokens in PyTorch; verl itself would want ray."""
    bare("verl", "utils", "utils.experimental")
    module = importlib.import_module("verl.utils.experimental.torch_functional")
    fused = module.FusedLinearForPPO()
    return lambda hidden, weight, targets, mask, rows: _masked(
        mask, *fused(hidden, weight, targets))


def verl_triton(device: str) -> Callable:
    """verl's kernel."""
    _gpu_only(device)
    bare("verl", "utils", "utils.kernel", "plugin")
    module = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
    return lambda hidden, weight, targets, mask, rows: _masked(
        mask, *module.linear_cross_entropy(hidden, weight, targets, 1.0, "none"))


def hopper_kernels() -> bool:
    """Whether Liger's CuTe kernels for a Hopper GPU can be had: they are written in that DSL."""
    return importlib.util.find_spec("cutlass") is not None


def liger_names(device: str) -> tuple[str, str]:
    """What the rows of Liger's log-probs with entropy, and of its sum of log-probs, are called."""
    if device != "cpu" and torch.cuda.get_device_capability() == (9, 0) and hopper_kernels():
        return "Liger (Hopper)", "Liger (Hopper)"
    return "Liger (PyTorch)", "Liger (Triton)"


def liger_scaled(device: str) -> Callable:
    """Liger's CuTe kernel on a Hopper GPU where it can be had, elsewhere its loop in PyTorch: on
    Hopper Liger itself does not fall back to it."""
    module = importlib.import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    if liger_names(device)[0] == "Liger (PyTorch)":
        module._resolve_implementation = lambda device: module._FusedLinearPPOFallbackFunction
    fused = module.LigerFusedLinearScaledCrossEntropyFunction

    def call(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor, rows: Any) -> tuple:
        nll, entropy = fused.apply(hidden, weight, _ignoring(targets, mask), 1.0, IGNORED, 1, True)
        return -nll, entropy

    return call


# (the same) -> the sum of log-probs


def torch_linear(device: str) -> Callable:
    """PyTorch's own."""
    fused = F.linear_cross_entropy
    return lambda hidden, weight, targets, mask, rows: -fused(
        hidden, weight, _ignoring(targets, mask), reduction="sum", ignore_index=IGNORED)


def cce(device: str) -> Callable:
    """Cut cross-entropy without its filter of small gradients; it compacts."""
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, targets, mask, rows: -linear_cross_entropy(
        hidden, weight, _ignoring(targets, mask), ignore_index=IGNORED, reduction="sum",
        filter_eps=None, impl="torch_compile" if device == "cpu" else "cce")


def liger_ce(device: str) -> Callable:
    """Liger's chunks with a Triton kernel for the cross-entropy."""
    _gpu_only(device)
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction as Fused

    return lambda hidden, weight, targets, mask, rows: -Fused.apply(
        hidden, weight, _ignoring(targets, mask), None, None, IGNORED, 0.0, 0.0, "sum")[0]


# (hidden [B, T, D], weight, targets, old_logprobs [B, T], advantages [B], mask, rows) -> the loss


def liger_grpo(device: str) -> Callable:
    """Liger's chunked loss: one advantage a sequence, one sequence a chunk, no entropy."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    fused = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="dapo")
    return lambda hidden, weight, targets, old, advantages, mask, rows: fused(
        hidden, weight, targets, mask, advantages, old_per_token_logps=old)[0]


# (logits, targets) -> (logprobs, entropy)


def trl_logits(device: str) -> Callable:
    """TRL's two functions."""
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    return lambda x, targets: (selective_log_softmax(x, targets), entropy_from_logits(x))


def trl_triton(device: str) -> Callable:
    """TRL's kernel for both."""
    _gpu_only(device)
    from trl.kernels import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy


# (rewards, values, mask [B, T]) -> (advantages, returns); responses are right-padded


def _ended(mask: Tensor) -> Tensor:
    """The last valid token of each sequence: it knows `done`, not a mask."""
    return mask & ~torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)


def torchrl(device: str, gamma: float, lam: float) -> Callable:
    """TorchRL's vectorised estimator."""
    from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

    def call(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        done = _ended(mask)
        behind = torch.cat([values[:, 1:], values.new_zeros(values.shape[0], 1)], 1)
        results = vec_generalized_advantage_estimate(
            gamma, lam, *(x[..., None] for x in (values, behind, rewards, done, done)))
        return _masked(mask, *(x[..., 0] for x in results))

    return call
