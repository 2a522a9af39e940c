"""Models on torch's meta device, and a counter of what is alive in a pass of them.

Tensors there have shapes and no data.  Two parts of a model are replaced by stand-ins that allocate
what the real ones do: the attention, because the kernel that would run depends on the device, and
the head, whose operators work through the logits in chunks.
"""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    PretrainedConfig,
)
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from tppo.models.guards import trainable

Role = Literal["language", "policy", "value", "class"]  # which head reads the states
META = torch.device("meta")
CPU_ROWS = 512  # of logits that the operators on a CPU make at once
GPU_CHUNK = (1 << 30, 8 << 30)  # bytes of them on a GPU: a sixteenth of its memory within these
CPU_CHUNK = 1 << 30


@dataclass(frozen=True)
class Holding:
    """How a model is held and trained, and where.

    lora: the rank of the adapters, None where every weight is trained.  gpu_nbytes: memory of the
    GPU, None on a CPU.
    """

    dtype: torch.dtype = torch.float32
    lora: int | None = None
    recompute: bool = False
    gpu_nbytes: int | None = None

    def chunk_rows(self, read: int, vocab: int) -> int:
        """Rows of logits made at once of `read` ones, those of 16 bits with their gradient."""
        if self.gpu_nbytes is None:
            rows = min(CPU_ROWS, CPU_CHUNK // (4 * vocab))
        else:
            low, high = GPU_CHUNK
            rows = max(low, min(high, self.gpu_nbytes // 16)) // (6 * vocab)
        return max(1, min(read, rows))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that were made inside the block and are alive.

    Views of the models' weights are none of them.  `mark()` begins another stretch; `peaks` has the
    largest number of each.
    """

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        weights = [x for m in models for x in (*m.parameters(), *m.buffers())]
        self.now, self.peaks = 0, [0]
        self._alive = {x.untyped_storage()._cdata for x in weights}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def mark(self) -> None:
        """Begins another stretch."""
        self.peaks.append(self.now)

    def _add(self, storage: Any) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self.now += nbytes
        self.peaks[-1] = max(self.peaks[-1], self.now)
        weakref.finalize(storage, self._gone, key, nbytes)

    def _gone(self, key: int, nbytes: int) -> None:
        self._alive.discard(key)
        self.now -= nbytes


class _Attention(torch.autograd.Function):
    """Keeps what the kernels keep: queries, keys, values, output and logsumexps."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, padded: bool) -> Tensor:
        rows, heads, length, size = q.shape
        kept = [q, k, v]
        if padded and k.shape[2] == length:  # the mask of padding, in the dtype of the scores
            kept.append(q.new_empty(rows, 1, length, length))
        out = q.new_empty(rows, length, heads, size)
        lse = q.new_empty(rows, heads, length, dtype=torch.float32)
        ctx.save_for_backward(*kept, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v = ctx.saved_tensors[:3]
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


def _attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **_: Any) -> Any:
    padded = module.config.padded
    if padded and k.shape[1] != q.shape[1]:  # under a mask each head is given keys of its own
        repeats = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
    return _Attention.apply(q, k, v, padded), None


AttentionInterface.register("tppo_plan", _attend)
AttentionMaskInterface.register("tppo_plan", lambda *_, **__: None)


class Head(torch.autograd.Function):
    """Log-probs of a language model's head, or the policy's loss, a chunk of logits at a time.

    The loss has its gradients from the forward pass on; log-probs find them in backward.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, rows: int, now: bool) -> Tensor:
        ctx.rows = min(rows, hidden.shape[0])
        _chunk(hidden, weight, ctx.rows)
        ctx.now, ctx.wanted = now, weight.requires_grad
        grads = _gradients(hidden, weight, ctx.wanted, hidden.shape[0]) if now else ()
        ctx.save_for_backward(hidden, weight, *grads)
        return hidden.new_empty(hidden.shape[0], dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        hidden, weight, *grads = ctx.saved_tensors
        if not ctx.now:
            chunk = _chunk(hidden, weight, ctx.rows)
            grads = _gradients(hidden, weight, ctx.wanted, ctx.rows)
            del chunk
        d_weight = grads[1].to(weight.dtype) if ctx.wanted else None
        return torch.empty_like(hidden), d_weight, None, None


def _chunk(hidden: Tensor, weight: Tensor, rows: int) -> list[Tensor]:
    """Logits in fp32, and beside those of a 16-bit model their gradient."""
    shape = rows, weight.shape[0]
    found = [hidden.new_empty(shape, dtype=torch.float32)]
    return found if weight.dtype == torch.float32 else [*found, hidden.new_empty(shape)]


def _gradients(hidden: Tensor, weight: Tensor, wanted: bool, rows: int) -> tuple[Tensor, ...]:
    """By the states of some rows and by the weight, in fp32."""
    d_hidden = hidden.new_empty(rows, hidden.shape[1], dtype=torch.float32)
    return (d_hidden, torch.empty_like(weight, dtype=torch.float32)) if wanted else (d_hidden,)


class Mark(torch.autograd.Function):
    """Begins another stretch of the counter where backward comes by."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, live: LiveBytes) -> Tensor:
        ctx.live = live
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.live.mark()
        return grad, None


class _Adapted(nn.Module):
    """A linear layer whose weight is frozen, with a LoRA adapter.

    Conv1D is the linear layer of GPT-2, whose weight is stored transposed.
    """

    def __init__(self, base: nn.Linear | Conv1D, rank: int):
        super().__init__()
        self.base = base.requires_grad_(False)
        own = (base.nx, base.nf) if isinstance(base, Conv1D) else (
            base.in_features, base.out_features)  # fmt: skip
        dtype = base.weight.dtype
        self.a = nn.Parameter(torch.empty(rank, own[0], dtype=dtype, device=META))
        self.b = nn.Parameter(torch.empty(own[1], rank, dtype=dtype, device=META))

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output and the adapter's, scaled."""
        return self.base(x) + 2.0 * ((x @ self.a.T) @ self.b.T)


def no_plan(config: PretrainedConfig, error: Exception) -> ValueError:
    """The error of a model that cannot be planned."""
    why = str(error).strip().partition("\n")[0] or type(error).__name__
    return ValueError(f"no plan for a model of type {config.model_type!r}: {why}")


def meta_model(config: PretrainedConfig, how: Holding, layers: int | None = None) -> Any:
    """A causal LM without data, held as `how` says; of so many layers.

    Errors: ValueError where transformers has no causal LM for the configuration, or none of it.
    """
    config = copy.deepcopy(config)
    if layers is not None:
        config.num_hidden_layers = layers
        if vars(config).get("layer_types"):  # of Mamba it follows from the number of layers
            config.layer_types = config.layer_types[:layers]
    config.padded = False
    try:
        with META, no_init_weights():
            model = AutoModelForCausalLM.from_config(
                config, dtype=how.dtype, attn_implementation="tppo_plan"
            )
    except Exception as error:  # of every kind: each family reads its configuration itself
        raise no_plan(config, error) from error
    model.tie_weights()
    if how.lora is not None:
        model.requires_grad_(False)
        for module in list(model.base_model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Linear | Conv1D):
                    setattr(module, name, _Adapted(child, how.lora))
    return model.eval()


class Sizes(NamedTuple):
    """Bytes of weights, and numbers of what is trained, of one role."""

    weights: int  # of the trunk, with the language head where the role has one
    trained: int  # parameters
    largest: int  # parameters of the largest tensor that is trained


def sizes(model: Any, role: Role) -> Sizes:
    """Of a model that `meta_model` made; tied weights count once."""
    part = model if role in ("language", "policy") else model.base_model
    parameters = list(part.parameters())
    trained = [p.numel() for p in trainable(part)]
    return Sizes(
        sum(p.numel() * p.element_size() for p in parameters), sum(trained), max(trained, default=0)
    )
