"""OpenRLHF 0.11: its GAE, policy loss, value loss and log-probs on our operators.

OpenRLHF has no place to register these, and runs them in processes of Ray: `patch()` replaces them
in one process, and `HOOK` is what Ray calls in each new one, of a driver that begins with

    ray.init(runtime_env={"worker_process_setup_hook": tppo_kernels.integrations.openrlhf.HOOK})

What is replaced: `RemoteExperienceMaker.get_advantages_and_returns`, `PolicyLoss.forward` and
`ValueLoss.forward` (the classes stay OpenRLHF's), `log_probs_from_logits`. Kept as they are there:

- A masked token inside an answer (of a tool) is a step of value and reward 0, which is discounted
  over; in `tk.gae` it is no step.
- The counts of the whole batch divide, the number of data-parallel ranks multiplies, whatever
  they are; `ppo_kl` is of the log-ratio as it is, the ratio of the one clamped at 20.
- A temperature other than 1 divides the caller's logits in place.

Ours give 0 for a batch without a valid token, where OpenRLHF divides 0 by 0; a NaN behind the mask
is never read, which OpenRLHF multiplies by 0; and results of half precision are fp32. GSPO, and the
correction of the mismatch to vLLM's log-probs, are left to OpenRLHF's own code, and so are a loss
without a mask or with one of other values than 0 and 1, tensors that broadcast, and a gradient with
respect to what is data (advantages, old log-probs and values, returns).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import tppo_kernels as tk

from . import _peer
from ._peer import Part, Replacements
from ._tensors import alike, differentiated, floats, has_gap, mask_of, plain

VERSIONS = _peer.PEERS["openrlhf"].versions
HOOK = "tppo_kernels.integrations.openrlhf.patch_when_imported"
_MAKER = "openrlhf.trainer.ppo_utils.experience_maker"
_GAE = f"{_MAKER}:RemoteExperienceMaker.get_advantages_and_returns"
_POLICY = "openrlhf.models.loss:PolicyLoss.forward"
_VALUE = "openrlhf.models.loss:ValueLoss.forward"
_LOGPROBS = "openrlhf.models.utils:log_probs_from_logits"
_BATCH = "dp_size, batch_num_tokens, global_batch_size"
_MODELS_INTERFACE: dict[str, str | None] = {
    _POLICY: "self, log_probs, old_log_probs, advantages, action_mask, rollout_log_probs, "
             f"{_BATCH}",
    _VALUE: f"self, values, old_values, returns, action_mask, {_BATCH}",
    _LOGPROBS: "logits, labels, temperature",
}
_MAKER_INTERFACE: dict[str, str | None] = {_GAE: "self, values, rewards, action_mask, gamma, lambd"}
_models, _maker = Replacements("openrlhf"), Replacements("openrlhf")


@torch.no_grad()
def get_advantages_and_returns(self: Any, values: Tensor, rewards: Tensor,
                               action_mask: Tensor | None, gamma: float, lambd: float
                               ) -> tuple[Tensor, Tensor]:
    """Advantages and returns [B, T] by `tk.gae`, over every slot: masked ones are zeros there."""
    given = (values, rewards) if action_mask is None else (values, rewards, action_mask)
    ours = floats(values, rewards) and alike(*given)
    mask = mask_of(action_mask) if ours and action_mask is not None else None
    if not ours or (mask is None and action_mask is not None):
        return _maker.original(_GAE)(self, values, rewards, action_mask, gamma, lambd)
    if mask is not None and has_gap(mask):
        # Something valid stands behind a masked slot, which is a step there. Behind the last valid
        # one there is nothing to carry, and steps of zeros are no steps.
        values, rewards, mask = (*(torch.where(mask, x, 0) for x in (values, rewards)), None)
    return tuple(tk.gae(rewards, values, mask, gamma=gamma,  # type: ignore[return-value]
                        lam=lambd))


def _reduction(token_level: bool, dp_size: int = 1, batch_num_tokens: Any = None,
               global_batch_size: Any = None) -> tuple[dict[str, Any], Any]:
    """Our keywords, and the count that divides the loss: it may be below 1, which ours is not."""
    count = batch_num_tokens if token_level else global_batch_size
    if count is None:
        return {"reduction": "token-mean" if token_level else "seq-mean-token-mean"}, None
    if token_level:
        return {"reduction": "token-sum"}, count
    return {"reduction": "seq-mean-token-mean", "num_sequences": 1}, count


def _scaled(loss: Tensor, count: Any, batch: dict[str, Any]) -> Tensor:
    """Divided by the batch's count, and multiplied by the number of data-parallel ranks."""
    return loss if count is None else loss / count * batch.get("dp_size", 1)


