"""One run: its folder, its settings, and how the stages find each other's files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tppo.config import Config
from tppo.errors import DataError
from tppo.evaluation.judge import SESSION, Judge, RuleJudge
from tppo.models.config import GenerateConfig
from tppo.models.folder import folder_eos_ids
from tppo.models.hub import locate
from tppo.models.load import load_policy, resolve_device
from tppo.models.rollout import Sampling
from tppo.models.tokenizer import load_tokenizer
from tppo.progress import say
from tppo.rewards import Questions
from tppo.sessions.prompts import encode_answer, encode_prompts, prompt_text
from tppo.sessions.session import Session, read_sessions
from tppo.stages.dependencies import OPTIONAL, STAGES, settings
from tppo.store.jsonl import Line, is_text, read_jsonl
from tppo.store.run_folder import RunFolder, differences

DEFAULT_POSITIONS = 2048  # of a model that does not say how many it has


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
    def base(self) -> Path | None:
        """The folder or GGUF file of --model.  Errors: DataError where there is none."""
        if self.model is None:
            return None
        config = self.config.model
        return locate(self.model, config.revision, pickles=config.allow_pickle)

    @cached_property
    def own_reward_model(self) -> Path | None:
        """The folder of --reward-model.model.  Errors: DataError where there is none."""
        given = self.config.reward_model.model
        if given is None:
            return None
        return locate(given, flag="--reward-model.model", pickles=self.config.model.allow_pickle)

    @cached_property
    def folder(self) -> RunFolder:
        return RunFolder(self.out)

    def path(self, relative: str) -> Path:
        """A file of a finished stage."""
        return self.out / relative

    @property
    def label_cache(self) -> Path:
        """Beside the stages: a stage that fails must not lose what was paid for."""
        return self.out / "label-cache.jsonl"

    @property
    def label_lost(self) -> Path:
        """The record of the items without a label, beside the stages like the cache."""
        return self.out / "label-lost.jsonl"

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
        inputs, settings = self.inputs(stage), self._settings(stage)
        with self.folder.stage(stage, inputs, settings, self.seed, resume=resume) as work:
            yield work

    def check_outside(self, stage: str) -> None:
        """Raise DataError where what the user names for a stage is not there, or no model."""
        path = self._outside(stage)
        if path is not None and not path.exists():
            raise DataError(f"{path}: no such file; {self._remedy(path)}")

    def inputs(self, stage: str) -> list[Path]:
        """What the stage reads.

        Raises DataError, with the remedy, where one is not there or not what its stage wrote.
        """
        inputs = self._inputs(stage)
        for path in inputs:
            if not path.exists():
                raise DataError(f"{path}: no such file; {self._remedy(path)}")
        for relative in self._files(stage):
            self.folder.verify(self.path(relative))
        return inputs

    def check_stages_before(self, stage: str) -> None:
        """Compare the settings with those of the stages whose files the stage builds on.

        Raises DataError where one of them had another seed; says what else is not as it was.
        """
        for name in _before(stage):
            manifest = self.folder.manifest(name)
            if manifest is None:
                continue  # `inputs` says so where its files are read
            if manifest["seed"] != self.seed:
                raise DataError(
                    f"stage {name} in {self.out} had seed {manifest['seed']}, this command has "
                    f"{self.seed}: leave --seed out, or begin with `tppo run --seed {self.seed}` "
                    "in another --out"
                )
            inputs, own = self._inputs(name), self._settings(name)
            if all(path.exists() for path in inputs):
                changes = self.folder.changes(name, inputs, own, self.seed)
            else:  # a log that was read and then moved away
                changes = differences("config", manifest["config"], own)
            if changes:
                say(
                    f"WARNING: {stage} builds on files of {name}, which would now be others "
                    f"(`tppo run` repeats it): {'; '.join(changes)}"
                )

    def _remedy(self, path: Path) -> str:
        if path == self.data:
            return "is the path right?"
        return f"run `tppo {path.relative_to(self.out).parts[0]} --out {self.out}` first"

    def _outside(self, stage: str) -> Path | None:
        """What a stage reads that the user names."""
        if stage == "data":
            return self.data
        if stage == "train-rm":
            return self.own_reward_model
        return self.base if stage == "sft" else None

    def _inputs(self, stage: str) -> list[Path]:
        outside = self._outside(stage)
        inputs = [] if outside is None else [outside]
        return inputs + [self.path(relative) for relative in self._files(stage)]

    def _files(self, stage: str) -> list[str]:
        """What the stage reads of the run folder."""
        files = STAGES[stage].files
        return [name for name in files if name not in OPTIONAL or self.path(name).exists()]

    def _settings(self, stage: str) -> dict[str, Any]:
        from_file, from_model = self.data is not None, self.model is not None
        return settings(stage, self.config, from_file=from_file, from_model=from_model)

    def sessions(self, split: str) -> list[Session]:
        return read_sessions(self.path(f"data/{split}.jsonl"))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.path("sft/model"))

    @cached_property
    def eos_ids(self) -> list[int]:
        """Every id that ends an answer."""
        return folder_eos_ids(self.path("sft/model"), self.tokenizer)

    def sft_model(self) -> PreTrainedModel:
        return self.load_policy("sft/model")

    def load_policy(self, relative: str) -> PreTrainedModel:
        """The causal LM of a finished stage."""
        return load_policy(self.path(relative), self.device, self.config.model.dtype)

    def prompts(self, sessions: Sequence[Session], model: PreTrainedModel) -> list[list[int]]:
        """Prompt ids of the sessions, cut so that the longest answer still fits the model."""
        return fit_prompts(self.tokenizer, sessions, model, self.max_new_tokens)

    def questions(
        self, sessions: Sequence[Session], model: PreTrainedModel, **columns: Sequence[Any]
    ) -> Questions:
        """The sessions as questions to a model, with a column "session" besides `columns`."""
        prompts = [prompt_text(session) for session in sessions]
        return Questions(self.prompts(sessions, model), prompts, {SESSION: sessions, **columns})

    @property
    def judge(self) -> Judge:
        """Who judges the answers of the closing table and of the step that PPO keeps."""
        return RuleJudge(self.config.label.sentence_threshold)

    @cached_property
    def max_new_tokens(self) -> int:
        """Cap of an answer: as configured, or from the true answers."""
        return answer_cap(self.tokenizer, self.sessions("train"), self.config.generate)

    def sampling(self, *, temperature: float | None = None, seed: int = 0) -> Sampling:
        chosen = self.config.generate.temperature if temperature is None else temperature
        return Sampling(self.max_new_tokens, chosen, seed)

    def answers(self) -> list[Answer]:
        """The generated answers.  Errors: DataError naming file, line and field."""
        return list(self.iter_answers())

    def iter_answers(self) -> Iterator[Answer]:
        """The generated answers one at a time."""
        return map(answer_of, read_jsonl(self.path("generate/answers.jsonl")))


def _before(stage: str) -> list[str]:
    """The stages whose files a stage reads, and theirs, in order."""
    found: set[str] = set()
    left = [stage]
    while left:
        direct = {file.split("/")[0] for file in STAGES[left.pop()].files}
        left += direct - found
        found |= direct
    return [name for name in STAGES if name in found]


def answer_of(line: Line) -> Answer:
    """The answer that a line holds.  Errors: DataError naming file, line and field."""
    return Answer(
        id=line.get("id", is_text, "a text"),
        session=line.get("session", is_text, "a text"),
        prompt_ids=line.get("prompt_ids", _is_ids, "a list of token ids"),
        response_ids=line.get("response_ids", _is_ids, "a list of token ids"),
        finish=line.get("finish", lambda v: v in ("eos", "length"), "eos or length"),
        text=line.get("text", lambda v: isinstance(v, str), "a text"),
    )


def answer_cap(
    tokenizer: PreTrainedTokenizerBase, train: Sequence[Session], config: GenerateConfig
) -> int:
    """Cap of an answer: as configured, or 1.25 times the 99th percentile of the true ones."""
    if config.max_new_tokens:
        return config.max_new_tokens
    ordered = sorted(len(encode_answer(tokenizer, session.targets)) for session in train)
    return int(1.25 * ordered[int(0.99 * (len(ordered) - 1))]) + 1


def fit_prompts(
    tokenizer: PreTrainedTokenizerBase,
    sessions: Sequence[Session],
    model: PreTrainedModel,
    cap: int,
) -> list[list[int]]:
    """Prompt ids that leave room for an answer of `cap` tokens in the model's positions."""
    positions = getattr(model.config, "max_position_embeddings", None) or DEFAULT_POSITIONS
    return encode_prompts(tokenizer, sessions, positions - cap)


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(i) is int for i in value)
