"""How long answers may be, and how many tokens that leaves for prompts."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from tppo.models.config import GenerateConfig
from tppo.sessions.prompts import encode_answer, encode_prompts
from tppo.sessions.session import Session

DEFAULT_POSITIONS = 2048  # of a model that does not say how many it has


def answer_cap(
    tokenizer: PreTrainedTokenizerBase, train: Sequence[Session], config: GenerateConfig
) -> int:
    """Cap of an answer: as configured, or 1.25 times the 99th percentile of the true ones."""
    if config.max_new_tokens:
        return config.max_new_tokens
    ordered = sorted(len(encode_answer(tokenizer, session.targets)) for session in train)
    return int(1.25 * ordered[int(0.99 * (len(ordered) - 1))]) + 1


def positions_of(config: PretrainedConfig) -> int:
    """How many tokens a model reads at most, prompt and answer together."""
    return getattr(config, "max_position_embeddings", None) or DEFAULT_POSITIONS


def fit_prompts(
    tokenizer: PreTrainedTokenizerBase,
    sessions: Sequence[Session],
    model: PreTrainedModel,
    cap: int,
) -> list[list[int]]:
    """Prompt ids that leave room for an answer of `cap` tokens in the model's positions."""
    return encode_prompts(tokenizer, sessions, positions_of(model.config) - cap)
