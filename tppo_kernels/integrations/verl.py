"""verl 0.9: its PPO functions on our operators, dense token rewards, and a policy loss "tppo".

verl loads this by itself: the entry point of the group `verl.plugins` runs in each of its processes
and says on one line what it has put in place. `VERL_USE_EXTERNAL_PLUGINS=none` keeps it out. In a
script, `patch()` does the same and `unpatch()` puts verl's own functions back.

What is replaced, and what stays as verl has it:

- `compute_gae_advantage_return` (adv_estimator=gae): whitened with n - 1; fewer than two valid
  tokens raise verl's own errors.
- `compute_policy_loss_vanilla` and `compute_value_loss`: clip_ratio, clip_ratio_low/high,
  clip_ratio_c, loss_agg_mode, cliprange_value and the counts of the whole batch keep their names
  and meanings, the metrics their names and values.
- `agg_loss` with its modes, and of `kl_penalty` k3 (low_var_kl), clamped at 10 as there.
- `masked_whiten`, `logprobs_from_logits`, `entropy_from_logits` and its chunked form, and
  `FusedLinearForPPO`.
- `RewardManagerBase.assemble_rm_scores`: a reward manager may give a number a token of the response
  instead of one number a response.
- `loss_mode=tppo`: the loss of "vanilla" with more metrics.

Numbers differ at slots that the mask leaves out, which are 0 here and whatever was computed there
in verl; where verl gives NaN because no token of a micro-batch is valid, or because a masked slot
holds one (both 0 or ignored here); in whitening of values that are all alike (0 here, rounding
noise times 10^4 there); in the entropy of a row with a logit of -inf (NaN there); and in half
precision, in which verl computes and rounds: results are fp32 here, log-probs and entropies too.
What is none of ours is left to verl's own functions: a mask of other values than 0 and 1, tensors
that broadcast or are not of floats, a gradient that whitening, advantages, old log-probs, weights
or returns are asked for, a temperature per row of the fused head, and on a CPU what is so small
that calling an operator takes longer (`CPU_ELEMENTS`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import tppo_kernels as tk

from . import _peer
from ._peer import Part, Replacements
from ._tensors import alike, differentiated, floats, mask_of, plain

VERSIONS = _peer.PEERS["verl"].versions
_ALGOS = "verl.trainer.ppo.core_algos"
_TORCH = "verl.utils.torch_functional"
_FUSED = "verl.utils.experimental.torch_functional:FusedLinearForPPO.forward"
_MANAGER = "verl.experimental.reward_loop.reward_manager.base"
_SCORES = f"{_MANAGER}:RewardManagerBase.assemble_rm_scores"
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean",
         "seq-mean-token-sum-norm")
_BATCH = "dp_size, batch_num_tokens, global_batch_size, loss_scale_factor"
_INTERFACE: dict[str, str | None] = {
    f"{_ALGOS}:compute_gae_advantage_return":
        "token_level_rewards, values, response_mask, gamma, lam",
    f"{_ALGOS}:compute_policy_loss_vanilla":
        "old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, "
        "rollout_is_weights",
    f"{_ALGOS}:compute_value_loss":
        f"vpreds, returns, values, response_mask, cliprange_value, loss_agg_mode, {_BATCH}",
    f"{_ALGOS}:agg_loss": f"loss_mat, loss_mask, loss_agg_mode, {_BATCH}",
    f"{_ALGOS}:kl_penalty": "logprob, ref_logprob, kl_penalty",
    f"{_ALGOS}:POLICY_LOSS_REGISTRY[vanilla]": None,
    f"{_ALGOS}:ADV_ESTIMATOR_REGISTRY[gae]": None,
    f"{_TORCH}:masked_whiten": "values, mask, shift_mean",
    f"{_TORCH}:logprobs_from_logits": "logits, labels, inplace_backward",
    f"{_TORCH}:entropy_from_logits": "logits",
    f"{_TORCH}:entropy_from_logits_with_chunking": "logits, chunk_size",
    f"{_TORCH}:FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE": None,
    _FUSED: "self, hidden_states, vocab_weights, input_ids, temperature",
}
_algorithms, _rewards = Replacements("verl"), Replacements("verl")
# Below so many elements on a CPU, the call of an operator takes longer than what verl computes.
CPU_ELEMENTS = {"agg_loss": 2**14, "kl_penalty": 2**13, "fused_linear_forward": 2**18}


def _theirs(name: str) -> Callable[..., Any]:
    """verl's own function, which ours calls for what is not ours to answer."""
    return _algorithms.original(name)


