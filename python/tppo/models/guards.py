"""What stops a training before it does harm: checks before the first step, and at every step.

The checks of a step read one number from the device, however many tensors they look at.  Of several
processes they see the same figures in each, so that all of them stop or none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tppo.models.batch import Batch
from tppo.models.policy import policy_logprobs
from tppo.progress import say

if TYPE_CHECKING:
    from tppo.methods.ppo import Experience, Models

MAX_RATIO_DRIFT = 1e-4  # of the first minibatch of the first step, in fp32
MAX_PREFIX_ERROR = 1e-4  # of shared against dense, of the largest value, in fp32


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
    device = next(iter(norms.values())).device
    tensors = [torch.as_tensor(x).detach().to(device, torch.float32)
               for x in (*losses.values(), *norms.values())]  # fmt: skip
    figures = torch.stack(tensors).tolist()
    names = [*losses, *(f"gradient norm of the {name}" for name in norms)]
    bad = [f"{name} is {x}" for name, x in zip(names, figures, strict=True) if not math.isfinite(x)]
    if bad:
        raise GuardError(
            f"{when}: {', '.join(bad)}{_culprit(models)}. Stopped before the optimiser's step, "
            f"which would have spoilt the weights; {remedy}"
        )
    return figures[: len(losses)]


def check_weights(when: str, models: Mapping[str, nn.Module]) -> None:
    """The weights are finite.

    Errors: GuardError naming the model, and the first parameter that is not.
    """
    norms = {
        name: torch.nn.utils.get_total_norm([p.detach() for p in model.parameters()])
        for name, model in models.items()
    }
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
            f"{when}: not finite: {', '.join(bad)}. Stopped before the update, which would have "
            "spoilt the weights"
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


def check_step_zero_ratio(logprobs: Tensor, old: Tensor, mask: Tensor) -> None:
    """Before the first update new and old log-probs are those of one model.

    Errors: GuardError where max|ratio - 1| >= 1e-4: dropout, a second temperature or a mask that
    differs between the two passes.
    """
    ratio = torch.where(mask, logprobs.detach() - old, 0.0).exp()  # [B, T]
    drift = (ratio - 1).abs().max().item()
    if not drift < MAX_RATIO_DRIFT:
        raise GuardError(f"step 0: max|ratio - 1| is {drift:.1e}, expected < {MAX_RATIO_DRIFT:.0e}")


def check_shared_prefix(models: Models, batch: Batch, temperature: float) -> None:
    """A shared prompt gives what dense prompts give: states of every model, and gradients.

    Compared by the largest error over the largest value: log-probs, values, class logits, and the
    gradients of policy and critic of the sums of log-probs and of values.
    Errors: GuardError naming the first of them that is off by 1e-4 or more.
    """
    results = []
    for way in (batch, batch.dense()):
        logprobs, _ = policy_logprobs(models.policy, way, temperature)  # [B, T]
        values, _ = models.critic(way)  # [B, T]
        found = {"log-probs": logprobs, "values": values}
        with torch.no_grad():
            found["class logits"] = models.reward(way)  # [B, T, 3]
        for name, model, output in (
            ("policy", models.policy, logprobs),
            ("critic", models.critic, values),
        ):
            parameters = [p for p in model.parameters() if p.requires_grad]
            gradients = torch.autograd.grad(output.sum(), parameters, allow_unused=True)
            kept = [g.flatten() for g in gradients if g is not None]
            found[f"{name}'s gradients"] = torch.cat(kept)
        results.append({name: tensor.detach() for name, tensor in found.items()})
    shared, dense = results
    for name, expected in dense.items():
        error = (shared[name] - expected).abs().max().item()
        error /= max(expected.abs().max().item(), torch.finfo(expected.dtype).tiny)
        if not error < MAX_PREFIX_ERROR:
            raise GuardError(
                f"step 0: {name} with a shared prefix differ from dense ones by {error:.1e} of the "
                f"largest, expected < {MAX_PREFIX_ERROR:.0e}; --prefix dense goes on without it"
            )
    say("step 0: the shared prefix agrees with dense prompts, forward and backward")


def check_gradients(models: Models, data: Experience) -> None:
    """Before the first update the policy and the critic's head have gradients.

    Errors: GuardError naming the model whose gradients are all zero or not finite.  Where the
    reward model rates all tokens alike there is nothing to learn from: only a warning.
    """
    if not data.advantages.any():
        say("WARNING: step 0: every advantage is zero, the reward model rates all tokens alike")
        return
    for name, model in (("policy", models.policy), ("critic", models.critic)):
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if not any(bool(g.any()) for g in gradients):
            raise GuardError(f"step 0: every gradient of the {name} is zero: is it frozen?")
        if not all(bool(g.isfinite().all()) for g in gradients):
            raise GuardError(f"step 0: a gradient of the {name} is not finite")