def policy_loss_forward(self: Any, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor,
                        action_mask: Tensor | None = None, rollout_log_probs: Tensor | None = None,
                        *counts: Any, **batch: Any) -> tuple[Any, ...]:
    """`PolicyLoss.forward` by `tk.ppo_loss`: loss, clip ratio, KL, and None for the two figures
    of a correction that is off."""
    batch |= zip(_BATCH.split(", "), counts, strict=False)
    data = (old_log_probs, advantages)
    ours = (action_mask is not None and self.policy_loss_type == "ppo"
            and self.is_correction_level == "off" and floats(log_probs, *data)
            and alike(action_mask, log_probs, *data) and not differentiated(*data))
    mask = mask_of(action_mask) if ours and action_mask is not None else None
    if mask is None:
        return _models.original(_POLICY)(self, log_probs, old_log_probs, advantages, action_mask,
                                         rollout_log_probs, **batch)
    given, count = _reduction(self.token_level_loss, **batch)
    loss, metrics = tk.ppo_loss(log_probs, old_log_probs, advantages, mask,
                                clip_low=self.clip_eps_low, clip_high=self.clip_eps_high,
                                dual_clip=self.dual_clip, **given)
    gap = torch.where(mask, old_log_probs - log_probs.detach(), 0)
    kl = gap.sum() / metrics.tokens.clamp(min=1)
    return _scaled(loss, count, batch), metrics.clip_fraction, kl, None, None


def value_loss_forward(self: Any, values: Tensor, old_values: Tensor, returns: Tensor,
                       action_mask: Tensor | None = None, *counts: Any, **batch: Any) -> Tensor:
    """`ValueLoss.forward` by `tk.value_loss`."""
    batch |= zip(_BATCH.split(", "), counts, strict=False)
    data = (old_values, returns)
    ours = (action_mask is not None and floats(values, *data)
            and alike(action_mask, values, *data) and not differentiated(*data))
    mask = mask_of(action_mask) if ours and action_mask is not None else None
    if mask is None:
        return _models.original(_VALUE)(self, values, old_values, returns, action_mask, **batch)
    given, count = _reduction(self.token_level_loss, **batch)
    loss = tk.value_loss(values, returns, mask, old_values=old_values, clip=self.clip_eps,
                         **given).loss
    return _scaled(loss, count, batch)


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """fp32 log-probs of the labels by `tk.token_logprobs`; divides the logits in place, as
    OpenRLHF does, where the temperature is not 1."""
    if not floats(logits) or not plain(labels) or labels.shape != logits.shape[:-1]:
        return _models.original(_LOGPROBS)(logits, labels, temperature)
    if temperature != 1.0:
        logits.div_(temperature)
    return tk.token_logprobs(logits, labels).logprobs


_PARTS = {
    "openrlhf.models.loss": Part(
        _models, _MODELS_INTERFACE,
        {_POLICY: policy_loss_forward, _VALUE: value_loss_forward,
         _LOGPROBS: log_probs_from_logits},
        "PolicyLoss, ValueLoss and log_probs_from_logits are ours, with OpenRLHF's numbers"),
    _MAKER: Part(_maker, _MAKER_INTERFACE, {_GAE: get_advantages_and_returns},
                 "get_advantages_and_returns is ours, with OpenRLHF's numbers"),
}


def patch() -> None:
    """Puts our functions in the place of OpenRLHF's, in this process, and says so on two lines.
    Twice is once. Raises PeerError where OpenRLHF is absent, of a version outside `VERSIONS`, or
    has another interface.
    """
    _peer.patch_parts(VERSIONS, *_PARTS.values())


def probe() -> str:
    """OpenRLHF's version, where it has every name that this file needs; raises PeerError."""
    return _peer.probe_parts(VERSIONS, *_PARTS.values())


def unpatch() -> None:
    """Puts OpenRLHF's own functions back; says which ones another library has replaced since."""
    _peer.unpatch_parts(*_PARTS.values())


def patch_when_imported() -> None:
    """For a process that Ray starts: patches each part of OpenRLHF once it is imported there. An
    OpenRLHF that we do not know is told and kept."""
    _peer.patch_when_imported(VERSIONS, _PARTS)
