"""Implicit self-improvement: a policy that is asked to better an answer (PIT; Wang et al., ICLR
2024, arXiv 2310.00898).

    1  SFT            -log M(y_w | x, y_l): the better answer from the prompt and the worse one
    2  gap model      r_gap(x, y, y_ref), by how much y is better than y_ref:
                      g_wl above g_ww and g_ll, which are above g_lw
    3  RL, stage 0    PPO that pays r_gap, y_ref from {y_l, y_w}
       RL, stage 1    y_ref written by the policy of the moment, which starts from stage 0
    4  inference      y_(k+1) = M(x, y_k), k = 0, 1, ...

Prompt and reference stand in one prompt (`improvement`); with an empty reference that is x itself,
and PIT is PPO on the gap against nothing.  So a gap model is a model of whole answers that reads
the policy's own prompts, and the policy, its rollout and its PPO are those of every other method.

What the paper leaves open, and what is done here:
- where the terms of the gap model's loss come from is not written out; of all pairs of the ordering
  the four neighbouring ones are trained, the fifth, g_wl above g_lw, follows from them (a flag);
- "written by the policy" is read as: the policy's improvement of a reference of the data, which is
  what it meets at inference from its second step on;
- rewards of tokens, which the paper has not: the gap model pools by the mean, so that the gap is a
  sum over tokens, and each is paid its part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedTokenizerBase

from tppo.methods.sentence_model import SentenceReader
from tppo.models.batch import Batch
from tppo.models.rollout import Rollout, Sampling
from tppo.models.tokenizer import decode

BETTER = "\nbetter:\n"  # between a reference and the answer that betters it
ASK = "Give a better answer."
Encode = Callable[[Any, str], list[int]]  # token ids of a prompt with a reference in it


def improvement(prompt: Any, reference: str) -> Any:
    """The prompt that asks for a better answer than the reference; the prompt itself without one.

    prompt: a text, or a list of chat messages.
    """
    if not reference:
        return prompt
    if isinstance(prompt, str):
        return f"{prompt}{reference}{BETTER}"
    return [*prompt, {"role": "assistant", "content": reference}, {"role": "user", "content": ASK}]


class GapPair(NamedTuple):
    """A pair as the gap model reads it; all token ids."""

    with_worse: Sequence[int]  # the prompt whose reference is the worse answer
    with_better: Sequence[int]
    chosen_ids: Sequence[int]
    rejected_ids: Sequence[int]


class GapReader(SentenceReader):
    """A gap model with how it reads pairs: each as the better and the worse answer to both prompts.

    fifth: train the term g_wl above g_lw too.
    """

    fifth = False

    def batch(self, rows: Sequence[GapPair]) -> Batch:  # type: ignore[override]
        """g_wl, g_ll, g_ww, g_lw of each pair: [4 N] responses."""
        prompts = [p for row in rows for p in (row.with_worse, row.with_better) for _ in range(2)]
        answers = [a for row in rows for a in (row.chosen_ids, row.rejected_ids) * 2]
        device = next(self.model.parameters()).device
        return Batch(prompts, answers, self.pad_id, device, self.prefix)

    @torch.no_grad()
    def gaps(self, asked: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> Tensor:
        """r_gap of answers to prompts with references in them, [B]."""
        device = next(self.model.parameters()).device
        batch = Batch(asked, answers, self.pad_id, device, self.prefix)
        return self.part_size.read(batch, self.model)

    def loss(self, rows: Sequence[Any]) -> Callable[[Tensor], Tensor]:
        """That of the ordering."""
        return lambda scores: gap_loss(scores, fifth=self.fifth)


def gap_loss(scores: Tensor, *, fifth: bool = False) -> Tensor:
    """-mean [ls(g_wl - g_ww) + ls(g_wl - g_ll) + ls(g_ww - g_lw) + ls(g_ll - g_lw)]

    scores: [4 N], of each pair g_wl, g_ll, g_ww, g_lw (first the answer, then the reference; w the
    better, l the worse one).  ls: log sigmoid.  fifth: with ls(g_wl - g_lw).
    """
    wl, ll, ww, lw = scores.view(-1, 4).unbind(1)
    found = logsigmoid(wl - ww) + logsigmoid(wl - ll) + logsigmoid(ww - lw) + logsigmoid(ll - lw)
    if fifth:
        found = found + logsigmoid(wl - lw)
    return -found.mean()


def evaluate_gap(reader: GapReader, pairs: Sequence[GapPair]) -> dict[str, float]:
    """The loss, and the share of pairs for which each of the inequalities holds."""
    scores = reader.scores(pairs)  # type: ignore[arg-type]
    wl, ll, ww, lw = scores.view(-1, 4).unbind(1)
    named = {"wl_above_ww": wl > ww, "wl_above_ll": wl > ll, "ww_above_lw": ww > lw,
             "ll_above_lw": ll > lw, "wl_above_lw": wl > lw}  # fmt: skip
    figures = {name: held.float().mean().item() for name, held in named.items()}
    return {"loss": gap_loss(scores, fifth=reader.fifth).item(), **figures}


class Improver(NamedTuple):
    """A policy that is asked for better answers."""

    engine: Rollout
    encode: Encode
    tokenizer: PreTrainedTokenizerBase
    eos_ids: Sequence[int]

    def step(
        self, prompts: Sequence[Any], texts: Sequence[str], sampling: Sampling
    ) -> list[list[int]]:
        """An answer to each prompt that is to be better than the one given: M(x, y), token ids."""
        asked = [self.encode(p, y) for p, y in zip(prompts, texts, strict=True)]
        return self.engine.generate(asked, sampling).response_ids

    def texts(self, answers: Sequence[Sequence[int]]) -> list[str]:
        """Answers as texts."""
        return [decode(self.tokenizer, ids, self.eos_ids) for ids in answers]

    def steps(
        self, prompts: Sequence[Any], first: Sequence[str], k: int, sampling: Sampling
    ) -> Iterator[list[list[int]]]:
        """y_1 .. y_k, each asked to be better than the one before, beginning with y_0."""
        before = first
        for n in range(k):
            found = self.step(prompts, before, replace(sampling, seed=sampling.seed + n))
            yield found
            before = self.texts(found)
