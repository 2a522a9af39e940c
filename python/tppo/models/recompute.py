"""Gradient checkpointing: a layer keeps its input for backward and computes the rest again there.

transformers' own switch acts only in training mode, in which dropout is on; this trainer's models
stay in evaluation mode, so it would do nothing.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


def recompute_layers(model: nn.Module) -> nn.Module:
    """The model, whose transformer layers keep only their inputs for backward from now on.

    Each layer's forward runs a second time in backward; values and gradients are the same bits.
    Without gradients (sampling, scoring) nothing changes.
    Errors: ValueError where the model has no layer of the kind that transformers can recompute.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"gradient_checkpointing is on, but {type(model).__name__} has no layers that can be "
            "computed again, expected a decoder of transformers; leave it off"
        )
    for layer in layers:
        kind: Any = type(layer)
        if not hasattr(layer, "recomputes"):  # not twice
            layer.__class__ = _recomputing(kind)
    return model


@cache
def _recomputing(kind: Any) -> Any:
    """A class of layers like `kind` that compute themselves again in backward.

    A class, because a forward that is set on a layer would hold the layer itself: the memory of a
    model that is no longer used would be free only when Python looks for such cycles.
    """

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = partial(kind.forward, self)
        if not torch.is_grad_enabled():
            return own(*args, **kwargs)
        return checkpoint(own, *args, use_reentrant=False, **kwargs)

    return type(kind.__name__, (kind,), {"forward": forward, "recomputes": True})
