"""A trained model that answers: `tppo.load("DIR").answer(history)`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, fsum
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tppo.errors import DataError
from tppo.methods.config import MAX_TOKENS
from tppo.models.adapters import is_adapter
from tppo.models.batch import Batch
from tppo.models.config import DType, GenerateConfig, RolloutName, VLLMConfig
from tppo.models.folder import model_eos_ids
from tppo.models.load import load_policy, resolve_device
from tppo.models.own_tokens import AlignedRewardModel, load_frozen, load_own_tokenizer
from tppo.models.part_size import PartSize
from tppo.models.policy import policy_logprobs
from tppo.models.rollout import Sampling, build
from tppo.models.tokenizer import load_tokenizer
from tppo.models.vocabulary import limit_vocabulary
from tppo.rewards import Answers, TokenReward
from tppo.rewards.token_model import SUGGESTED_LENGTH, TokenModelReward
from tppo.sessions.prompts import encode_prompts
from tppo.stages.answering.histories import Asked, asked, with_queries
from tppo.stages.answering.recipe import Recipe, read_recipe
from tppo.stages.artifacts import POLICY, REWARD_MODEL, SFT_MODEL, Artifact
from tppo.stages.given import as_sampler
from tppo.stages.lengths import positions_of
from tppo.stages.prompts import Prompts, questions
from tppo.store.hashes import MANIFEST
from tppo.store.run_folder import RunFolder


@dataclass(frozen=True)
class Token:
    """A token of an answer."""

    id: int
    text: str
    """"" for one without characters, such as the EOS."""
    logprob: float
    """Of the model at temperature 1, in nats."""
    reward: float | None
    """As PPO would pay it; None without a reward model."""
    category: int | None
    """Class of the reward model: 0 none, 1 irrelevant, 2 relevant."""


@dataclass(frozen=True)
class Query:
    """One of the queries of an answer."""

    text: str
    logprob: float
    """Sum over its tokens, in nats."""
    confidence: float
    """The geometric mean of its tokens' probabilities, from 0 to 1: how sure the model was."""
    reward: float | None
    """Sum over its tokens."""


@dataclass(frozen=True)
class Answer:
    """An answer to a history, with what the models say of it."""

    id: str
    text: str
    queries: tuple[Query, ...]
    tokens: tuple[Token, ...]
    finish: str
    """eos, or length where it was cut."""
    prompt_tokens: int

    @property
    def logprob(self) -> float:
        """Of the whole answer, its end included, in nats."""
        return fsum(token.logprob for token in self.tokens)

    @property
    def reward(self) -> float | None:
        """What PPO would pay for the whole answer; None without a reward model."""
        rewards = [token.reward for token in self.tokens if token.reward is not None]
        return fsum(rewards) if rewards else None


