"""Rollouts: prompts in, sampled token ids out, by one of several engines behind one seam."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from tppo.models.config import Sampler
from tppo.models.rollout.hf import HFRollout
from tppo.models.rollout.seam import (
    LOST,
    Engine,
    Rollout,
    RolloutBatch,
    Sampling,
    check_prefixes,
    together,
)

__all__ = ["LOST", "Engine", "HFRollout", "Rollout", "RolloutBatch", "Sampling", "build",
           "check_prefixes", "together"]  # fmt: skip


def build(
    model: PreTrainedModel, sampler: Sampler, *, pad_id: int, eos_id: int | Sequence[int]
) -> Engine:
    """The engine that `sampler` names, which samples from the weights that the model then has.

    Errors: DataError where it cannot be had here, or not with this model.
    """
    if sampler.rollout == "vllm":
        from tppo.models.rollout.vllm import VLLMRollout  # with it comes vLLM, where it is asked

        return VLLMRollout(
            model, pad_id=pad_id, eos_id=eos_id, batch_size=sampler.batch_size,
            prefix=sampler.prefix, config=sampler.vllm,
        )  # fmt: skip
    return HFRollout(
        model, pad_id=pad_id, eos_id=eos_id, batch_size=sampler.batch_size, prefix=sampler.prefix
    )
