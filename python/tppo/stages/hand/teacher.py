"""A model of the labels so far, trained anew in the background, to choose and to measure by."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from tppo.labels.hand import Judged
from tppo.labels.words import map_labels, word_spans
from tppo.methods.doubt import doubts_of
from tppo.methods.reward_model import (
    IRRELEVANT,
    RELEVANT,
    LabelledAnswer,
    PolicyTokens,
    class_logits_of,
    enough_passes,
    part_size,
    train_reward_model,
)
from tppo.models.adapters import add_to_classifier
from tppo.models.guards import GuardError
from tppo.models.own_tokens import start_reward_model
from tppo.models.tokenizer import token_offsets
from tppo.progress import say_once, silent
from tppo.stages.answers import Answer
from tppo.stages.artifacts import SFT_MODEL
from tppo.stages.models import sft_origin
from tppo.stages.run import Run

LEAST = 10  # answers that a first model learns from
NEW = 5  # answers after which it is trained anew


class Told(NamedTuple):
    """What a model says of an answer."""

    words: tuple[float, ...]
    """P(wanted) of each word."""
    doubt: float
    """How unsure it is of the whole (`tppo.methods.doubt`)."""


class BackgroundTeacher:
    """A reward model on the trunk of the SFT model, as `train-rm` trains one.

    pool: the answers that it speaks of.  changed: called by its thread after every new model.
    """

    def __init__(self, run: Run, pool: Sequence[Answer], changed: Callable[[], None]) -> None:
        self.run, self.pool, self.changed = run, pool, changed
        self.sft, self.tokenizer, self.eos = run.path(SFT_MODEL), run.tokenizer, run.eos_ids
        self.origin = sft_origin(run) if run.config.lora.on else None
        self.learnt = 0
        self._told: dict[str, Told] = {}
        self._todo: list[Judged] = []
        self._wake = threading.Condition()
        self._closed = False
        self._known = {answer.id: answer for answer in pool}
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._work, name="teacher", daemon=True)
        self._thread.start()

    def learn(self, judged: Sequence[Judged]) -> None:
        """A new model comes of them where there are enough new ones."""
        with self._wake:
            self._todo = list(judged)
            self._wake.notify()

    def foretell(self, id: str) -> tuple[float, ...]:
        """P(wanted) of each word of an answer of the pool by the newest model."""
        return self._told[id].words if id in self._told else ()

    def doubt(self, id: str) -> float | None:
        """How unsure the newest model is of an answer of the pool, in nats a token."""
        return self._told[id].doubt if id in self._told else None

    def close(self) -> None:
        """End the thread, when the model that it trains is done."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _due(self) -> bool:
        n = len(self._todo)
        return n >= LEAST and (not self.learnt or n >= self.learnt + NEW or n < self.learnt)

    def _work(self) -> None:
        torch.set_num_threads(self._threads)
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closed or self._due())
                if self._closed:
                    return
                judged = self._todo
            try:
                with silent():
                    told = self._foretold_by(judged)
            except (GuardError, RuntimeError) as error:
                say_once(f"WARNING: no model of the labels so far, answers are drawn at random: "
                         f"{error}")  # fmt: skip
                return
            self._told, self.learnt = told, len(judged)
            self.changed()

    def _foretold_by(self, judged: Sequence[Judged]) -> dict[str, Told]:
        """What a model that learns from these says of every answer of the pool."""
        run, config = self.run, self.run.config.reward_model
        rows = [row for found in judged if (row := self._row(found)) is not None]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            model, _ = start_reward_model(
                None, self.sft, self.tokenizer, run.device, run.config.model.dtype
            )
        if self.origin is not None:
            add_to_classifier(model, run.config.lora, seed=run.seed, origin=self.origin)
        reader = PolicyTokens(model, self.tokenizer.pad_token_id, run.config.prefix)
        train_reward_model(reader, rows, enough_passes(config, len(rows)), seed=run.seed)
        told, size = dict[str, Told](), part_size(config)
        for i in range(0, len(self.pool), config.batch_size):
            part = self.pool[i : i + config.batch_size]
            unknown = [LabelledAnswer(a.prompt_ids, a.response_ids, [0] * len(a.response_ids), 1)
                       for a in part]  # fmt: skip
            logits, mask = class_logits_of(reader, unknown, size)
            wanted = (logits[..., RELEVANT] - logits[..., IRRELEVANT]).sigmoid().tolist()
            told |= {
                a.id: Told(self._of_words(a, row), doubt)
                for a, row, doubt in zip(part, wanted, doubts_of(logits, mask), strict=True)
            }
        return told

    def _row(self, found: Judged) -> LabelledAnswer | None:
        answer = self._known.get(found.id)
        if answer is None or answer.text != found.response:
            return None
        text, offsets = token_offsets(self.tokenizer, answer.response_ids, self.eos)
        categories = map_labels(text, found.label().words, offsets)
        return LabelledAnswer(answer.prompt_ids, answer.response_ids, categories,
                              found.sentence + 1)  # fmt: skip

    def _of_words(self, answer: Answer, wanted: Sequence[float]) -> tuple[float, ...]:
        """The mean over the tokens that have characters of a word."""
        text, offsets = token_offsets(self.tokenizer, answer.response_ids, self.eos)
        found = []
        for start, end in word_spans(text):
            of_word = [p for (a, b), p in zip(offsets, wanted, strict=False)
                       if a < end and b > start]  # fmt: skip
            found.append(math.fsum(of_word) / max(len(of_word), 1))
        return tuple(found)
