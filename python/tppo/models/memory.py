"""What a pass of a model takes in memory: without weights, in seconds.

The model's own layers run forward and backward on torch's meta device (see `tppo.models.meta`).
Layers are alike, so a model of two layers and one of three are enough: what the forward pass, the
backward pass of the uppermost and of the lowest layer take is linear in the number of layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig

from tppo.models.guards import trainable
from tppo.models.meta import (
    META,
    Head,
    Holding,
    LiveBytes,
    Mark,
    Role,
    meta_model,
    no_plan,
    sizes,
)
from tppo.models.recompute import recompute_layers
from tppo.models.rollout.decoding import CACHE


class Tokens(NamedTuple):
    """What a model reads at once: groups of responses, with one prompt each, or one each.

    shared: each prompt is read once for its `responses`; else each row has its own, padded.
    """

    prompts: int
    responses: int  # of each prompt
    prompt_tokens: int
    response_tokens: int
    shared: bool
    every: bool = False  # whether the head reads the prompts' tokens too

    @property
    def through(self) -> int:
        """Tokens that go through the layers."""
        copies = 1 if self.shared else self.responses
        behind = self.responses * self.response_tokens
        return self.prompts * (copies * self.prompt_tokens + behind)

    @property
    def read(self) -> int:
        """Tokens whose states the head reads."""
        return self.through if self.every else self.prompts * self.responses * self.response_tokens


class Peak(NamedTuple):
    """The largest number of bytes alive at once beside weights and optimiser, and parts of it."""

    nbytes: int
    gradients: int = 0
    logits: int = 0


def training_pass(
    config: PretrainedConfig, how: Holding, roles: tuple[Role, ...], tokens: Tokens, parts: int
) -> Peak:
    """A forward and a backward pass of models with one loss, from gradients that are there already
    where a minibatch has several parts.
    """
    rows = how.chunk_rows(tokens.read, config.vocab_size)
    found = _trained(config, replace(how, gpu_nbytes=None), roles, tokens, parts > 1, rows)
    model = meta_model(config, how)
    gradients = sum(sizes(model, role).trained for role in roles) * how.dtype.itemsize
    heads = {"language", "policy"} & set(roles)
    return Peak(found, gradients, _logits(config, how, rows) if heads else 0)


def _logits(config: PretrainedConfig, how: Holding, rows: int) -> int:
    """Bytes of a chunk."""
    return rows * config.vocab_size * (4 if how.dtype == torch.float32 else 6)


def _remembered(function: Callable[..., Any]) -> Callable[..., Any]:
    """Each pass is computed once, whatever the configuration object that describes its model.

    Errors: ValueError where the model cannot run so: it has a state in place of keys and values,
    or makes of the mask what the stand-ins do not.
    """
    known: dict[Any, Any] = {}

    @functools.wraps(function)
    def call(config: PretrainedConfig, *args: Any) -> Any:
        key = (config.to_json_string(use_diff=False), *args)
        if key not in known:
            try:
                known[key] = function(config, *args)
            except Exception as error:  # of every kind: the layers are the family's own
                raise no_plan(config, error) from error
        return known[key]

    return call


@_remembered
def _trained(
    config: PretrainedConfig, how: Holding, roles: tuple[Role, ...], tokens: Tokens, again: bool,
    rows: int,
) -> int:  # fmt: skip
    """Bytes of `training_pass`."""
    run = functools.partial(_run, config, how, roles, tokens, again, rows)
    if config.num_hidden_layers <= 3:
        return max(run(config.num_hidden_layers))
    more = config.num_hidden_layers - 2
    return max(a + more * (b - a) for a, b in zip(run(2), run(3), strict=True))


def _run(
    config: PretrainedConfig,
    how: Holding,
    roles: Sequence[Role],
    tokens: Tokens,
    again: bool,
    rows: int,
    layers: int,
) -> list[int]:
    """Peaks of the stretches of one part, middle layers left out: forward, the heads' backward, and
    the uppermost and the lowest layer's backward of each model, the last first.
    """
    models = [meta_model(config, how, layers) for _ in roles]
    live = LiveBytes(*models)
    for model in models:
        stack = _layers(model)
        if how.recompute:
            recompute_layers(model)
        for layer in stack:
            layer.register_forward_hook(lambda _m, _a, out: _marked(out, live))
    with live:
        if again:  # the gradients of the part before are there
            for model, role in zip(models, roles, strict=True):
                part = model if role in ("language", "policy") else model.base_model
                for parameter in trainable(part):
                    parameter.grad = torch.empty_like(parameter)
        losses = [_loss(m, r, tokens, rows) for m, r in zip(models, roles, strict=True)]
        live.mark()
        torch.autograd.backward(losses, [torch.empty_like(loss) for loss in losses])
    per_model = (len(live.peaks) - 2) // len(roles)
    found = live.peaks[:2]
    for i in range(len(roles)):
        stretches = live.peaks[2 + i * per_model : 2 + (i + 1) * per_model]
        found += [stretches[0], stretches[-1]]
    return found


def _layers(model: Any) -> list[nn.Module]:
    """The model's layers: the longest list of modules that it has."""
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len)


