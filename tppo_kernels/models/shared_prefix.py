"""The attention of a shared prefix in the models of transformers."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .._core.check import describe
from .._math.layout import PrefixLayout
from ..ops.prefix_attention import prefix_attention

FAMILIES = ("arcee", "gemma", "glm", "glm4", "gpt2", "gpt_neox", "granite", "helium", "llama",
            "mistral", "mixtral", "olmo", "olmo2", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3",
            "qwen3_moe", "smollm3", "starcoder2")  # the tests compare each with dense
KEYWORD = "prefix_layout"
_EAGER = "eager_shared_prefix"


@contextlib.contextmanager
def shared_prefix(model: torch.nn.Module, layout: PrefixLayout) -> Iterator[None]:
    """Inside the block, `model` reads a batch packed by `layout`, and attends within its groups.

    The layout is added as a keyword to the forward of the decoder inside `model` (a transformers
    model, or a module that holds one: a value head, LoRA, DDP), with `position_ids` and
    `use_cache=False` where they are not given. It travels with the call, so backward is right
    after the block too, under both modes of gradient checkpointing, and with several layouts in
    use. Of nested blocks on one model the inner one counts.

    The attention is registered with transformers once for each implementation in use, and is that
    implementation wherever no layout comes with the call. ("eager" has no entry there; such a
    model is moved to one of the same function, and stays there.)

    Raises ValueError for a model that is not known to be exact, with the reason; inside, for a
    batch that is not the layout's, for an attention_mask or a cache, and for attention dropout.
    """
    if not isinstance(layout, PrefixLayout):
        raise TypeError(f"shared_prefix: layout is {describe(layout)}, expected a PrefixLayout")
    decoder = _decoder(model)
    reason = _inexact(decoder)
    if reason:
        raise ValueError(f"shared_prefix: model is {type(decoder).__name__}, {reason}")
    _register_attention(decoder.config, decoder)
    names = list(inspect.signature(decoder.forward).parameters)

    def add_layout(_: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return (), _with_layout({**dict(zip(names, args, strict=False)), **kwargs}, layout)

    hook = decoder.register_forward_pre_hook(add_layout, prepend=True, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _decoder(model: Any) -> Any:
    """The innermost transformers model in `model`, which has the layers."""
    from transformers import PreTrainedModel

    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"shared_prefix: model is {describe(model)}, expected a torch module")
    found = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    if len(found) > 1:
        found = [m for m in found if sum(isinstance(x, PreTrainedModel) for x in m.modules()) == 1]
    if len(found) != 1:
        raise ValueError(f"shared_prefix: model is {type(model).__name__} and holds "
                         f"{len(found)} transformers decoders, expected one")
    return found[0]


def _inexact(decoder: Any) -> str | None:
    """Why a decoder cannot be given a shared prefix, or None."""
    config = decoder.config

    def of(name: str, default: Any = None) -> Any:
        return getattr(config, name, default)

    other = sorted(set(of("layer_types") or ()) - {"full_attention"})
    rope = of("rope_parameters") or {}
    if other:
        return f"which has layers of type {', '.join(other)}, expected full attention alone"
    if of("sliding_window") and of("use_sliding_window", True) and not of("layer_types"):
        return (f"which attends through a sliding window of {config.sliding_window} tokens, "
                "expected full attention; where every prompt with its response is that short it "
                "is the same with config.sliding_window = None")
    if of("attn_logit_softcapping"):
        return f"which caps its scores at {config.attn_logit_softcapping}, expected plain softmax"
    if of("alibi") or config.model_type in ("bloom", "mpt"):
        return "which biases its scores by distance (ALiBi), expected plain softmax"
    if rope.get("rope_type") in ("dynamic", "longrope"):
        return (f"whose rotary embedding ({rope['rope_type']}) depends on the longest sequence of "
                "the batch, expected one that depends on the position alone")
    if of("reorder_and_upcast_attn"):
        return "with reorder_and_upcast_attn, expected attention through AttentionInterface"
    if of("add_cross_attention") or of("is_encoder_decoder") or not of("is_causal", True):
        return "which is no causal decoder alone, expected one"
    if config.model_type not in FAMILIES:
        return (f"of the type {config.model_type!r}, expected one that is tested to be exact: "
                f"{', '.join(FAMILIES)}")
    return None


def _with_layout(kwargs: dict, layout: PrefixLayout) -> dict:
    """The keywords of a decoder's forward, checked against the layout, with the layout added."""
    if kwargs.get(KEYWORD) is not None:
        return kwargs
    ids = kwargs.get("input_ids")
    name = "inputs_embeds" if ids is None else "input_ids"
    ids = kwargs.get(name)
    if not isinstance(ids, Tensor) or ids.shape[:2] != (1, layout.n_tokens):
        raise ValueError(f"shared_prefix: {name} is {describe(ids)}, expected [1, L] with "
                         f"L = {layout.n_tokens}, as layout.pack gives it")
    for name in ("attention_mask", "past_key_values"):
        if kwargs.get(name) is not None:
            raise ValueError(f"shared_prefix: {name} is {describe(kwargs[name])}, expected None: "
                             "a packed batch has neither padding nor a past")
    if kwargs.get("use_cache"):
        raise ValueError("shared_prefix: use_cache is True, expected False: nothing can be "
                         "continued from a packed batch")
    layout = layout.to(ids.device)
    positions = kwargs.get("position_ids")
    if positions is not None and positions is not layout.position_ids:
        if positions.shape != layout.position_ids.shape or (
                (not positions.is_cuda or os.environ.get("TPPO_CHECK") == "1")
                and not torch.equal(positions.to(layout.device), layout.position_ids)):
            raise ValueError(f"shared_prefix: position_ids is {describe(positions)}, expected "
                             "layout.position_ids")
    # An empty mask: no model makes its own [L, L] one, and an attention that did not see the
    # layout fails at it instead of letting the responses see each other.
    return {**kwargs, KEYWORD: layout, "position_ids": layout.position_ids, "use_cache": False,
            "attention_mask": torch.zeros(1, 1, 0, 0, dtype=torch.bool, device=ids.device)}


