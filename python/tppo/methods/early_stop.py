"""Training that stops one epoch past its best."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from tppo.models.policy import load_trained, snapshot


def train_to_best(
    model: nn.Module, epochs: int, train: Callable[[int], None], loss: Callable[[], float]
) -> list[float]:
    """Train until the held-out loss has not fallen in an epoch; the model keeps its best weights.

    train: trains one epoch, of the number that it is given, from 1.  loss: the held-out loss of the
    model as it is.  Returns the held-out losses, the first before any training, so that the best
    weights are those of epoch `losses.index(min(losses))`, which may be 0.
    """
    losses, best = [loss()], snapshot(model)
    for epoch in range(1, epochs + 1):
        train(epoch)
        losses.append(loss())
        if not losses[-1] < min(losses[:-1]):
            break
        best = snapshot(model, best)
    load_trained(model, best)
    return losses
