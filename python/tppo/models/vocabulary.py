"""The tokens of a tokenizer and the embeddings of a model: who has more, and what comes of it."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tppo.progress import say_once


def embeddings_of(model: PreTrainedModel) -> int:
    """How many tokens the model has embeddings of."""
    embeddings: Any = model.get_input_embeddings()
    return embeddings.num_embeddings


def largest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest token id; ids may be sparse, so that there are fewer tokens than that."""
    return max(tokenizer.get_vocab().values())


def limit_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """The model, which from now on neither samples nor rates tokens that the tokenizer lacks.

    A vocabulary that is padded for speed has embeddings of tokens behind the tokenizer's largest
    id; they decode to nothing.  Rollouts suppress them and log-probs give them no probability, so
    that both are of one distribution.
    """
    size = largest_id(tokenizer) + 1
    rows = embeddings_of(model)
    if size < rows:
        model.valid_vocab = size  # type: ignore[assignment]
        say_once(f"{model.name_or_path}: embeddings of {rows} tokens, the tokenizer gives 0 to "
                 f"{size - 1}; the rest is never sampled and has no probability")  # fmt: skip
    return model


def phantoms(model: PreTrainedModel) -> list[int]:
    """The tokens that `limit_vocabulary` found."""
    rows = embeddings_of(model)
    size = getattr(model, "valid_vocab", rows)
    return list(range(size, rows))


def check_embeddings(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, largest: int
) -> None:
    """Errors: ValueError where a token, the end or the filler of batches has no embedding."""
    largest = max(largest, tokenizer.eos_token_id, tokenizer.pad_token_id)
    rows = embeddings_of(model)
    if largest >= rows:
        raise ValueError(
            f"{model.name_or_path}: the tokenizer gives token {largest}, "
            f"{tokenizer.convert_ids_to_tokens(largest)!r}, and the model has embeddings of "
            f"tokens 0 to {rows - 1}; expected a tokenizer and a model that belong together"
        )


