"""NeMo-RL: its GAE on our operator, a lambda for each sequence included.

NeMo-RL is installed from its repository, not from the index: what is said here is held by tests
against a stand-in of the same signature and formula, and the interface of a real one is probed.

`patch()` replaces `GeneralizedAdvantageEstimator._compute_gae`, which runs in the driver: call it
in the script that starts the training. Masked tokens are no steps there as here; what stands at
masked slots of the results is 0 here and the carried advantage there, which NeMo-RL masks before
it uses it. A mask that weights (other values than 0 and 1) is left to NeMo-RL's own function.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

import tppo_kernels as tk

from . import _peer
from ._peer import Part, Replacements
from ._tensors import alike, floats, mask_of

VERSIONS = _peer.PEERS["nemo_rl"].versions
_GAE = ("nemo_rl.algorithms.advantage_estimator:"
        "GeneralizedAdvantageEstimator._compute_gae")
_INTERFACE: dict[str, str | None] = {
    _GAE: "self, token_level_rewards, values, mask, gae_lambda"}
_swap = Replacements("nemo_rl")


def compute_gae(self: Any, token_level_rewards: Tensor, values: Tensor, mask: Tensor,
                gae_lambda: Tensor | float | None = None) -> tuple[Tensor, Tensor]:
    """Advantages and returns [B, T] by `tk.gae`; gae_lambda: a number, [B], or the estimator's."""
    ours = floats(token_level_rewards, values) and alike(token_level_rewards, values, mask)
    valid = mask_of(mask) if ours else None
    if valid is None:
        return _swap.original(_GAE)(self, token_level_rewards, values, mask, gae_lambda)
    found = tk.gae(token_level_rewards.detach(), values.detach(), valid, gamma=self.gae_gamma,
                   lam=self.gae_lambda if gae_lambda is None else gae_lambda)
    return found.advantages, found.returns


_PART = Part(_swap, _INTERFACE, {_GAE: compute_gae},
             "GeneralizedAdvantageEstimator._compute_gae is ours, with NeMo-RL's numbers")


def patch() -> None:
    """Puts our GAE in the place of NeMo-RL's, in this process, and says so on one line. Twice is
    once. Raises PeerError where NeMo-RL is absent, outside `VERSIONS`, or has another interface."""
    _peer.patch_parts(VERSIONS, _PART, distribution="nemo-rl")


def probe() -> str:
    """NeMo-RL's version, where it has every name that this file needs; raises PeerError."""
    return _peer.probe_parts(VERSIONS, _PART, distribution="nemo-rl")


def unpatch() -> None:
    """Puts NeMo-RL's own function back; says so where another library has replaced it since."""
    _peer.unpatch_parts(_PART)
