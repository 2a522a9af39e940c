"""AdamW whose parameters may have 16 bits: no update is lost that float32 would keep."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

HYPER = {"params", "lr", "betas", "eps", "weight_decay"}


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW`; a parameter of 16 bits is the rounded copy of a weight in float32.

        m = beta1 * m + (1 - beta1) * g        g: the gradient, read as float32
        v = beta2 * v + (1 - beta2) * g^2
        w = (1 - lr * weight_decay) * w - lr * m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)
        parameter = w, rounded

    m, v and w are in float32.  In bfloat16 alone a step of less than about .2 % of a weight changes
    nothing, however often it is taken; here steps add up in w until they do.  With the parameter
    and its gradient that makes 16 bytes a parameter, as training in float32 takes.  Parameters in
    float32 take torch's own step, to the bit.
    """

    def __init__(self, params: Iterable[Any], lr: float, weight_decay: float = 0.0):
        self._rounded: dict[Tensor, Tensor] = {}  # weight in float32 -> the model's parameter
        super().__init__(params, lr=lr, weight_decay=weight_decay)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Parameters of 16 bits are replaced by weights in float32, which the state is kept for."""
        held = [self._held(parameter) for parameter in param_group["params"]]
        super().add_param_group({**param_group, "params": held})

    def _held(self, parameter: Tensor) -> Tensor:
        if parameter.dtype.itemsize > 2:
            return parameter
        weight = parameter.detach().float()
        self._rounded[weight] = parameter
        return weight

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Gradients of the model's own parameters go."""
        super().zero_grad(set_to_none)
        for parameter in self._rounded.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step; the weights in float32 have no gradients, so torch's step leaves them."""
        loss = super().step(closure)
        for group in self.param_groups:
            for weight in group["params"]:
                parameter = self._rounded.get(weight)
                if parameter is not None and parameter.grad is not None:
                    _step(weight, parameter.grad.float(), self.state[weight], group)
                    parameter.copy_(weight)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As torch's; the weights in float32 are in it where there are any."""
        found = super().state_dict()
        return found | {"weights": list(self._rounded)} if self._rounded else found

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Errors: ValueError where the state is that of other parameters."""
        kept = state_dict.get("weights", [])
        if len(kept) != len(self._rounded):
            raise ValueError(
                f"the optimiser's state has {len(kept)} weights beside parameters of 16 bits, "
                f"expected {len(self._rounded)}; was it saved with another --model.dtype or device?"
            )
        self._check(state_dict)
        shapes = [None if not isinstance(x, Tensor) else x.shape for x in kept]
        if shapes != [x.shape for x in self._rounded]:
            raise ValueError("the optimiser's state has other weights beside parameters of 16 bits")
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "weights"})
        for weight, saved in zip(self._rounded, kept, strict=True):
            weight.copy_(saved)

    def _check(self, given: dict[str, Any]) -> None:
        """Errors: ValueError, for what torch would only meet in a step, or not at all."""
        groups, states = given.get("param_groups"), given.get("state")
        own = [group["params"] for group in super().state_dict()["param_groups"]]
        if (
            not isinstance(groups, list)
            or not isinstance(states, dict)
            or not all(isinstance(group, dict) and HYPER <= group.keys() for group in groups)
            or [group["params"] for group in groups] != own
            or not {*states} <= {number for numbers in own for number in numbers}
        ):
            raise ValueError("the optimiser's state is not that of this model's parameters")
        shapes = [tuple(x.shape) for group in self.param_groups for x in group["params"]]
        for number, entry in states.items():
            wanted = {"step": (), "exp_avg": shapes[number], "exp_avg_sq": shapes[number]}
            if not isinstance(entry, dict) or wanted != {
                name: tuple(x.shape) if isinstance(x, Tensor) else x for name, x in entry.items()
            }:
                raise ValueError(f"the optimiser's state of parameter {number} has other entries, "
                                 f"or other shapes, than {wanted}")  # fmt: skip


def _step(weight: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """One step of one weight, in place."""
    if not state:
        state["step"] = torch.tensor(0.0)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
    state["step"] += 1
    count, lr, (beta1, beta2) = state["step"].item(), group["lr"], group["betas"]
    mean = state["exp_avg"].lerp_(gradient, 1 - beta1)
    square = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    spread = square.div(1 - beta2**count).sqrt_().add_(group["eps"])
    weight.mul_(1 - lr * group["weight_decay"])
    weight.addcdiv_(mean, spread, value=-lr / (1 - beta1**count))