def _register_attention(config: Any, decoder: Any) -> None:
    """Puts the attention before the implementation that a model uses, once a process."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = config._attn_implementation
    if name == "eager":
        if _EAGER not in ALL_ATTENTION_FUNCTIONS:
            AttentionInterface.register(_EAGER, _attention(_eager))
            AttentionMaskInterface.register(_EAGER, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
        config._attn_implementation = _EAGER
    elif name not in ALL_ATTENTION_FUNCTIONS:
        raise ValueError(f"shared_prefix: model has the attention implementation {name!r}, "
                         "expected one that is registered with AttentionInterface")
    elif not hasattr(ALL_ATTENTION_FUNCTIONS[name], "reads_prefix_layout"):
        AttentionInterface.register(name, _attention(ALL_ATTENTION_FUNCTIONS[name]))


def _eager(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The eager attention of the file that a model's attention is written in."""
    for base in type(module).__mro__:
        own = getattr(sys.modules.get(base.__module__), "eager_attention_forward", None)
        if own is not None:
            return own(module, *args, **kwargs)
    raise ValueError(f"{type(module).__name__} has no eager_attention_forward beside it")


def _attention(own: Callable) -> Callable:
    """An attention for transformers: `_shared` where a layout comes with the call, else `own`."""

    @functools.wraps(own)
    def attention(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor,
                  attention_mask: Tensor | None = None, *args: Any, prefix_layout: Any = None,
                  **kwargs: Any) -> tuple[Tensor, Any]:
        if prefix_layout is None:
            return own(module, query, key, value, attention_mask, *args, **kwargs)
        return _shared(query, key, value, prefix_layout, *args, **kwargs), None

    attention.reads_prefix_layout = True  # type: ignore[attr-defined]
    return attention


def _shared(query: Tensor, key: Tensor, value: Tensor, layout: PrefixLayout, *,
            scaling: float | None = None, dropout: float = 0.0, **kwargs: Any) -> Tensor:
    """`prefix_attention` of one layer, token-major as transformers wants it."""  # [1, L, Hq, D]
    if dropout:
        raise ValueError(f"shared_prefix: attention dropout is {dropout} in training, expected 0: "
                         "responses that share a prompt would share its dropped keys; use "
                         "model.eval() or set it to 0 in the config")
    for name in ("sliding_window", "softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"shared_prefix: the model's attention wants {name}, expected full "
                             "attention with plain softmax")
    return prefix_attention(query, key, value, layout, scale=scaling).transpose(1, 2)