def _reduction(mode: str, mask: Tensor, batch: Mapping[str, Any]
               ) -> tuple[dict[str, Any], list[Any], Any] | None:
    """Our keywords of a loss_agg_mode, and what divides the loss and multiplies it afterwards; None
    where verl raises.

    verl divides by counts of the whole batch, and multiplies by the number of data-parallel ranks
    because those average gradients. Ours divides by at least 1, verl by any number: what may be
    below 1 divides the result.
    """
    factor = batch.get("dp_size") or 1
    given: dict[str, Any] = {"reduction": mode}
    if mode == "token-sum":
        return given, [], factor
    name, count = (("num_tokens", batch.get("batch_num_tokens")) if mode == "token-mean" else
                   ("num_sequences", batch.get("global_batch_size")))
    if mode not in MODES or (count is None and factor > 1):
        return None
    divisors = []
    if mode == "seq-mean-token-sum-norm":
        scale = batch.get("loss_scale_factor")
        given["reduction"] = "seq-mean-token-sum"
        divisors.append(max(mask.shape[-1], 1) if scale is None else scale)
    if isinstance(count, int) and count >= 1:
        given[name] = count
    elif count is not None:
        divisors.append(count)
        given |= {"reduction": "token-sum"} if mode == "token-mean" else {"num_sequences": 1}
    return given, divisors, factor


def _scaled(loss: Tensor, divisors: Sequence[Any], factor: Any) -> Tensor:
    for divisor in divisors:
        loss = loss / divisor
    return loss if isinstance(factor, int) and factor == 1 else loss * factor


def _small(function: str, x: Tensor, elements: int) -> bool:
    return elements < CPU_ELEMENTS[function] and not x.is_cuda


def compute_gae_advantage_return(token_level_rewards: Tensor, values: Tensor, response_mask: Tensor,
                                 gamma: Any, lam: Any) -> tuple[Tensor, Tensor]:
    """Whitened advantages and returns, all [B, T], by `tk.token_advantages`; verl's signature."""
    given = (token_level_rewards, values)
    mask = mask_of(response_mask) if floats(*given) and alike(response_mask, *given) else None
    if mask is None or int(mask.sum()) < 2:
        return _theirs(f"{_ALGOS}:compute_gae_advantage_return")(
            token_level_rewards, values, response_mask, gamma, lam)
    found = tk.token_advantages(token_level_rewards.detach(), values.detach(), mask, gamma=gamma,
                                lam=lam)
    return found.advantages, found.returns


def _policy_loss(old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor,
                 loss_agg_mode: str, config: Any, rollout_is_weights: Tensor | None
                 ) -> tuple[Tensor, Any] | None:
    """The loss and our metrics, None where it is verl that must answer."""
    get, batch = getattr(config, "get", None), getattr(config, "global_batch_info", None)
    if (get is None or batch is None or not floats(old_log_prob, log_prob, advantages)
            or not alike(response_mask, old_log_prob, log_prob)
            or advantages.shape not in (log_prob.shape, (len(log_prob), 1))):
        return None
    mask = mask_of(response_mask)
    over = None if mask is None else _reduction(loss_agg_mode, mask, batch)
    dual = get("clip_ratio_c", 3.0)
    if over is None or dual <= 1:
        return None
    low, high = config.clip_ratio_low, config.clip_ratio_high
    loss, metrics = tk.ppo_loss(
        log_prob, old_log_prob, advantages, mask, weights=rollout_is_weights, dual_clip=dual,
        clip_low=config.clip_ratio if low is None else low,
        clip_high=config.clip_ratio if high is None else high, **over[0])
    return _scaled(loss, *over[1:]), metrics


