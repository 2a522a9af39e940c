"""What a study trains: arms, the settings that they are compared at, and seeds.

This file loads no torch, so that `tppo study --help` answers at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, field, fields, is_dataclass, replace
from typing import Any, Literal

from tppo.config import Config
from tppo.errors import DataError
from tppo.methods.config import Algorithm
from tppo.settings import Count, Natural, Positive, Seed, Share, Text, from_dict, section
from tppo.store.jsonl import plain

Labels = Literal["words", "sentences", "pairs"]
Pooling = Literal["last", "mean"]
ANY_MODEL = "any"
ROUND = 25  # answers that are labelled at once where they are chosen
DEFAULTS = 2  # one more where a default changes that the outcomes of a study depend on
# Sections that no arm reads: arms say their algorithm and guide, and what judges them is the rule.
UNREAD = ("algorithm", "report_to", "rlgf", "guide", "eval", "ser", "pit")


@section
class Noise:
    """Labels that are wrong: each is flipped with a probability, once for all arms."""

    words: Share = 0.0
    """Probability that the label of a word is flipped."""
    sentences: Share = 0.0
    """Probability that the label of an answer as a whole is flipped."""


PAPER = Noise(words=0.088, sentences=0.19)  # the labelling model's errors, Ouyang et al. 2025


@section
class Arm:
    """A way to train: what the reward model learns from, and how PPO is paid by it."""

    name: Text = "token"
    """What tables call it; the same name is the same arm."""
    labels: Labels = "words"
    """words: the token reward model.  sentences: a model of whole answers, paid at their end.
    pairs: what DPO learns from the true next queries against the labelled answers, which need no
    labels for that; PPO is paid what the policy of DPO stands for at each token (RTO)."""
    pooling: Pooling = "last"
    """Of a model of whole answers: the state of the last token, or the mean of all of them."""
    paid: Literal["token", "end"] = "token"
    """Rewards of tokens at their tokens, or their total at the last token."""
    scale: Positive = 1.0
    """The reward is multiplied by this."""
    advantage: Literal["gae", "grpo", "rloo", "remax"] = "gae"
    responses_per_prompt: Count = 1
    """Of a step's answers so many are of one prompt: grpo, rloo and remax need at least two, and
    of remax's the last one is greedy."""
    lam: Share = 0.95
    fit_critic: Natural = 0
    """Answers of the SFT model on which the critic is fitted before PPO; none of them is new."""
    layer: Natural = 0
    """The reward model is a linear head over the states behind so many layers of the SFT model,
    whose weights it leaves as they are; 0: it has weights of its own, all of them trained."""
    chosen: Literal["random", "unsure", "policy"] = "random"
    """Which answers are labelled.  random: of the SFT model's any.  unsure: after `ROUND` of these
    in rounds of as many, those of which the reward model of the round before is least sure, of
    different users.  policy: after `ROUND` of these in rounds of as many while PPO trains, answers
    of the policy of then; PPO goes on with a reward model of all that are labelled."""
    changes: tuple[Text, ...] = ()
    """Settings of the reward model and of PPO for this arm alone: ppo.reward=argmax."""
    method: Literal["ppo", "dpo", "best-of-n"] = "ppo"
    """dpo: the policy that DPO makes of the pairs, without PPO.  best-of-n: of so many samples as
    `responses_per_prompt` says the one that is paid best, without any training."""
    mode: Literal["probability", "score"] = "probability"
    """Of a model of whole answers: what is paid, P - 1/2, or the score,
    log(P / (1 - P)), which still grows where P is close to 1."""
    algorithm: Algorithm = "ppo"
    """Of PPO: with a guide, ppo++, aggrevated, lols or d2lols (docs/rlgf.md)."""
    guide: Literal["sft", "strong"] = "sft"
    """sft: the SFT model, from the likeliest 92 % of the probability.  strong: a policy that PPO
    has trained before, with the same reward model and more answers than the arm has."""

    def __post_init__(self) -> None:
        if self.labels == "sentences" and self.paid == "token":
            raise ValueError(f"paid was 'token' in arm {self.name!r}, expected 'end' with labels "
                             "of sentences: an answer as a whole has one reward")  # fmt: skip
        if (self.method == "dpo") != (self.labels == "pairs") and self.method != "ppo":
            raise ValueError(f"method was {self.method!r} with labels of {self.labels} in arm "
                             f"{self.name!r}, expected dpo with pairs alone")  # fmt: skip
        if self.labels == "pairs" and self.layer:
            raise ValueError(f"layer was {self.layer} in arm {self.name!r}, expected 0 with labels "
                             "of pairs: DPO trains a policy, not a head")  # fmt: skip
        if self.chosen != "random" and (self.labels, self.layer, self.method, self.algorithm) != (
            "words", 0, "ppo", "ppo"
        ):  # fmt: skip
            raise ValueError(f"chosen was {self.chosen!r} in arm {self.name!r}, expected 'random' "
                             "but with labels of words, layer 0 and plain PPO")  # fmt: skip
        if self.method == "best-of-n" and self.responses_per_prompt < 2:
            raise ValueError(f"responses_per_prompt was 1 in arm {self.name!r}, expected at least "
                             "2 of which the best is chosen")  # fmt: skip
        if self.advantage != "gae" and self.fit_critic:
            raise ValueError(f"fit_critic was {self.fit_critic} in arm {self.name!r}, expected 0 "
                             f"with advantage {self.advantage}, which has no critic")  # fmt: skip
        if self.advantage != "gae" and self.responses_per_prompt < 2:
            raise ValueError(f"responses_per_prompt was 1 in arm {self.name!r}, expected at least "
                             f"2 with advantage {self.advantage}")  # fmt: skip
        for name, own in (("method", "ppo"), ("advantage", "gae"), ("fit_critic", 0)):
            value = getattr(self, name)
            if self.algorithm != "ppo" and value != own:
                raise ValueError(f"{name} was {value!r} in arm {self.name!r}, expected {own!r} "
                                 f"with algorithm {self.algorithm}")  # fmt: skip


