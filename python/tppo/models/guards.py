"""What stops a training before it does harm: losses, gradients and weights that are not finite.

The checks of a step read one number from the device, however many tensors they look at.  Of several
processes they see the same figures in each, so that all of them stop or none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class GuardError(RuntimeError):
    """A check of a training did not hold: to go on would do harm."""


def check_step(
    when: str,
    models: Mapping[str, nn.Module],
    losses: Mapping[str, Any],
    norms: Mapping[str, Tensor],
    remedy: str,
) -> list[float]:
    """The losses as numbers, before the optimiser's step.

    norms: the norm of the gradient of each of the models, by the same names.
    Errors: GuardError where one of either is not finite, naming step, model and parameter.
    """
    figures, bad = not_finite(when, models, losses, norms)
    if bad:
        raise GuardError(
            f"{bad}. Stopped before the optimiser's step, which would have spoilt the weights; "
            f"{remedy}"
        )
    return figures[: len(losses)]


def not_finite(
    when: str,
    models: Mapping[str, nn.Module],
    losses: Mapping[str, Any],
    norms: Mapping[str, Tensor],
) -> tuple[list[float], str]:
    """Losses and norms as numbers, and what is not finite of them, "" where nothing is."""
    device = next(iter(norms.values())).device
    tensors = [torch.as_tensor(x).detach().to(device, torch.float32)
               for x in (*losses.values(), *norms.values())]  # fmt: skip
    figures = torch.stack(tensors).tolist()
    names = [*losses, *(f"gradient norm of the {name}" for name in norms)]
    bad = [f"{name} is {x}" for name, x in zip(names, figures, strict=True) if not math.isfinite(x)]
    return figures, f"{when}: {', '.join(bad)}{_culprit(models)}" if bad else ""


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that an optimiser may change."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def check_weights(when: str, models: Mapping[str, nn.Module], *, trained: bool = False) -> None:
    """The weights are finite; trained: only those that are not frozen are looked at.

    Errors: GuardError naming the model, and the first parameter that is not.
    """
    norms = {}
    for name, model in models.items():
        weights = trainable(model) if trained else model.parameters()
        norms[name] = torch.nn.utils.get_total_norm([p.detach() for p in weights])
    figures = torch.stack([norm.float() for norm in norms.values()]).tolist()
    for name, norm in zip(norms, figures, strict=True):
        if not math.isfinite(norm):
            raise GuardError(
                f"{when}: the norm of the {name}'s weights is {norm}{_culprit(models)}; they are "
                "not saved"
            )


def check_figures(when: str, figures: Mapping[str, Tensor]) -> None:
    """What the models made of the responses is finite.

    Errors: GuardError naming what is not.
    """
    finite = torch.stack([x.isfinite().all() for x in figures.values()]).tolist()
    bad = [name for name, good in zip(figures, finite, strict=True) if not good]
    if bad:
        raise GuardError(
            f"{when}: not finite: {', '.join(bad)}, before the update, which would have spoilt the "
            "weights"
        )


def _culprit(models: Mapping[str, nn.Module]) -> str:
    """The first weight, else the first gradient, that is not finite; read after a failure alone."""
    for kind in ("weight", "gradient"):
        for name, model in models.items():
            for parameter, value in model.named_parameters():
                tensor = value if kind == "weight" else value.grad
                if tensor is not None and not tensor.isfinite().all():
                    return f" (the {name}'s {kind} {parameter!r} is not finite)"
    return ""