def compute_policy_loss_vanilla(
        old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor,
        loss_agg_mode: str = "token-mean", config: Any = None,
        rollout_is_weights: Tensor | None = None) -> tuple[Tensor, dict[str, Any]]:
    """The clipped policy loss with dual clip, and verl's three metrics, by `tk.ppo_loss`."""
    given = (old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config,
             rollout_is_weights)
    data = (old_log_prob, advantages, rollout_is_weights)
    found = None if differentiated(*data) else _policy_loss(*given)
    if found is None:
        return _theirs(f"{_ALGOS}:compute_policy_loss_vanilla")(*given)
    loss, m = found
    names = ("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower")
    read = torch.stack((m.clip_fraction, m.approx_kl_k1, m.clip_fraction_dual)).tolist()
    return loss, dict(zip(names, read, strict=True))


def tppo_policy_loss(
        old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor,
        loss_agg_mode: str = "token-mean", config: Any = None,
        rollout_is_weights: Tensor | None = None) -> tuple[Tensor, dict[str, Any]]:
    """`loss_mode=tppo`: the loss of "vanilla", and of the ratio what shows that an update is too
    large: how often each side clipped, its mean and maximum, how often the log-ratio was clamped.

    Raises ValueError where the configuration or the mask is none that the loss knows.
    """
    found = _policy_loss(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config,
                         rollout_is_weights)
    if found is None:
        raise ValueError(
            f"tppo: loss_agg_mode is {loss_agg_mode!r} with config {type(config).__name__} and a "
            f"mask of {response_mask.dtype}, expected one of {', '.join(MODES)}, verl's "
            "ActorConfig with clip_ratio_c above 1 and the counts of the whole batch where "
            "dp_size is above 1, and a mask of 0 and 1")
    loss, m = found
    return loss, {name: value for name, value in zip(
        ("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower", "actor/pg_clipfrac_low",
         "actor/pg_clipfrac_high", "actor/ppo_kl_k3", "actor/ratio_mean", "actor/ratio_max",
         "actor/log_ratio_clamped"),
        torch.stack((m.clip_fraction, m.approx_kl_k1, m.clip_fraction_dual, m.clip_fraction_low,
                     m.clip_fraction_high, m.approx_kl_k3, m.ratio_mean, m.ratio_max,
                     m.clamped_fraction)).tolist(), strict=True)}


def compute_value_loss(
        vpreds: Tensor, returns: Tensor, values: Tensor, response_mask: Tensor,
        cliprange_value: float, loss_agg_mode: str = "token-mean", *counts: Any, **batch: Any
        ) -> tuple[Tensor, Tensor]:
    """The clipped critic loss and the clipped fraction, by `tk.value_loss`; batch: dp_size and
    the counts of the whole batch."""
    batch |= zip(_BATCH.split(", "), counts, strict=False)
    given = (vpreds, returns, values)
    ours = floats(*given) and alike(response_mask, *given) and not differentiated(returns, values)
    mask = mask_of(response_mask) if ours else None
    over = None if mask is None else _reduction(loss_agg_mode, mask, batch)
    if over is None:
        return _theirs(f"{_ALGOS}:compute_value_loss")(
            vpreds, returns, values, response_mask, cliprange_value, loss_agg_mode, **batch)
    loss, metrics = tk.value_loss(vpreds, returns, mask, old_values=values, clip=cliprange_value,
                                  **over[0])
    return _scaled(loss, *over[1:]), metrics.clip_fraction


