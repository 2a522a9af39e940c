"""Training that stops one epoch past its best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from tppo.models.policy import load_trained, snapshot


@dataclass
class Best:
    """How far a training is: its held-out losses, the first before it, and the best weights."""

    losses: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


def train_to_best(
    model: nn.Module,
    epochs: int,
    train: Callable[[int], None],
    loss: Callable[[], float],
    best: Best | None = None,
) -> list[float]:
    """Train until the held-out loss has not fallen in an epoch; the model keeps its best weights.

    train: trains one epoch, of the number that it is given, from 1.  loss: the held-out loss of the
    model as it is.  best: of a training that goes on, in the epoch that it has no loss of yet.
    Returns the held-out losses, the first before any training, so that the best weights are those
    of epoch `losses.index(min(losses))`, which may be 0.
    """
    best = Best() if best is None else best
    losses = best.losses
    if not losses:
        losses.append(loss())
        best.weights = snapshot(model)
    for epoch in range(len(losses), epochs + 1):
        train(epoch)
        losses.append(loss())
        if not losses[-1] < min(losses[:-1]):
            break
        best.weights = snapshot(model, best.weights)
    load_trained(model, best.weights)
    return losses