def _marked(out: Any, live: LiveBytes) -> Any:
    if not torch.is_grad_enabled():
        return out
    first = out[0] if isinstance(out, tuple) else out
    first = Mark.apply(first, live)
    return (first, *out[1:]) if isinstance(out, tuple) else first


def _states(model: Any, tokens: Tokens, **options: Any) -> Any:
    """A pass through the layers."""
    rows = 1 if tokens.shared else tokens.prompts * tokens.responses
    model.config.padded = not tokens.shared
    shape = (rows, tokens.through // rows)
    return model.base_model(
        input_ids=torch.empty(shape, dtype=torch.long, device=META),
        attention_mask=torch.empty(1, 1, 0, 0, dtype=torch.bool, device=META),
        position_ids=torch.empty(shape, dtype=torch.long, device=META),
        **options,
    )


def _loss(model: Any, role: Role, tokens: Tokens, rows: int) -> Tensor:
    states = _states(model, tokens, use_cache=False).last_hidden_state.flatten(0, 1)  # [N, D]
    read = states.index_select(0, torch.empty(tokens.read, dtype=torch.long, device=META))
    if role in ("value", "class"):
        return read.float().sum()
    head = model.get_output_embeddings().weight
    return Head.apply(read, head, rows, role == "policy").sum()


def reading_pass(config: PretrainedConfig, how: Holding, tokens: Tokens) -> Peak:
    """A pass without gradients: log-probs of given responses."""
    logits = _logits(config, how, how.chunk_rows(tokens.read, config.vocab_size))
    states = (tokens.through + tokens.read) * config.hidden_size * how.dtype.itemsize
    return Peak(max(_layers_pass(config, how.dtype, tokens), states + logits), logits=logits)


@_remembered
@torch.no_grad()
def _layers_pass(config: PretrainedConfig, dtype: torch.dtype, tokens: Tokens) -> int:
    """Bytes of a pass through the layers alone: one after another, so two of them do."""
    model = meta_model(config, Holding(dtype), min(2, config.num_hidden_layers))
    with LiveBytes(model) as live:
        _states(model, tokens, use_cache=False)
    return max(live.peaks)


def kept_nbytes(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values of one token, in all layers."""
    config = config.get_text_config()
    heads, size = kept_heads(config)
    return config.num_hidden_layers * 2 * heads * size * dtype.itemsize


def kept_heads(config: PretrainedConfig) -> tuple[int, int]:
    """Heads of keys and values, and the numbers in each."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads, size


class Sampled(NamedTuple):
    """Of sampling: the largest number of bytes alive at once, and the cache's among them."""

    nbytes: int
    cache: int
    logits: int


@_remembered
@torch.no_grad()
def sampling_pass(config: PretrainedConfig, dtype: torch.dtype, tokens: Tokens) -> Sampled:
    """Prompts read at once, then one token after another with all keys and values kept."""
    layers = min(2, config.num_hidden_layers)
    model = meta_model(config, Holding(dtype), layers)
    more = config.num_hidden_layers - layers
    rows = tokens.prompts * tokens.responses
    heads, size = kept_heads(config)
    per_token = 2 * heads * size * dtype.itemsize  # of one layer
    read = tokens._replace(responses=1 if tokens.shared else tokens.responses, response_tokens=0,
                           shared=False)  # fmt: skip
    with LiveBytes(model) as live:
        _states(model, read, use_cache=True)
    prefill = max(live.peaks) + more * read.through * per_token
    length = tokens.prompt_tokens + tokens.response_tokens
    cache = DynamicCache()
    for layer in range(layers):
        past = torch.empty(2, rows, heads, length - 1, size, dtype=dtype, device=META)
        cache.update(past[0], past[1], layer)
    step = Tokens(rows, 1, 0, 1, shared=False)
    with LiveBytes(model) as live:
        _states(model, step, use_cache=True, **{CACHE: cache})
    kept = config.num_hidden_layers * rows * length * per_token
    own = layers * rows * length * per_token  # of the cache's new tensors, in the peak already
    logits = rows * config.vocab_size * (dtype.itemsize + 4 * 4)  # scores, softmax and a copy
    decode = kept + max(max(live.peaks) - own, 0) + rows * length * per_token + logits
    if tokens.shared:  # the cache of the prompts, spread out to that of the rows
        spread = (read.through + rows * tokens.prompt_tokens) * per_token * config.num_hidden_layers
        prefill = max(prefill, spread)
    return Sampled(max(prefill, decode), kept, logits)