def agg_loss(loss_mat: Tensor, loss_mask: Tensor, loss_agg_mode: str, *counts: Any, **batch: Any
             ) -> Tensor:
    """One number from a loss a token by `tk.reduce`; batch: dp_size and the batch's counts.

    On a CPU of masks of bool, as verl's workers have them: others are converted first.
    """
    elements = loss_mat.numel() if loss_mask.dtype == torch.bool else 0
    if _small("agg_loss", loss_mat, elements):
        return _theirs(f"{_ALGOS}:agg_loss")(loss_mat, loss_mask, loss_agg_mode, *counts, **batch)
    batch |= zip(_BATCH.split(", "), counts, strict=False)
    mask = mask_of(loss_mask) if floats(loss_mat) and alike(loss_mat, loss_mask) else None
    over = None if mask is None else _reduction(loss_agg_mode, mask, batch)
    if over is None or loss_mat.dim() != 2:
        return _theirs(f"{_ALGOS}:agg_loss")(loss_mat, loss_mask, loss_agg_mode, **batch)
    return _scaled(tk.reduce(loss_mat, mask, **over[0]), *over[1:])


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """k3 by `tk.kl`. The others are verl's: of a log-ratio beyond 20 ours are those of 20."""
    if (kl_penalty in ("k3", "low_var_kl") and not _small("kl_penalty", logprob, logprob.numel())
            and floats(logprob, ref_logprob) and alike(logprob, ref_logprob)):
        return tk.kl(logprob, ref_logprob, estimator="k3", clamp=10.0)
    return _theirs(f"{_ALGOS}:kl_penalty")(logprob, ref_logprob, kl_penalty)


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """`tk.whiten` with n - 1; verl raises where fewer than two values are valid."""
    ours = floats(values) and plain(mask) and alike(values, mask) and not differentiated(values)
    valid = mask_of(mask) if ours else None
    if valid is None or int(valid.sum()) < 2:
        return _theirs(f"{_TORCH}:masked_whiten")(values, mask, shift_mean)
    return tk.whiten(values, valid, shift_mean=shift_mean)


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """fp32 log-probs of the labels, by `tk.token_logprobs`.

    Backward is in place where verl's is: with flash-attn. What still needs the logits then is
    autograd's error here, and a silently wrong gradient there.
    """
    if not floats(logits) or not plain(labels) or labels.shape != logits.shape[:-1]:
        return _theirs(f"{_TORCH}:logprobs_from_logits")(logits, labels, inplace_backward)
    flash = sys.modules[_TORCH].FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE  # spelled so in verl
    in_place = (inplace_backward and flash and logits.is_cuda and logits.is_contiguous()
                and os.environ.get("VERL_DISABLE_FLASH_ATTN_CE", "0") != "1"
                and not logits.is_leaf and not torch.compiler.is_compiling())
    return tk.token_logprobs(logits, labels, inplace_backward=in_place).logprobs


def entropy_from_logits(logits: Tensor) -> Tensor:
    """fp32 entropy of every row, from one read of the logits."""
    if not floats(logits):
        return _theirs(f"{_TORCH}:entropy_from_logits")(logits)
    unused = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return tk.token_logprobs(logits, unused).entropy


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """The same: it makes nothing of the logits' size, so there is nothing to cut into chunks."""
    return entropy_from_logits(logits)


def fused_linear_forward(self: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor,
                         temperature: Any = 1.0) -> tuple[Tensor, Tensor]:
    """`FusedLinearForPPO.forward` by `tk.linear_logprobs`: log-probs and entropy, fp32; under
    autocast of the product in the dtype that autocast would take."""
    scalar = not isinstance(temperature, Tensor) or temperature.dim() == 0
    if (self.impl_backend != "torch" or not scalar or not floats(hidden_states, vocab_weights)
            or input_ids.shape != hidden_states.shape[:-1]
            or _small("fused_linear_forward", hidden_states,
                      input_ids.numel() * len(vocab_weights))):
        return _theirs(_FUSED)(self, hidden_states, vocab_weights, input_ids, temperature)
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device) and hidden_states.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden_states, vocab_weights = hidden_states.to(dtype), vocab_weights.to(dtype)
    found = tk.linear_logprobs(hidden_states, vocab_weights, input_ids, temperature=temperature)
    return found.logprobs, found.entropy


