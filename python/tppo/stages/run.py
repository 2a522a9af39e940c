"""One run: its folder, its settings, and how the stages find each other's files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tppo.config import Config
from tppo.errors import DataError
from tppo.evaluation.judge import SESSION, Judge
from tppo.models.adapters import is_adapter, load_adapter, shared_copy
from tppo.models.folder import folder_eos_ids
from tppo.models.hub import locate
from tppo.models.load import load_policy, resolve_device
from tppo.models.rollout import Sampling
from tppo.models.tokenizer import load_tokenizer
from tppo.models.vocabulary import limit_vocabulary
from tppo.progress import say
from tppo.rewards import Questions
from tppo.sessions.prompts import prompt_text
from tppo.sessions.session import Session, read_sessions
from tppo.stages.answers import Answer, answer_of
from tppo.stages.artifacts import ANSWERS, SFT_MODEL, SPLITS, Artifact
from tppo.stages.judges import chosen_judge, judge_named
from tppo.stages.lengths import answer_cap, fit_prompts
from tppo.stages.registry import (
    REGISTRY,
    Given,
    Stage,
    before,
)
from tppo.store.jsonl import read_jsonl
from tppo.store.run_folder import RunFolder, differences


@dataclass(frozen=True)
class Run:
    """The settings of a run, and one of its rounds; every stage is a function of one.

    The first round is what `tppo run` makes.  A stage of a later one lies beside it in a folder of
    its own (`generate-2`) with a manifest of its own, and reads of every other stage the newest
    round that is there, up to its own.
    """

    out: Path
    config: Config
    seed: int = 0
    data: Path | None = None
    model: Path | None = None
    device_name: str = "auto"
    round: int = 1
    judged_by: Judge | None = None
    """In place of the one that `eval.judge` names; manifests know it by its name alone."""
    _running: list[tuple[Stage, int]] = field(
        default_factory=list, init=False, repr=False, compare=False
    )

    @cached_property
    def device(self) -> torch.device:
        return resolve_device(self.device_name)

    @cached_property
    def base(self) -> Path | None:
        """The folder or GGUF file of --model.  Errors: DataError where there is none."""
        config = self.config.model
        if self.model is None:
            if config.revision is not None:
                raise DataError(f"--model.revision was {config.revision!r} without --model, "
                                "expected the id on the hub that it is a revision of")  # fmt: skip
            return None
        return locate(self.model, config.revision, pickles=config.allow_pickle)

    @cached_property
    def own_reward_model(self) -> Path | None:
        """The folder of --reward-model.model.  Errors: DataError where there is none."""
        config, pickles = self.config.reward_model, self.config.model.allow_pickle
        if config.model is None:
            return None
        return locate(config.model, config.revision, flag="--reward-model.model", pickles=pickles)

    @cached_property
    def folder(self) -> RunFolder:
        return RunFolder(self.out)

    def at(self, round: int) -> Run:
        """The same run in another round."""
        if round == self.round:
            return self
        other = replace(self, round=round)
        vars(other).update(folder=self.folder, _running=self._running)
        return other

    @property
    def round_seed(self) -> int:
        """Seed of what a round draws: the run's own in the first, another one in each later."""
        return self.seed + (self.round - 1) * 1_000_003

    def perform(self, name: str, round: int | None = None) -> None:
        """Do the work of a stage, in this round or another.

        Errors: ValueError where no stage of this name is registered, or it reads what it does not
        declare; DataError naming the first input that is not there and the stage that makes it.
        """
        run = self if round is None else self.at(round)
        stage = _registered(name)
        with run._runs(stage):
            stage(run)

    def go_on(self, name: str) -> bool:
        """Do what a finished stage has left over; whether there was something."""
        stage = _registered(name)
        with self._runs(stage):
            return stage.go_on(self)

    def path(self, artifact: Artifact) -> Path:
        """Where a file or folder of a finished stage lies.

        A stage that is running sees an own output as the round before has left it if that is among
        its inputs, else where its own result gets its name.
        Errors: ValueError where the stage that is running does not declare the artifact.
        """
        running = self._reader(artifact)
        if running is None or artifact not in running.outputs:
            return self._newest(artifact)
        if artifact not in running.inputs:
            return self.out / self._folder_of(running.name) / artifact.name
        before = self._rounds(running, artifact)
        if not before:
            raise ValueError(f"stage {running.name} reads {artifact.path} of the round before, and "
                             "there is none: ask `run.round`")  # fmt: skip
        return before[-1]

    def paths(self, artifact: Artifact) -> list[Path]:
        """Where it lies in every round up to this, the oldest first; a stage that is running
        declares it as `artifact.of_every_round()`, and its own outputs are of the rounds before.
        """
        artifact = artifact.of_every_round()
        return self._rounds(self._reader(artifact), artifact)

    def _reader(self, artifact: Artifact) -> Stage | None:
        """The stage that is running, if one is, which has to declare the artifact."""
        if not self._running:
            return None
        stage, round = self._running[-1]
        if round != self.round:
            raise ValueError(f"stage {stage.name} runs in round {round} and asks for a path of "
                             f"round {self.round}, expected `run.paths` of an input that it "
                             "declares of every round")  # fmt: skip
        if artifact not in (*stage.inputs, *stage.outputs):
            every = " of every round" if artifact.every else ""
            raise ValueError(
                f"stage {stage.name} reads {artifact.path}{every}, which it does not declare; "
                f"expected one of its inputs ({', '.join(a.path for a in stage.inputs)}): add it "
                "there, so that the stage runs again where the file changes"
            )
        return stage

    @property
    def label_cache(self) -> Path:
        """Beside the stages: a stage that fails must not lose what was paid for."""
        return self.out / "label-cache.jsonl"

    @property
    def label_lost(self) -> Path:
        """The record of the items without a label, beside the stages like the cache."""
        return self.beside("label-lost.jsonl")

    def beside(self, name: str) -> Path:
        """A file beside the stages, in a later round with its number: `result-2.json`."""
        stem, dot, kind = name.partition(".")
        return self.out / f"{self._folder_of(stem)}{dot}{kind}"

    def done(self, stage: str) -> bool:
        """Whether the stage has finished with these inputs and settings."""
        inputs = self._inputs(stage)
        if not all(path.exists() for path in inputs):
            return False
        return self.folder.done(self._folder_of(stage), inputs, self._settings(stage), self.seed)

    @contextmanager
    def stage(self, stage: str, *, resume: bool = False) -> Iterator[Path]:
        """A folder to write the stage's files into; it counts only when the block succeeds.

        Errors: DataError naming the first input that is not there and the stage that makes it;
        ValueError where the block does not write an output that the stage declares.
        """
        known = _registered(stage)
        with self._runs(known):
            inputs, settings, folder = self.inputs(stage), self._settings(stage), self.folder
            name = self._folder_of(stage)
            with folder.stage(name, inputs, settings, self.seed, resume=resume) as work:
                yield work
                for output in known.outputs:
                    if not output.optional and not (work / output.name).exists():
                        raise ValueError(f"stage {stage} declares the output {output.path} and did "
                                         "not write it")  # fmt: skip

    @contextmanager
    def _runs(self, stage: Stage) -> Iterator[None]:
        """Inside the block `path` gives what the stage declares and nothing else."""
        if self._running and self._running[-1] != (stage, self.round):
            raise ValueError(f"stage {self._running[-1][0].name} does the work of stage "
                             f"{stage.name}, expected its own alone")  # fmt: skip
        self._running.append((stage, self.round))
        try:
            yield
        finally:
            self._running.pop()

    def check_outside(self, stage: str) -> None:
        """Raise DataError where what the user names for a stage is not there, or no model."""
        path = self._outside(stage)
        if path is not None and not path.exists():
            raise DataError(f"{path}: no such file; {self._remedy(path)}")

    def inputs(self, stage: str) -> list[Path]:
        """What the stage reads.

        Raises DataError, with the remedy, where one is not there or not what its stage wrote.
        """
        outside, inputs = self._outside(stage), self._inputs(stage)
        for path in inputs:
            if not path.exists():
                raise DataError(f"{path}: no such file; {self._remedy(path)}")
        for path in inputs:
            if path != outside:
                self.folder.verify(path)
        return inputs

    def check_stages_before(self, stage: str) -> None:
        """Compare the settings with those of the stages whose files the stage builds on.

        Raises DataError where one of them had another seed; says what else is not as it was.
        """
        for name in before(stage):
            run = self.at(self._newest_round(name))
            folder = run._folder_of(name)
            manifest = self.folder.manifest(folder)
            if manifest is None:
                continue  # `inputs` says so where its files are read
            if manifest["seed"] != self.seed:
                raise DataError(
                    f"stage {name} in {self.out} had seed {manifest['seed']}, this command has "
                    f"{self.seed}: leave --seed out, or begin with `tppo run --seed {self.seed}` "
                    "in another --out"
                )
            inputs, own = run._inputs(name), run._settings(name)
            if all(path.exists() for path in inputs):
                changes = self.folder.changes(folder, inputs, own, self.seed)
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
        command = re.sub(r"-(\d+)$", r" --round \1", path.relative_to(self.out).parts[0])
        return f"run `tppo {command} --out {self.out}` first"

    def _outside(self, stage: str) -> Path | None:
        """What a stage reads that the user names."""
        outside = REGISTRY[stage].outside
        return None if outside is None else outside(self)

    def _inputs(self, stage: str) -> list[Path]:
        """What the stage reads: what the user names, and of the run folder."""
        outside, known = self._outside(stage), REGISTRY[stage]
        inputs = [] if outside is None else [outside]
        for artifact in known.inputs:
            found = self._rounds(known, artifact)
            if not artifact.every:
                found = found[-1:]
            if not found and artifact.stage != stage:
                found = [self._newest(artifact)]  # to be missed
            inputs += [path for path in found if path.exists() or not artifact.optional]
        return inputs

    def _rounds(self, reader: Stage | None, artifact: Artifact) -> list[Path]:
        """Where it lies in each finished round up to this; for its own stage, before this.  One
        whose manifest has been lost is among them, and is named when it is read.
        """
        own = reader is not None and artifact.stage == reader.name
        folders = [self.out / self.at(r)._folder_of(artifact.stage)
                   for r in range(1, self.round + (not own))]  # fmt: skip
        return [folder / artifact.name for folder in folders if folder.is_dir()]

    def _newest(self, artifact: Artifact) -> Path:
        run = self.at(self._newest_round(artifact.stage))
        return self.out / run._folder_of(artifact.stage) / artifact.name

    def _newest_round(self, stage: str) -> int:
        """The newest round up to this in which the stage has finished; 1 where none has."""
        finished = (r for r in range(self.round, 1, -1)
                    if (self.out / self.at(r)._folder_of(stage)).is_dir())  # fmt: skip
        return next(finished, 1)

    def _folder_of(self, stage: str) -> str:
        return stage if self.round == 1 else f"{stage}-{self.round}"

    def _settings(self, stage: str) -> dict[str, Any]:
        judge = partial(judge_named, self.config.eval, self.judged_by)
        given = Given(self.config, self.data is not None, self.model is not None, judge)
        found = REGISTRY[stage].dependencies(given)
        return found if self.round == 1 else found | {"round": self.round}

    def sessions(self, split: str) -> list[Session]:
        """The sessions of train, heldout, test or transfer."""
        return read_sessions(self.path(SPLITS[split]))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """That of the SFT model."""
        self.path(SFT_MODEL)  # whoever asks declares it, though it may have been read before
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.path(SFT_MODEL))

    @property
    def eos_ids(self) -> list[int]:
        """Every id that ends an answer."""
        self.path(SFT_MODEL)
        return self._eos_ids

    @cached_property
    def _eos_ids(self) -> list[int]:
        return folder_eos_ids(self.path(SFT_MODEL), self.tokenizer)

    def sft_model(self) -> PreTrainedModel:
        return self.load_policy(SFT_MODEL)

    def load_policy(
        self, artifact: Artifact, over: PreTrainedModel | None = None
    ) -> PreTrainedModel:
        """The causal LM of a finished stage; an adapter shares the weights of `over`, its base."""
        path = self.path(artifact)
        if over is not None and is_adapter(path):
            return load_adapter(shared_copy(over), path)
        model = load_policy(path, self.device, self.config.model.dtype)
        return limit_vocabulary(model, self.tokenizer)

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
        return self.judged_by or chosen_judge(self.config, self.out / "judge-cache.jsonl")

    @property
    def max_new_tokens(self) -> int:
        """Cap of an answer: as configured, or from the true answers."""
        for artifact in (SFT_MODEL, SPLITS["train"]):
            self.path(artifact)
        return self._max_new_tokens

    @cached_property
    def _max_new_tokens(self) -> int:
        return answer_cap(self.tokenizer, self.sessions("train"), self.config.generate)

    def sampling(self, *, temperature: float | None = None, seed: int = 0) -> Sampling:
        chosen = self.config.generate.temperature if temperature is None else temperature
        return Sampling(self.max_new_tokens, chosen, seed)

    def answers(self) -> list[Answer]:
        """The generated answers.  Errors: DataError naming file, line and field."""
        return list(self.iter_answers())

    def iter_answers(self) -> Iterator[Answer]:
        """The generated answers one at a time."""
        return map(answer_of, read_jsonl(self.path(ANSWERS)))


def _registered(name: str) -> Stage:
    if name not in REGISTRY:
        raise ValueError(f"stage was {name!r}, expected one of {', '.join(REGISTRY)}")
    return REGISTRY[name]
