"""What would stop a training late, or spoil it silently, is looked for before it costs anything."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tppo.models.batch import Batch
from tppo.models.config import Prefix
from tppo.models.policy import policy_head, policy_logprobs
from tppo.models.precision import relative_rms, rounding_error
from tppo.models.rollout import HFRollout, Sampling
from tppo.models.vocabulary import embeddings_of, largest_id, limit_vocabulary
from tppo.progress import say

TOKENS = 4  # of a trial answer
# What a trunk raises that is given inputs which it cannot take.
UNFIT = (ValueError, TypeError, RuntimeError, AttributeError, KeyError, NotImplementedError)
SHARED_TO = 1e-4  # of shared against dense log-probs, relative, in float32


def preflight(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    *,
    where: str,
    prefix: Prefix = "shared",
) -> None:
    """Tokenizer, embeddings, head and trunk are fit for SFT and PPO; takes a few tokens' time.

    prompt: token ids of a prompt as the training will have them.  where: what the user gave.
    Tokens behind the tokenizer's are suppressed from here on (`limit_vocabulary`).
    Errors: ValueError, one sentence that names `where`, what was found and the remedy.
    """
    check_specials(model, tokenizer, where)
    check_newline(tokenizer, where)
    limit_vocabulary(model, tokenizer)
    try:
        policy_head(model)
    except ValueError as error:
        raise ValueError(f"{where}: {error}; a training reads states and head apart, and cannot "
                         "with this model") from error  # fmt: skip
    if prefix == "shared":
        check_sharing(model, prompt, tokenizer.pad_token_id, where)


def check_specials(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, where: str
) -> None:
    """Errors: ValueError where a token that batches or answers need has no embedding."""
    rows, largest = embeddings_of(model), largest_id(tokenizer)
    for name in ("eos_token", "pad_token", "bos_token"):
        token = getattr(tokenizer, f"{name}_id")
        if token is not None and token >= rows:
            raise ValueError(
                f"{where}: {name} {getattr(tokenizer, name)!r} of the tokenizer is token {token}, "
                f"and the model has embeddings of tokens 0 to {rows - 1}; expected a tokenizer and "
                "a model that belong together: call model.resize_token_embeddings and save both"
            )
    if largest >= rows:
        say(f"{where}: the tokenizer gives tokens to {largest}, "
            f"{tokenizer.convert_ids_to_tokens(largest)!r}, and the model has embeddings of 0 to "
            f"{rows - 1}; a text with such a token would be refused")  # fmt: skip


def check_newline(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Errors: ValueError where a line break is lost in tokens: two queries could not be written."""
    ids = tokenizer.encode("a\nb", add_special_tokens=False)
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if "\n" not in text:
        raise ValueError(
            f"{where}: the tokenizer writes 'a\\nb' in tokens {ids}, which read {text!r}; "
            "expected the line break back, which parts the queries of an answer; take a tokenizer "
            "that keeps it (byte-level BPE does)"
        )


@torch.no_grad()
def check_sharing(model: PreTrainedModel, prompt: Sequence[int], pad_id: int, where: str) -> None:
    """Two answers to one prompt are sampled and read with the prompt shared as without.

    Errors: ValueError naming the family and `--prefix dense`, where they are not.
    """
    family = model.config.model_type
    subject, remedy = f"{where}: a model of the family {family!r}", "--prefix dense goes on without"
    again = _sampled(model, prompt, pad_id, "dense", f"{subject} cannot answer with a dense prompt")
    failed = f"{subject} cannot share a prompt between answers; {remedy}"
    sampled = _sampled(model, prompt, pad_id, "shared", failed)
    # Both ways read the same answers: a sample that flipped is not an error of reading.
    expected = _read(model, prompt, again, pad_id, "dense", failed)  # [2, T]
    found = _read(model, prompt, again, pad_id, "shared", failed)  # [2, T]
    exact = model.dtype == torch.float32
    error, limit = relative_rms(found, expected), SHARED_TO if exact else rounding_error(model)
    if not error < limit:
        raise ValueError(
            f"{subject} has log-probs with a shared prompt that differ from those with a prompt "
            f"each by {error:.1e} (relative), expected < {limit:.0e}; {remedy}"
        )
    if exact and sampled != again:
        raise ValueError(f"{subject} samples {sampled} with a shared prompt and {again} with a "
                         f"prompt each, from one seed; {remedy}")  # fmt: skip


def _sampled(
    model: PreTrainedModel, prompt: Sequence[int], pad_id: int, way: Prefix, failed: str
) -> list[list[int]]:
    """Two short answers to the prompt."""
    engine = HFRollout(model, pad_id=pad_id, eos_id=[], prefix=way)
    try:
        found = engine.generate([list(prompt)] * 2, Sampling(TOKENS), description="preflight")
        return found.response_ids
    except UNFIT as error:
        raise _unfit(failed, error) from error


def _read(
    model: PreTrainedModel,
    prompt: Sequence[int],
    answers: Sequence[Sequence[int]],
    pad_id: int,
    way: Prefix,
    failed: str,
) -> Tensor:
    """Log-probs of the answers, [2, T]."""
    try:
        return policy_logprobs(model, Batch([prompt] * 2, answers, pad_id, model.device, way), 1)[0]
    except UNFIT as error:
        raise _unfit(failed, error) from error


def _unfit(failed: str, error: Exception) -> ValueError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ValueError(f"{failed}: {reason}")