def assemble_rm_scores(cls: type, data: Any, scores: Sequence[float | Sequence[float]]) -> Tensor:
    """Token rewards [B, T] of a batch, where a score may be a number for each response token.

    scores: for each sample a number, which stands at the last token of its response as in verl, or
    a sequence with one number for each token of its response, those of tools included. A reward at
    a token that the policy did not write goes to the token before it that it did write.
    """
    if ({float, int}.issuperset(map(type, scores))
            or not any(hasattr(x, "__len__") and getattr(x, "ndim", 1) for x in scores)):
        return _rewards.original(_SCORES).__get__(None, cls)(data, scores)
    responses = data.batch["responses"]
    start = data.batch["prompts"].size(1)
    written = data.batch["attention_mask"][:, start:].bool()
    rewards = torch.zeros(responses.shape, dtype=torch.float32, device=responses.device)
    for i, (score, length) in enumerate(zip(scores, written.sum(1).tolist(), strict=True)):
        given = torch.as_tensor(score, dtype=torch.float32, device=rewards.device)
        if given.dim() and given.shape != (length,):
            raise ValueError(f"assemble_rm_scores: sample {i} has rewards of shape "
                             f"{list(given.shape)}, expected a number, or one for each of the "
                             f"{length} tokens of its response")
        if given.dim():
            rewards[i, written[i]] = given
        elif length:
            rewards[i, written[i].nonzero()[-1]] = given
    mask = data.batch["response_mask"].bool() if "response_mask" in data.batch.keys() else written
    rewards[~mask.any(1)] = 0  # nothing of such a response is trained on
    return tk.place_rewards(mask, dense=rewards, on_masked="move_back").rewards


_OURS: dict[str, Any] = {
    f"{_ALGOS}:compute_gae_advantage_return": compute_gae_advantage_return,
    f"{_ALGOS}:ADV_ESTIMATOR_REGISTRY[gae]": compute_gae_advantage_return,
    f"{_ALGOS}:compute_policy_loss_vanilla": compute_policy_loss_vanilla,
    f"{_ALGOS}:POLICY_LOSS_REGISTRY[vanilla]": compute_policy_loss_vanilla,
    f"{_ALGOS}:POLICY_LOSS_REGISTRY[tppo]": tppo_policy_loss,
    f"{_ALGOS}:compute_value_loss": compute_value_loss,
    f"{_ALGOS}:agg_loss": agg_loss,
    f"{_ALGOS}:kl_penalty": kl_penalty,
    f"{_TORCH}:masked_whiten": masked_whiten,
    f"{_TORCH}:logprobs_from_logits": logprobs_from_logits,
    f"{_TORCH}:entropy_from_logits": entropy_from_logits,
    f"{_TORCH}:entropy_from_logits_with_chunking": entropy_from_logits_with_chunking,
    _FUSED: fused_linear_forward,
}


_PARTS = {
    _ALGOS: Part(_algorithms, _INTERFACE, _OURS,
                 "GAE, whitening, the policy loss, the value loss, agg_loss, k3, log-probs, "
                 "entropy and the fused head are ours, with verl's numbers; loss_mode=tppo is "
                 "there"),
    _MANAGER: Part(_rewards, {_SCORES: "cls, data, scores"},
                   {_SCORES: classmethod(assemble_rm_scores)},
                   "reward managers may give a number for each token of a response"),
}


def patch() -> None:
    """Puts our functions in the place of verl's, in this process, and says so on two lines.

    Call it after `import verl` and before anything is built from it. Twice is once. Raises
    PeerError where verl is absent, of a version outside `VERSIONS`, or has another interface.
    """
    _peer.patch_parts(VERSIONS, *_PARTS.values())


def probe() -> str:
    """verl's version, where it has every name that this file needs; raises PeerError."""
    return _peer.probe_parts(VERSIONS, *_PARTS.values())


def unpatch() -> None:
    """Puts verl's own functions back; says which ones another library has replaced since."""
    _peer.unpatch_parts(*_PARTS.values())


def patch_when_imported() -> None:
    """What the entry point calls: patches each module of verl once verl imports it. A verl that we
    do not know is told and kept."""
    _peer.patch_when_imported(VERSIONS, _PARTS)
