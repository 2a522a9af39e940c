"""One run: its folder, its settings, and how the stages find each other's files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tppo.config import Config
from tppo.jsonl import is_text, read_jsonl
from tppo.models import load_policy, resolve_device
from tppo.prompts import encode_answer, encode_prompts
from tppo.rollout import Sampling
from tppo.run_folder import RunFolder
from tppo.sessions import DataError, Session, read_sessions
from tppo.tokenizer import load_tokenizer

# What a stage reads of the run folder, and the sections of the configuration it depends on.
STAGES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "data": ((), ("sessions",)),
    "sft": (("data/train.jsonl", "data/heldout.jsonl"), ("scratch", "sft", "generate")),
    "generate": (("data/train.jsonl", "sft/model"), ("generate",)),
    "label": (("data/train.jsonl", "generate/answers.jsonl"), ("label",)),
    "map": (("sft/model", "generate/answers.jsonl", "label/labels.jsonl"), ()),
    "train-rm": (
        ("sft/model", "generate/answers.jsonl", "map/categories.jsonl"),
        ("reward_model",),
    ),
    "train": (
        (
            "data/train.jsonl", "data/heldout.jsonl", "sft/model", "map/lengths.json",
            "train-rm/model", "train-rm/report.json",
        ),
        ("generate", "label", "ppo"),
    ),
    "eval": (
        ("data/train.jsonl", "data/test.jsonl", "sft/model", "train/model", "train/report.json"),
        ("sft", "generate", "label", "eval"),
    ),
    "heat": (
        (
            "data/test.jsonl", "sft/model", "map/lengths.json", "train-rm/model", "train/model",
            "train/critic.safetensors",
        ),
        ("generate", "ppo", "eval"),
    ),
}  # fmt: skip


class Answer(NamedTuple):
    """A generated answer, as `generate` writes it."""

    id: str
    session: str
    prompt_ids: list[int]
    response_ids: list[int]
    finish: str
    text: str


@dataclass(frozen=True)
class Run:
    """The settings of a run; every stage is a function of one."""

    out: Path
    config: Config
    seed: int = 0
    data: Path | None = None
    model: Path | None = None
    device_name: str = "auto"

    @cached_property
    def device(self) -> torch.device:
        return resolve_device(self.device_name)

    @cached_property
    def folder(self) -> RunFolder:
        return RunFolder(self.out)

    def path(self, relative: str) -> Path:
        """A file of a finished stage."""
        return self.out / relative

    def done(self, stage: str) -> bool:
        """Whether the stage has finished with these inputs and settings."""
        inputs = self._inputs(stage)
        if not all(path.exists() for path in inputs):
            return False
        return self.folder.done(stage, inputs, self._settings(stage), self.seed)

    @contextmanager
    def stage(self, stage: str, *, resume: bool = False) -> Iterator[Path]:
        """A folder to write the stage's files into; it counts only when the block succeeds.

        Errors: DataError naming the first input that is not there and the stage that makes it.
        """
        inputs = self._inputs(stage)
        for path in inputs:
            if not path.exists():
                maker = f"run `tppo {path.relative_to(self.out).parts[0]} --out {self.out}` first"
                known = path.is_relative_to(self.out)
                raise DataError(f"{path}: no such file; {maker if known else 'is the path right?'}")
        settings = self._settings(stage)
        with self.folder.stage(stage, inputs, settings, self.seed, resume=resume) as work:
            yield work

    def _inputs(self, stage: str) -> list[Path]:
        outside = {"data": self.data, "sft": self.model}.get(stage)
        inputs = [] if outside is None else [outside]
        return inputs + [self.path(relative) for relative in STAGES[stage][0]]

    def _settings(self, stage: str) -> dict[str, Any]:
        return {name: getattr(self.config, name) for name in STAGES[stage][1]}

    def sessions(self, split: str) -> list[Session]:
        return read_sessions(self.path(f"data/{split}.jsonl"))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.path("sft/model"))

    def sft_model(self) -> PreTrainedModel:
        return load_policy(self.path("sft/model"), self.device)

    def prompts(self, sessions: Sequence[Session], model: PreTrainedModel) -> list[list[int]]:
        """Prompt ids of the sessions, cut so that the longest answer still fits the model."""
        room = max_positions(model) - self.max_new_tokens
        return encode_prompts(self.tokenizer, sessions, room)

    @cached_property
    def max_new_tokens(self) -> int:
        """Cap of a response: as configured, or from the true answers."""
        lengths = [
            len(encode_answer(self.tokenizer, session.targets))
            for session in self.sessions("train")
        ]
        return answer_cap(lengths, self.config.generate.max_new_tokens)

    def sampling(self, *, temperature: float | None = None, seed: int = 0) -> Sampling:
        chosen = self.config.generate.temperature if temperature is None else temperature
        return Sampling(self.max_new_tokens, chosen, seed)

    def answers(self) -> list[Answer]:
        """The generated answers.  Errors: DataError naming file, line and field."""
        return [
            Answer(
                id=line.get("id", is_text, "a text"),
                session=line.get("session", is_text, "a text"),
                prompt_ids=line.get("prompt_ids", _is_ids, "a list of token ids"),
                response_ids=line.get("response_ids", _is_ids, "a list of token ids"),
                finish=line.get("finish", lambda v: v in ("eos", "length"), "eos or length"),
                text=line.get("text", lambda v: isinstance(v, str), "a text"),
            )
            for line in read_jsonl(self.path("generate/answers.jsonl"))
        ]

    def with_config(self, **sections: Any) -> Run:
        """The run with other sections of the configuration."""
        return replace(self, config=replace(self.config, **sections))


def max_positions(model: PreTrainedModel) -> int:
    """Positions of the model, prompt and response together."""
    return getattr(model.config, "max_position_embeddings", None) or 2048


def answer_cap(lengths: Sequence[int], wanted: int) -> int:
    """`wanted`, or 1.25 times the 99th percentile of the answers' lengths where that is 0."""
    if wanted:
        return wanted
    ordered = sorted(lengths)
    return int(1.25 * ordered[int(0.99 * (len(ordered) - 1))]) + 1


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(i) is int for i in value)
