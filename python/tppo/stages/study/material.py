"""What all arms of a seed share: the SFT model, its labelled answers, and who judges.

It is made by the stages themselves, in a run folder of its own inside the study's, and found there
again.  A test user is read by `arms` alone, after everything is trained.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from tppo.config import fill_defaults
from tppo.labels.endpoint.prompt import Template
from tppo.labels.label import Label, iter_labels
from tppo.labels.queries import parse_answer
from tppo.labels.twins import repeating_twin
from tppo.labels.words import map_labels, token_categories
from tppo.methods.reward_model import LabelledAnswer
from tppo.models.tokenizer import token_offsets
from tppo.rewards import Questions
from tppo.sessions.prompts import encode_answer
from tppo.sessions.session import Session
from tppo.stages.answers import Answer
from tppo.stages.artifacts import LABELS
from tppo.stages.label import label_item
from tppo.stages.ppo import questions_of
from tppo.stages.registry import before
from tppo.stages.run import Run
from tppo.stages.study.config import Arm, Labels, Noise, StudyConfig, changed
from tppo.stages.study.label_cost import (
    LabelCost,
    costs_as_json,
    label_costs,
    openai_tokens,
)
from tppo.store.jsonl import plain, write_json
from tppo.store.yaml_file import write_yaml

SETTINGS, COST = "run.yaml", "label-cost.json"
COUNTED = 200  # answers whose labels are counted in tokens
Labelled = tuple[Answer, Label]  # with its true label
LAST_STAGE = "map"  # it and those before it make the material


class Material:
    """The run folder of a seed, and what is read from it."""

    def __init__(
        self, folder: Path, study: StudyConfig, queries: int, seed: int, model: Path | None = None
    ):
        given, own = study.settings, study.material_of(seed)
        config = replace(given, sessions=replace(given.sessions, queries=queries))
        config = fill_defaults(config, pretrained=model is not None)
        out = folder / "material" / f"{queries}-queries-seed-{own}"
        self.run = Run(out=out, config=config, seed=own, model=model)
        self.study, self.seed = study, seed

    @cached_property
    def seeded(self) -> Run:
        """The run folder as what trains finds it: with the seed of the arms."""
        return replace(self.run, seed=self.seed)

    def for_arm(self, arm: Arm) -> Material:
        """The same as an arm sees it that changes settings of the reward model or of PPO."""
        if not arm.changes:
            return self
        own = copy.copy(self)
        own.run = replace(self.run, config=changed(self.run.config, arm.changes))
        vars(own).pop("seeded", None)
        return own

    def make(self) -> None:
        """Run the stages that have not finished; other commands find the settings in the folder."""
        for name in [*before(LAST_STAGE), LAST_STAGE]:
            if not self.run.done(name):
                self.run.perform(name)
        write_yaml(self.run.out / SETTINGS, plain({
            "out": self.run.out, "seed": self.run.seed, "model": self.run.model,
            "settings": self.run.config,
        }))  # fmt: skip
        count = openai_tokens()
        if count is not None:
            write_json(self.run.out / COST, costs_as_json(self.label_costs(count)))

    def label_costs(self, count: Callable[[str], int]) -> dict[Template, LabelCost]:
        """What labels of the first answers cost by the two templates of the endpoint."""
        sessions = {session.id: session for session in self.sessions}
        pairs = self.labelled[:COUNTED]
        items = [label_item(answer, sessions[answer.session]) for answer, _ in pairs]
        return label_costs(items, [label for _, label in pairs], count)

    @cached_property
    def labelled(self) -> list[Labelled]:
        """Every answer with its true labels, in the order in which they are given to arms: the
        first N of it are N labelled answers, so that more of them hold the fewer.
        """
        labels = {label.id: label for label in iter_labels(self.run.path(LABELS))}
        pairs = [(a, labels[a.id]) for a in self.run.iter_answers() if a.id in labels]
        return random.Random(f"{self.seed}/labelled").sample(pairs, len(pairs))

    @property
    def pool(self) -> list[Labelled]:
        """The answers that arms may have labelled."""
        return self.labelled[: -self.study.fresh_answers]

    @property
    def fresh(self) -> list[Labelled]:
        """Answers that no reward model is trained on."""
        return self.labelled[-self.study.fresh_answers :]

    @cached_property
    def sessions(self) -> list[Session]:
        """The training sessions."""
        return self.run.sessions("train")

    @cached_property
    def train(self) -> Questions:
        """What PPO answers: the training sessions, with the columns that a reward reads."""
        return questions_of(self.run, self.sessions, self.run.sft_model())

    @cached_property
    def judges(self) -> list[Session]:
        """The fresh users who judge at the end."""
        return self.run.sessions("test")[: self.study.users]


def with_noise(label: Label, noise: Noise, seed: int) -> Label:
    """A label whose verdicts are flipped with the probabilities of the noise.

    Which of them depends on seed and answer alone, so that every arm sees the same labels.
    """
    rng = random.Random(f"{seed}/noise/{label.id}")
    sentence = label.sentence ^ (rng.random() < noise.sentences)
    words = tuple((word, value ^ (rng.random() < noise.words)) for word, value in label.words)
    return replace(label, words=words, sentence=int(sentence))


def labelled_rows(
    material: Material, pairs: Sequence[Labelled], noise: Noise, labels: Labels
) -> list[LabelledAnswer]:
    """Labelled answers as a reward model reads them, and behind them their twins.

    A twin is an answer with one of its queries repeated, as the stage train-rm makes them: what a
    repetition is worth needs no labeller.  Where only sentences are labelled nobody knows which
    words were relevant, and a twin is irrelevant.
    """
    run, config = material.run, material.run.config
    rng = random.Random(f"{material.seed}/twins")
    rows, twins = [], []
    for answer, true in pairs:
        label = with_noise(true, noise, material.seed)
        text, offsets = token_offsets(run.tokenizer, answer.response_ids, run.eos_ids)
        categories = map_labels(text, label.words, offsets)
        rows.append(
            LabelledAnswer(answer.prompt_ids, answer.response_ids, categories, label.sentence + 1)
        )
        twin = repeating_twin(label, config.label.sentence_threshold, rng)
        if twin is None or rng.random() >= config.reward_model.repeated_share:
            continue
        ids = encode_answer(run.tokenizer, parse_answer(twin.text))
        spelled, spans = token_offsets(run.tokenizer, ids)
        if twin.text.startswith(spelled):  # else the tokenizer cannot spell it
            sentence = twin.sentence if labels == "words" else 0
            categories = token_categories(twin.categories, spans)
            twins.append(LabelledAnswer(answer.prompt_ids, ids, categories, sentence + 1))
    return rows + twins


def true_shares(pairs: Sequence[Labelled]) -> list[float]:
    """The share of words of each answer that are relevant and in no repeated query."""
    return [
        sum(value for _, value in label.words) / max(len(label.words), 1) for _, label in pairs
    ]