def changed(config: Config, changes: Sequence[str]) -> Config:
    """The settings with some of them changed, each given as section.name=value, as JSON or a word.

    Errors: DataError where it is none of the reward model's or PPO's: an SFT model and its answers
    are shared by the arms.
    """
    values = plain(config)
    for change in changes:
        name, _, text = change.partition("=")
        part, _, key = name.partition(".")
        if part not in ("reward_model", "ppo") or key not in values[part] or not text:
            raise DataError(f"changes had {change!r}, expected reward_model.NAME=VALUE or "
                            "ppo.NAME=VALUE with the name of a setting")  # fmt: skip
        try:
            values[part][key] = json.loads(text)
        except ValueError:
            values[part][key] = text
    return from_dict(Config, values, "changes")


def own_values(config: Any) -> dict[str, Any]:
    """The values of a section that are not its defaults, those of sections in it likewise."""
    found: dict[str, Any] = {}
    for known in fields(config):
        value, made = getattr(config, known.name), known.default_factory
        default = known.default if made is MISSING else made()
        if value == default:
            continue
        found[known.name] = own_values(value) if is_dataclass(value) else value
    return found


@section
class Cell:
    """One training: an arm at one setting and seed."""

    arm: Arm = field(default_factory=Arm)
    answers: Count = 1600
    """Labelled answers that the reward model is trained on."""
    noise: Noise = field(default_factory=Noise)
    queries: Count = 3
    """Next queries that an answer is to have."""
    seed: Seed = 0
    steps: Natural = 24
    """Of PPO; 0: the reward model alone is trained, and rated by the fresh answers."""
    step_answers: Count = 32
    """Answers that are sampled in a step of PPO."""
    eval_every: Natural = 0
    """Steps between two looks at the users that judge; 0: after the last step alone."""

    @property
    def cost(self) -> int:
        """The answers sampled, in queries: what the time that the training takes grows with.

        A reward model and the figures of its policy count as a step.
        """
        steps = self.steps if self.arm.method == "ppo" else 0
        return (steps + 1) * self.step_answers * self.queries

    @property
    def labelled_first(self) -> int:
        """Answers that are labelled before PPO begins."""
        return min(ROUND, self.answers) if self.arm.chosen == "policy" else self.answers

    @property
    def later_rounds(self) -> dict[int, int]:
        """The labelled answers that there are to be before a step of PPO, the rounds after the
        first spread evenly over its steps; empty where all are labelled before.
        """
        sizes = [*range(self.labelled_first + ROUND, self.answers, ROUND), self.answers]
        sizes = sizes if self.labelled_first < self.answers else []
        return {1 + self.steps * k // (len(sizes) + 1): n for k, n in enumerate(sizes, 1)}

    @property
    def reward_model(self) -> str:
        """What the reward model with which a cell begins is called among those of its queries and
        seed: arms that learn from the same labels share it.
        """
        arm, noise = self.arm, self.noise
        kind = f"sentences-{arm.pooling}" if arm.labels == "sentences" else arm.labels
        kind += f"-layer-{arm.layer}" if arm.layer else ""
        kind += "-unsure" if arm.chosen == "unsure" else ""
        own = [change for change in arm.changes if change.startswith("reward_model.")]
        kind += "".join(f"-{change.partition('.')[2]}" for change in own)
        return f"{kind}-{self.labelled_first}-{noise.words:g}-{noise.sentences:g}"


@section
class Part:
    """Some of the trainings: every arm at every number of answers, noise and seed.

    Parts are trained in their order, and within a part seed after seed.
    """

    question: Literal["labels", "choice", "credit", "settings", "guides"] = "labels"
    """labels: figures at the last step over the numbers of labelled answers.  choice: the same of
    arms that differ in which answers are labelled, each against the first.  credit: the steps
    that arms with one reward model take to a relevance.  settings, guides: the same of arms that
    differ in `changes`, or in their algorithm and its guide."""
    arms: tuple[Arm, ...] = (Arm(),)
    answers: tuple[Count, ...] = (1600,)
    noise: tuple[Noise, ...] = (Noise(),)
    queries: Count = 3
    seeds: tuple[Seed, ...] = (0,)
    steps: Natural = 24
    step_answers: Count = 32
    eval_every: Natural = 0

    def __post_init__(self) -> None:
        for name in ("arms", "answers", "noise", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} was an empty list, expected at least one")
        for arm in self.arms:
            rounds = -(-max(self.answers) // ROUND)
            if arm.chosen == "policy" and self.steps < rounds:
                raise ValueError(f"steps was {self.steps}, expected at least the {rounds} rounds "
                                 f"in which arm {arm.name!r} is labelled")  # fmt: skip
            if arm.method == "ppo" and self.step_answers % arm.responses_per_prompt:
                raise ValueError(
                    f"step_answers was {self.step_answers}, expected a multiple of the "
                    f"{arm.responses_per_prompt} answers a prompt of arm {arm.name!r}"
                )
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names):
            raise ValueError(f"the arms were called {', '.join(names)}, expected each name once")

    def cells(self) -> Iterator[Cell]:
        """The trainings in their order."""
        for seed in self.seeds:
            for noise in self.noise:
                for answers in self.answers:
                    for arm in self.arms:
                        yield Cell(arm, answers, noise, self.queries, seed, self.steps,
                                   self.step_answers, self.eval_every)  # fmt: skip


@section
class StudyConfig:
    """A study: the trainer's own settings, which all arms share, and the parts."""

    parts: tuple[Part, ...] = (Part(),)
    fresh_answers: Count = 400
    """Answers that no reward model is trained on, for the rank correlation."""
    users: Count = 160
    """Fresh users whose answers are judged: test users, whom no stage before has read."""
    reward_updates: Count = 25
    """A reward model with few answers passes over them until it has made so many updates."""
    model: Text | None = None
    """The name of what --model gives, for arms that begin with a model of the user; any: of any."""
    material_seed: Seed | None = None
    """The seed of SFT and of its answers for all seeds of the arms, which then differ in the
    answers that are labelled, the heads, and PPO; None: every seed has an SFT model of its own."""
    settings: Config = field(default_factory=Config)
    """Of every stage, as of `tppo run`; what arms and parts say stands above them."""

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("parts was an empty list, expected at least one")
        needed = max(n for part in self.parts for n in part.answers) + self.fresh_answers
        if self.settings.generate.samples < needed:
            raise ValueError(
                f"settings.generate.samples was {self.settings.generate.samples}, expected at "
                f"least {needed}: the most labelled answers of a part, and fresh_answers"
            )
        if self.settings.sessions.train_users < needed:
            raise ValueError(
                f"settings.sessions.train_users was {self.settings.sessions.train_users}, expected "
                f"at least {needed}: an answer is labelled for each of as many users"
            )
        for arm in (arm for part in self.parts for arm in part.arms):
            changed(self.settings, arm.changes)
            if arm.chosen == "policy" and self.settings.label.labeller != "rule":
                raise ValueError(
                    f"settings.label.labeller was {self.settings.label.labeller!r}, expected rule "
                    f"with arm {arm.name!r}, whose answers are labelled while PPO trains"
                )
        if self.settings.lora.on and any(not a.layer for part in self.parts for a in part.arms):
            raise ValueError(
                f"layer was 0 of an arm and settings.lora.rank {self.settings.lora.rank}, expected "
                "a layer in every arm: reward models of a study have a head or all weights of "
                "their own, no adapter"
            )
        if self.settings.sessions.test_users < self.users:
            raise ValueError(
                f"settings.sessions.test_users was {self.settings.sessions.test_users}, expected "
                f"at least users, {self.users}"
            )

    def material_of(self, seed: int) -> int:
        """The seed of the SFT model that arms of a seed begin with."""
        return seed if self.material_seed is None else self.material_seed

    def cells(self) -> list[Cell]:
        """The trainings of all parts in their order, each once."""
        return list(dict.fromkeys(cell for part in self.parts for cell in part.cells()))

    @property
    def mark(self) -> str:
        """Changes where a setting does that all outcomes depend on.

        It is of the settings that are not the defaults, so that an option that is new leaves the
        outcomes of before as they were; where a default changes, `DEFAULTS` has to.
        """
        shared = own_values(self)
        shared.pop("parts", None)
        settings = shared.pop("settings", {})
        read = {name: value for name, value in settings.items() if name not in UNREAD}
        text = json.dumps([DEFAULTS, plain(shared), plain(read)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def with_noise(self, noise: Noise) -> StudyConfig:
        """The study with this noise beside clean labels where it has any noise at all."""
        parts = tuple(
            replace(part, noise=(Noise(), noise)) if any(n != Noise() for n in part.noise) else part
            for part in self.parts
        )
        return replace(self, parts=parts)
