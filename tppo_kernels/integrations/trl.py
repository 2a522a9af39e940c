"""TRL (1.12 to 1.16): its log-probs and entropy by our operators, and a GRPO trainer with rewards
at tokens.

`patch()` puts ours in place of four functions of TRL, wherever TRL has imported them, and
`unpatch()` puts TRL's back; `TokenGRPOTrainer` needs no patch.

    _ChunkedLogProbFunction      linear_logprobs: GRPO, DPO, KTO, SFT of 1.14 and later; 1.12's
                                 asynchronous GRPO
    selective_log_softmax        token_logprobs
    entropy_from_logits          entropy
    selective_log_softmax_and_entropy (1.14 and later)  token_logprobs, both by one read

The numbers stay TRL's: results have its dtype (on a CPU bf16 log-probs are rounded to bf16), and
1.12's chunked entropy has no gradient.  TRL's own function still runs where ours would do something
else: several targets a row, the statistics of SFT's metrics (log_sum_sq_probs, mean_logits,
is_top1), an output layer that ZeRO-3 has partitioned.  Three things differ, and
docs/integrations.md says which is right: a logit of -inf makes TRL's entropy NaN (p log p is 0
there), TRL's chunked function rounds the logits of bf16 states to bf16, and a target outside the
vocabulary is an error of ours where TRL's gives a log-prob without a target.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

import tppo_kernels as tk

from . import _peer

_UTILS, _GRPO = "trl.trainer.utils", "trl.trainer.grpo_trainer:GRPOTrainer"
VERSIONS = _peer.PEERS["trl"].versions
_INTERFACE: dict[str, str | None] = {
    f"{_UTILS}:selective_log_softmax": "logits, index, ...",
    f"{_UTILS}:entropy_from_logits": "logits, chunk_size",
    f"{_UTILS}:_ChunkedLogProbFunction": None,
    f"{_UTILS}:nanstd": None,
    f"{_GRPO}._calculate_rewards": "self, inputs, prompts, completions, completion_ids_list",
    f"{_GRPO}._generate_and_score_completions": "self, inputs",
    f"{_GRPO}._get_per_token_logps_and_entropies":
        "self, model, input_ids, attention_mask, logits_to_keep, ...",
    f"{_GRPO}._compute_loss": "self, model, inputs",
    f"{_GRPO}.get_high_entropy_mask": "self, entropies, mask, threshold",
    f"{_GRPO}.get_off_policy_mask": "advantages, per_token_logps, sampling_per_token_logps, ...",
}
VERSION = _peer.require("trl", VERSIONS, _INTERFACE)

from trl.trainer import utils as _utils  # noqa: E402

from ._trl_grpo import TokenGRPOTrainer  # noqa: E402

__all__ = ["VERSION", "TokenGRPOTrainer", "patch", "unpatch"]

_chunked = _utils._ChunkedLogProbFunction
_chunked_signature = inspect.signature(_chunked.forward)
_softmax = _utils.selective_log_softmax
_softmax_and_entropy = getattr(_utils, "selective_log_softmax_and_entropy", None)
_FP32_ON_GPU = _softmax_and_entropy is not None  # what TRL's own kernel gives there
_UNKNOWN = {"log_sum_sq_probs", "mean_logits", "is_top1"}


class _ChunkedLogProbs:
    """In place of TRL's autograd function of that purpose."""

    @staticmethod
    def apply(*args: Any) -> tuple[Tensor | None, ...]:
        """(logprobs, entropy) of every row, and, from 1.15 on, None for the rest."""
        given = _chunked_signature.bind(None, *args)
        given.apply_defaults()
        hidden, weight, *_ = args
        of: Any = given.arguments.get
        outputs = of("outputs")
        if hasattr(weight, "ds_id") or _UNKNOWN & set(outputs or ()):
            return _chunked.apply(*args)
        dtype, device, bias = hidden.dtype, hidden.device.type, of("bias")
        if _FP32_ON_GPU and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        wanted = outputs is None or "entropy" in outputs
        found = tk.linear_logprobs(
            hidden.to(dtype), weight.to(dtype), of("targets"),
            bias=None if bias is None else bias.to(dtype), temperature=of("temperature"),
            softcap=of("final_logit_softcapping"), logit_scale=of("logit_scale"),
            entropy_grad=wanted and "bias" in _chunked_signature.parameters)
        if outputs is None:
            return found.logprobs, found.entropy
        return found.logprobs, found.entropy if wanted else None, None, None, None


def _like_trl(x: Tensor, logits: Tensor) -> Tensor:
    """In the dtype that TRL's function gives."""
    return x if logits.is_cuda and _FP32_ON_GPU else x.to(logits.dtype)


def _selective_log_softmax(
        logits: Tensor,  # [..., V]
        index: Tensor,  # [...] or [..., K]
        temperature: float = 1.0,
        row_mask: Tensor | None = None,  # [...]
) -> Tensor:
    if index.shape != logits.shape[:-1]:
        return _softmax(logits, index, **_given(temperature, row_mask))
    found = tk.token_logprobs(logits, index, row_mask, temperature=temperature)
    return _like_trl(found.logprobs, logits)


def _entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    return _like_trl(tk.entropy(logits), logits)


def _selective_log_softmax_and_entropy(
        logits: Tensor,  # [..., V]
        index: Tensor,  # [...]
        entropy_requires_grad: bool = True,
        temperature: float = 1.0,
        row_mask: Tensor | None = None,  # [...]
) -> tuple[Tensor, Tensor]:
    if index.shape != logits.shape[:-1]:
        assert _softmax_and_entropy is not None
        return _softmax_and_entropy(logits, index, entropy_requires_grad, temperature, row_mask)
    logprobs, entropy = (_like_trl(x, logits) for x in tk.token_logprobs(
        logits, index, row_mask, temperature=temperature))
    return logprobs, entropy if entropy_requires_grad else entropy.detach()


def _given(temperature: float, row_mask: Tensor | None) -> dict[str, Any]:
    """The arguments that 1.12's function does not have, where they were given."""
    given = {"temperature": temperature, "row_mask": row_mask}
    return {name: x for name, x in given.items() if x is not None and x != 1.0}


_OURS: dict[str, Any] = {
    f"{_UTILS}:_ChunkedLogProbFunction": _ChunkedLogProbs,
    f"{_UTILS}:selective_log_softmax": _selective_log_softmax,
    f"{_UTILS}:entropy_from_logits": _entropy_from_logits,
}
if _softmax_and_entropy is not None:
    _OURS[f"{_UTILS}:selective_log_softmax_and_entropy"] = _selective_log_softmax_and_entropy
_PART = _peer.Part(_peer.Replacements("trl"), _INTERFACE, _OURS, "ours are " + ", ".join(
    name.partition(":")[2] for name in _OURS))


def patch() -> None:
    """Puts our operators in place of TRL's functions and says so; twice is once."""
    _peer.patch_parts(VERSIONS, _PART)


def unpatch() -> None:
    """Puts TRL's functions back, and says which another library has replaced since."""
    _peer.unpatch_parts(_PART)


def probe() -> str:
    """TRL's version, where it has every name that this file needs; raises PeerError."""
    return _peer.probe_parts(VERSIONS, _PART)