class Answerer:
    """A model that `tppo` has trained, ready to answer.

        model = tppo.load("runs/demo")
        print(model.answer(["red running shoes", "click: trail shoes"]))
        for answer in model.answers([history], several=3)[0]:
            print(answer.text, answer.logprob, [token.reward for token in answer.tokens])

    folder: of a run (`--out`), or of an exported model alone, such as a copy of `train/model`.
    reward_model: the folder of a token reward model; by default that of the run, and none beside an
        exported model alone.
    device: auto, cpu, cuda, cuda:1.  dtype: of the weights in memory, as --model.dtype.
    rollout: who samples: "hf", transformers' `generate`; or "vllm", or a `tppo.VLLMConfig`.

    It is not safe to call from several threads at once.
    Errors: DataError where the folder holds no such model, with what to run or to give.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        reward_model: str | Path | None = None,
        device: str = "auto",
        dtype: DType = "auto",
        rollout: RolloutName | VLLMConfig = "hf",
    ) -> None:
        self.sampler = as_sampler(rollout, GenerateConfig(), "shared")
        self.path, found = find(Path(folder))
        rewards = found if reward_model is None else Path(reward_model)
        self.recipe: Recipe = read_recipe(self.path)
        self.device = resolve_device(device)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(self.path)
        model = load_policy(self.path, self.device, dtype)
        model = model.requires_grad_(False)  # an engine gets weights that stay only once
        self.model: PreTrainedModel = limit_vocabulary(model, self.tokenizer)
        self.eos_ids = model_eos_ids(self.tokenizer, self.model)
        self.reward = None if rewards is None else self._reward(rewards, dtype)

    def answer(
        self,
        history: Any,
        *,
        queries: int | None = None,
        temperature: float | None = None,
        seed: int = 0,
    ) -> list[str]:
        """The next queries after a history: its events, the oldest first.

        history: a text with an event a line, or a list of texts or of {"type", "text"}, or
            {"history": such a list, "profile": a list of texts}.  A model that was trained on
            prompts as they were given takes a text or a chat instead, and the lines of its answer
            are returned.
        queries: how many; by default as many as in training.
        temperature: of sampling; 0 takes the likeliest tokens; by default that of training.
        Errors: DataError where the history is none, or is too long for the model.
        """
        (found,) = self.answers([history], queries=queries, temperature=temperature, seed=seed)
        return [query.text for query in found[0].queries]

    @torch.no_grad()
    def answers(
        self,
        histories: Sequence[Any],
        *,
        several: int = 1,
        queries: int | None = None,
        temperature: float | None = None,
        seed: int = 0,
        batch_size: int = 64,
        max_new_tokens: int | None = None,
    ) -> list[list[Answer]]:
        """For each history `several` answers, with log-probs and rewards of their tokens.

        batch_size: answers that are sampled at once.  The rest is as in `answer`.
        max_new_tokens: cap of an answer; by default the one of training, and so many times more as
            more queries are asked for.
        """
        self._check(several, queries, batch_size, max_new_tokens)
        given = [one if isinstance(one, Asked) else asked(one, self.recipe, f"history {i}")
                 for i, one in enumerate(histories)]  # fmt: skip
        if not given:
            return []
        counts = [one.queries or queries or self.recipe.queries for one in given]
        most = max(-(-count // self.recipe.queries) for count in counts)
        cap = max_new_tokens or self.recipe.max_new_tokens * most
        prompts = self._prompts(given, counts, cap)
        engine = build(self.model, self.sampler._replace(batch_size=batch_size),
                       pad_id=self.tokenizer.pad_token_id, eos_id=self.eos_ids)  # fmt: skip
        warmth = self.recipe.temperature if temperature is None else temperature
        rows = [i for i in range(len(given)) for _ in range(several)]
        rollout = engine.generate([prompts[i] for i in rows], Sampling(cap, warmth, seed))
        batch = Batch(rollout.prompt_ids, rollout.response_ids, self.tokenizer.pad_token_id,
                      self.device)  # fmt: skip
        logprobs = PartSize(MAX_TOKENS, "").read(
            batch, lambda part: policy_logprobs(self.model, part, 1.0)[0]
        )  # [B, T]
        answers = Answers((), rollout.response_ids, self._columns(counts, rows), self.tokenizer,
                          self.eos_ids, rows)  # fmt: skip
        paid = None if self.reward is None else self.reward(batch, answers)
        found: list[list[Answer]] = [[] for _ in given]
        for b, i in enumerate(rows):
            tokens = _tokens(answers, b, logprobs, paid)
            found[i].append(
                Answer(given[i].id, answers.texts[b], _queries(answers, b, tokens), tokens,
                       rollout.finish[b], len(prompts[i]))
            )  # fmt: skip
        return found

    def _check(self, several: int, queries: int | None, batch_size: int, cap: int | None) -> None:
        for name, value in (("several", several), ("queries", queries), ("batch_size", batch_size),
                            ("max_new_tokens", cap)):  # fmt: skip
            if value is not None and (type(value) is not int or value < 1):
                raise DataError(f"{name} was {value!r}, expected a whole number of at least 1")
        if queries is not None and self.recipe.prompt == "as given":
            raise DataError(f"queries was {queries}, expected none: this model answers prompts as "
                            "they are given, which say themselves what is wanted")  # fmt: skip

    def _prompts(
        self, given: Sequence[Asked], counts: Sequence[int], cap: int
    ) -> list[list[int]]:
        room = positions_of(self.model.config) - cap
        if room < 1:
            raise DataError(
                f"answers of {cap} tokens leave no room for a prompt in the {room + cap} positions "
                "of the model, expected fewer queries"
            )
        if self.recipe.prompt == "as given":
            texts = Prompts([one.prompt for one in given], {}, lambda i: given[i].id)
            return [list(ids) for ids in questions(texts, self.tokenizer, room).ids]
        sessions = []
        for one, count in zip(given, counts, strict=True):
            assert one.session is not None
            sessions.append(with_queries(one.session, count))
        return encode_prompts(self.tokenizer, sessions, room)

    def _reward(self, path: Path, dtype: DType) -> TokenModelReward:
        model = load_frozen(path, self.tokenizer, self.device, self.eos_ids, dtype)
        own = isinstance(model, AlignedRewardModel)
        if not own and load_own_tokenizer(path).get_vocab() != self.tokenizer.get_vocab():
            raise DataError(f"{path}: a reward model with another tokenizer than {self.path}, "
                            "expected the one that was trained beside it")  # fmt: skip
        paid = self.recipe.paid
        return TokenModelReward(model, mode=paid.mode, values=paid.values,
                                length_alpha=paid.length_alpha, max_tokens=MAX_TOKENS)  # fmt: skip

    def _columns(self, counts: Sequence[int], rows: Sequence[int]) -> dict[str, list[float]]:
        return {SUGGESTED_LENGTH: [self.recipe.paid.suggested_length(counts[i]) for i in rows]}


def load(
    folder: str | Path,
    *,
    reward_model: str | Path | None = None,
    device: str = "auto",
    dtype: DType = "auto",
    rollout: RolloutName | VLLMConfig = "hf",
) -> Answerer:
    """The trained model of a run folder, or of an exported one alone: `tppo.load("DIR")`.

    The arguments, and the errors, are those of `Answerer`.
    """
    return Answerer(
        folder, reward_model=reward_model, device=device, dtype=dtype, rollout=rollout
    )


def find(folder: Path) -> tuple[Path, Path | None]:
    """The model in a folder, and the reward model beside it in a run.

    Errors: DataError saying what to run, or to give, where there is none; naming a file of a run
    that its stage has not written.
    """
    if (folder / "config.json").exists() or is_adapter(folder):
        return folder, None
    round, policy = _newest(folder, POLICY)
    if policy is not None:
        rated_by = _newest(folder, REWARD_MODEL, round)[1]
        for path in filter(None, (policy, rated_by)):
            RunFolder(folder).verify(path)
        return policy, rated_by
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder, expected a run (--out of `tppo run`) or an "
                        "exported model")  # fmt: skip
    _, sft = _newest(folder, SFT_MODEL)
    remedy = f"run `tppo run --out {folder}` first"
    if sft is not None:
        remedy = f"`tppo run --out {folder}` goes on; what SFT has learnt is in {sft} meanwhile"
    raise DataError(f"{folder}: no finished {POLICY.stage} stage and no config.json, expected a "
                    f"run or an exported model; {remedy}")  # fmt: skip


def _newest(out: Path, artifact: Artifact, most: int | None = None) -> tuple[int, Path | None]:
    """The newest round, up to `most`, in which a stage has finished, and its file there."""
    found = {}
    for folder in out.glob(f"{artifact.stage}*"):
        number = re.fullmatch(rf"{re.escape(artifact.stage)}(?:-(\d+))?", folder.name)
        place = folder / artifact.name
        if number and (folder / MANIFEST).exists() and place.exists():
            found[int(number[1] or 1)] = place
    rounds = [round for round in found if most is None or round <= most]
    return (max(rounds), found[max(rounds)]) if rounds else (1, None)


def _tokens(
    answers: Answers, b: int, logprobs: torch.Tensor, paid: TokenReward | None
) -> tuple[Token, ...]:
    text = answers.texts[b]
    found = []
    for t, (token, (start, end)) in enumerate(
        zip(answers.response_ids[b], answers.offsets[b], strict=True)
    ):
        reward = category = None
        if paid is not None and paid.category is not None:
            reward, category = float(paid.rewards[b, t]), int(paid.category[b, t])
        found.append(Token(token, text[start:end], float(logprobs[b, t]), reward, category))
    return tuple(found)


def _queries(answers: Answers, b: int, tokens: Sequence[Token]) -> tuple[Query, ...]:
    """Each line that is not blank, with the tokens that write a character of it."""
    found, start = [], 0
    for line in answers.texts[b].split("\n"):
        begin = start + len(line) - len(line.lstrip())
        end = begin + len(line.strip())
        own = [token for token, (a, z) in zip(tokens, answers.offsets[b], strict=True)
               if max(a, begin) < min(z, end)]  # fmt: skip
        if own:
            logprob = fsum(token.logprob for token in own)
            rewards = [token.reward for token in own if token.reward is not None]
            reward = fsum(rewards) if rewards else None
            found.append(Query(line.strip(), logprob, exp(logprob / len(own)), reward))
        start += len(line) + 1
    return tuple(found)
