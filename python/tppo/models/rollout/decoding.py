"""Decoding by transformers' `generate` in a batch that rows leave once they have ended.

`generate` computes every row until the last one ends: where the longest of many answers has 400
tokens and their mean has 90, three quarters of the work is filler, and so is most of what a growing
cache costs, which is copied whole at every token.  Here `generate` goes a part of the way: it
returns once a quarter of its rows have ended, and the others go on with their part of the cache.

What is drawn does not depend on who has left: each token is drawn from a matrix with a row for
every answer that the batch began with, so that a seed gives the answers that `generate` alone
gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    PreTrainedModel,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

_PREPARE = signature(GenerationMixin.prepare_inputs_for_generation)
CACHE = "cache" if "cache" in _PREPARE.parameters else "past_key_values"  # its older name
_OF_ROWS = {DynamicLayer, DynamicSlidingWindowLayer}  # rows of these may be copied and left out
SHARE = 0.25  # of the rows that have ended, at which they leave


def has_rows(cache: Cache | None) -> bool:
    """Whether a cache is keys and values of rows, and nothing else that a model remembers."""
    return type(cache) is DynamicCache and {type(layer) for layer in cache.layers} <= _OF_ROWS


def empty_cache(model: PreTrainedModel) -> Cache | None:
    """A cache whose rows may leave; None for a model that remembers more than keys and values."""
    cache = None if model._is_stateful else DynamicCache(config=model.config)
    return cache if has_rows(cache) else None


def decode(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    cache: Cache | None,
    config: GenerationConfig,
    *,
    temperature: float,
    top_p: float,
    place: tuple[int, int] | None = None,
) -> list[list[int]]:
    """What the model writes behind each prompt, up to the cap; behind an EOS stands filler.

    ids, mask: the prompts, padded on the left, [B, P].
    cache: empty, or all but the last token of each prompt; None where the model makes its own, of
        which no row leaves before the last has ended.
    config: cap, padding, EOS ids and suppressed ids; `do_sample` is false, for the draw is here.
    temperature: 0 takes the likeliest token, and draws nothing.
    place: where these rows are a part of a batch, their first one in it, and how many it has: each
        is drawn as in the whole batch.
    """
    first, whole = place or (0, len(ids))
    prompt, cap = ids.shape[1], config.max_new_tokens
    rows = torch.arange(len(ids), device=ids.device)  # of the batch as it began: who is left
    written: list[list[int]] = [[] for _ in range(len(ids))]
    while len(rows):
        ended = _Ended(config.eos_token_id, 1.0 if cache is None else SHARE)
        drawn = [_Drawn(rows + first, whole, temperature, top_p)] if temperature else []
        config.max_new_tokens = prompt + cap - ids.shape[1]
        ids = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            **{CACHE: cache},
            generation_config=config,
            logits_processor=drawn,
            stopping_criteria=[ended],
        )
        leave = ended.rows | (ids.shape[1] == prompt + cap)
        for i, row in zip(rows[leave].tolist(), ids[leave, prompt:].tolist(), strict=True):
            written[i] = row
        stay = (~leave).nonzero()[:, 0]
        rows, ids, mask = rows[stay], ids[stay], mask[stay]
        mask = torch.cat([mask, mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])], 1)
        if cache is not None:
            cache.batch_select_indices(stay)
    return written


class _Ended(StoppingCriteria):
    """Which rows have ended; all stop once this share of them has."""

    def __init__(self, eos_ids: Sequence[int], share: float):
        self.eos_ids, self.share = eos_ids, share
        self.rows: Any = False  # [B]

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        eos_ids = torch.tensor(self.eos_ids, device=input_ids.device)
        self.rows = self.rows | torch.isin(input_ids[:, -1], eos_ids)  # behind one stands filler
        return self.rows | (self.rows.sum() >= self.share * len(self.rows))


class _Drawn(LogitsProcessor):
    """Leaves of each row's scores one token, drawn as `generate` draws in a batch of all rows.

    torch.multinomial draws noise for every element of a matrix, whatever stands there: a row gets
    the same noise whether the others are answers or not.
    """

    def __init__(self, rows: Tensor, whole: int, temperature: float, top_p: float):
        self.rows, self.whole = rows, whole
        self.warpers = [
            *([TemperatureLogitsWarper(temperature)] if temperature != 1 else []),
            *([TopPLogitsWarper(top_p)] if top_p < 1 else []),
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for warper in self.warpers:
            scores = warper(input_ids, scores)
        chances = scores.softmax(-1)  # [B, V]
        if len(chances) < self.whole:
            everyone = chances.new_ones(self.whole, chances.shape[1])
            chances = everyone.index_copy_(0, self.rows, chances)
        tokens = chances.multinomial(1)[self.rows]  # [B, 1]
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens, 0.0)
