"""What each stage would take of a device's memory: its passes, and what is alive in each.

A pass is computed by `tppo.models.memory`; here stand the models that a stage holds, the batches
that the settings make, and which settings make them smaller.  This file loads no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import field, replace
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import Field

from tppo.methods.config import Algorithm, PPOConfig, RewardModelConfig, RLGFConfig, SFTConfig
from tppo.models.config import (
    GenerateConfig,
    GuideConfig,
    ModelConfig,
    Prefix,
    RewardServerConfig,
    RolloutName,
    VLLMConfig,
)
from tppo.settings import Count, section

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from tppo.models.meta import Holding

GB = 10**9
RESERVE = 3  # per cent
STAGES = ("sft", "generate", "train-rm", "train", "eval")
SAMPLING = ("generate", "train", "eval")


@section
class Work:
    """The settings of a run that its memory depends on, and the lengths of its texts."""

    prompt_tokens: Annotated[int, Field(ge=2)] = 512
    """Tokens of the longest prompts, with which others are padded."""
    response_tokens: Count = 32
    """Tokens of the longest answers."""
    prefix: Prefix = "shared"
    """As in `tppo run`: whether a prompt is computed once for all its responses."""
    model: ModelConfig = field(default_factory=ModelConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    algorithm: Algorithm = "ppo"
    """As in `tppo train`: with a guide, ppo++, aggrevated, lols or d2lols."""
    rlgf: RLGFConfig = field(default_factory=RLGFConfig)
    guide: GuideConfig = field(default_factory=GuideConfig)
    reward_server: RewardServerConfig = field(default_factory=RewardServerConfig)
    rollout: RolloutName = "hf"
    """As in `tppo run`: with vllm the engine's share of the memory counts while it samples."""
    vllm: VLLMConfig = field(default_factory=VLLMConfig)


class Need(NamedTuple):
    """Bytes that a stage takes at its highest moment.

    reserve: what a framework takes besides tensors: 1 GB for the context of a GPU and the work
    space of its libraries, and 3 % that are lost between blocks.  Both are assumed, not measured.
    host: the best weights, and those of vLLM during the update, which wait in the host's memory;
        no part of the sum.
    """

    stage: str
    moment: str
    weights: int
    optimizer: int
    gradients: int
    activations: int
    logits: int
    cache: int
    reserve: int
    host: int

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(self[2:9])


class Moment(NamedTuple):
    """One part of a stage: all that is alive beside weights and optimiser."""

    name: str
    nbytes: int
    gradients: int = 0
    logits: int = 0
    cache: int = 0


def plan(
    config: PretrainedConfig, how: Holding, work: Work, guide: PretrainedConfig | None = None
) -> list[Need]:
    """What each stage would take; the models are held as `how` says.

    guide: of another model that writes beside the policy in `train`.
    Errors: ValueError where the model's type cannot be planned.
    """
    return [need(stage, config, how, work, guide) for stage in STAGES]


def need(
    stage: str,
    config: PretrainedConfig,
    how: Holding,
    work: Work,
    guide: PretrainedConfig | None = None,
) -> Need:
    """What one stage would take: its models, and the largest of its moments."""
    from tppo.models.meta import meta_model, sizes

    bare = replace(how, lora=None)
    model, frozen = meta_model(config, how), meta_model(config, bare)
    whole, trunk = (sizes(frozen, role).weights for role in ("language", "value"))
    trained, value = sizes(model, "language"), sizes(model, "value")
    item, critic = how.dtype.itemsize, critics(work)
    guide = guide if stage == "train" else None
    frozen_rm = 0 if work.reward_server.base_url else 1
    # Models of which all weights are held; with LoRA one, and the adapters of so many.
    held = {
        "sft": (whole, 1), "generate": (whole, 0), "train-rm": (trunk, 1),
        "train": (2 * whole + (frozen_rm + critic) * trunk, 1 + frozen_rm + critic),
        "eval": (3 * whole, 3),
    }[stage]  # fmt: skip
    adapters = trained.trained * item if how.lora else 0
    weights = held[0] if how.lora is None else whole + held[1] * adapters
    if guide is not None:
        weights += sizes(meta_model(guide, bare), "language").weights
    count = {
        "sft": trained.trained, "generate": 0, "train-rm": value.trained,
        "train": trained.trained + critic * value.trained, "eval": trained.trained,
    }[stage]  # fmt: skip
    optimizer = count * (8 if item == 4 else 12)  # moments in fp32, and 16-bit weights' copies
    host = {"sft": trained.trained, "train": count}.get(stage, 0) * item
    if how.gpu_nbytes and work.rollout == "vllm" and stage in SAMPLING:
        host += whole  # of the engine while it sleeps
    idle = max(critic - 1, 0) * value.trained if stage == "train" else 0  # of two critics one
    gradients = (count - idle) * item
    found = list(moments(stage, config, how, work))
    if guide is not None:  # which writes answers of the same prompts, in parts as large
        found += [moment._replace(name="the guide's sampling")
                  for moment in moments("train", guide, bare, work) if moment.name == "sampling"]
    if count:  # the optimiser's own tensors: of all weights at once on a GPU, else of one
        own = 4 * count if how.gpu_nbytes else 8 * trained.largest
        found.append(Moment("the optimiser's step", gradients + own, gradients))
    highest = max(found, key=lambda moment: moment.nbytes)
    rest = highest.nbytes - highest.gradients - highest.logits - highest.cache
    reserve = GB + (weights + optimizer + highest.nbytes) * RESERVE // 100
    return Need(
        stage, highest.name, weights, optimizer, highest.gradients, max(rest, 0), highest.logits,
        highest.cache, reserve, host,
    )  # fmt: skip


def critics(work: Work) -> int:
    """How many `train` has: none, one, or one for each kind of step of lols."""
    return int(with_critic(work)) * (2 if work.algorithm == "lols" else 1)


def with_critic(work: Work) -> bool:
    """Whether the advantage needs one."""
    from tppo.methods.advantages import ADVANTAGES

    return ADVANTAGES[work.ppo.advantage](work.ppo).needs_critic


def moments(
    stage: str, config: PretrainedConfig, how: Holding, work: Work
) -> Iterator[Moment]:
    """The passes of a stage, each with what is alive in it."""
    from tppo.models.memory import reading_pass, sampling_pass, training_pass

    ppo, sft, rm = work.ppo, work.sft, work.reward_model
    size = work.generate.batch_size
    if stage in ("sft", "eval"):
        tokens, parts = batch_tokens(work, sft.batch_size, 1, sft.max_tokens)
        tokens = tokens._replace(every=bool(sft.prompt_loss))
        peak = training_pass(config, how, ("language",), tokens, parts)
        yield Moment("a training step", *peak)
    if stage == "train-rm":
        tokens, parts = batch_tokens(work, rm.batch_size, 1, rm.max_tokens)
        yield Moment("a training step", *training_pass(config, how, ("class",), tokens, parts))
    group = {"train": ppo.responses_per_prompt, "generate": work.generate.samples_per_session}
    if stage == "train":
        minibatch = min(ppo.minibatch_size, ppo.batch_size * ppo.responses_per_prompt)
        tokens, parts = batch_tokens(work, minibatch, ppo.responses_per_prompt, ppo.max_tokens)
        policy = training_pass(config, how, ("policy",), tokens, parts)
        of_critic = 0
        if with_critic(work):
            value = training_pass(config, how, ("value",), tokens, parts)
            both = policy.gradients + value.gradients
            yield Moment("the critic's update", policy.gradients + value.nbytes, both)
            of_critic = value.gradients if parts > 1 else 0
        yield Moment("the policy's update", policy.nbytes + of_critic,
                     policy.gradients + of_critic, policy.logits)  # fmt: skip
        rows = ppo.batch_size * ppo.responses_per_prompt
        tokens, _ = batch_tokens(work, rows, ppo.responses_per_prompt, ppo.max_tokens)
        read = reading_pass(config, how, tokens)
        yield Moment("reading the answers", read.nbytes, logits=read.logits)
        size = min(size, rows)
    if stage in SAMPLING and work.rollout == "vllm":
        engine = engine_need(config, how, work, size)
        yield Moment("vLLM's sampling", engine.nbytes, 0, 0, engine.cache)
    elif stage in SAMPLING:
        tokens, _ = batch_tokens(work, size, group.get(stage, 1), 2**62)
        sampled = sampling_pass(config, how.dtype, tokens)
        yield Moment("sampling", sampled.nbytes, 0, sampled.logits, sampled.cache)


class EngineNeed(NamedTuple):
    """Bytes that vLLM takes while it samples, and the answers that it has under way at once."""

    nbytes: int
    weights: int
    cache: int
    answers: int


def engine_need(
    config: PretrainedConfig, how: Holding, work: Work, rows: int
) -> EngineNeed:
    """Its share of a GPU, whatever it needs of it; on a CPU what the keys and values take.

    answers: less than 1 where its copy of the weights leaves no room in the share.
    """
    from tppo.models.memory import kept_nbytes
    from tppo.models.meta import meta_model, sizes
    from tppo.models.rollout.engine import cpu_cache

    weights = sizes(meta_model(config, replace(how, lora=None)), "language").weights
    row = kept_nbytes(config, how.dtype) * (work.prompt_tokens + work.response_tokens)
    if how.gpu_nbytes is None:
        cache = cpu_cache(rows, row)
        return EngineNeed(weights + cache, weights, cache, min(rows, cache // row))
    share = int(work.vllm.memory_share * how.gpu_nbytes)
    cache = max(share - weights, 0)
    return EngineNeed(share, weights, cache, min(rows, cache // row))


def batch_tokens(work: Work, rows: int, group: int, most: int) -> tuple[Any, int]:
    """What a model reads at once of `rows` responses, `group` a prompt, and in how many parts.

    most: tokens in a part, as `max_tokens`.
    """
    from tppo.models.memory import Tokens

    prompt, response = work.prompt_tokens, work.response_tokens
    group = min(group, rows)
    if work.prefix == "dense" or group == 1:
        part = max(1, min(rows, most // (prompt + response)))
        return Tokens(part, 1, prompt, response, shared=False), -(-rows // part)
    cost = prompt + group * response
    if cost > most:  # the answers of one prompt in several parts, each with the prompt
        part = max(1, (most - prompt) // response)
        return Tokens(1, part, prompt, response, shared=True), -(-rows // part)
    part = min(-(-rows // group), most // cost)
    return Tokens(part, group, prompt, response, shared=True), -(-rows // (part * group))


class Level(NamedTuple):
    """Settings to turn, each level with those before it."""

    recompute: bool
    max_tokens: int
    batch_size: int


MANY = 2**62
LEVELS = (
    Level(False, MANY, MANY), Level(True, MANY, MANY), Level(True, 8_192, 64),
    Level(True, 2_048, 16),
)  # fmt: skip
SECTION = {"sft": "sft", "train-rm": "reward-model", "train": "ppo", "eval": "sft"}


def flags(level: int, stage: str) -> str:
    """What to type for a stage to have the settings of a level."""
    recompute, max_tokens, batch_size = LEVELS[level]
    found = []
    if recompute and stage in SECTION:
        found.append("--model.gradient-checkpointing")
    if max_tokens < MANY and stage in SECTION:
        found.append(f"--{SECTION[stage]}.max-tokens {max_tokens}")
    if batch_size < MANY and stage in ("generate", "train", "eval"):
        found.append(f"--generate.batch-size {batch_size}")
    return " ".join(found)


def turned(level: Level, how: Holding, work: Work) -> tuple[Holding, Work]:
    """How models are held and the settings of a level; what is lower already stays."""
    most = level.max_tokens
    sft = replace(work.sft, max_tokens=min(work.sft.max_tokens, most))
    rm = replace(work.reward_model, max_tokens=min(work.reward_model.max_tokens, most))
    ppo = replace(work.ppo, max_tokens=min(work.ppo.max_tokens, most))
    size = min(work.generate.batch_size, level.batch_size)
    generate = replace(work.generate, batch_size=size)
    work = replace(work, sft=sft, reward_model=rm, ppo=ppo, generate=generate)
    how = replace(how, recompute=how.recompute or level.recompute)
    return how, work


def first_level(
    config: PretrainedConfig,
    how: Holding,
    work: Work,
    stages: Sequence[str],
    guide: PretrainedConfig | None = None,
) -> int | None:
    """The first of LEVELS with which all of the stages fit the GPU; None where none does."""
    assert how.gpu_nbytes is not None
    left = list(stages)
    for number, level in enumerate(LEVELS):
        used, chosen = turned(level, how, work)
        left = [s for s in left
                if need(s, config, used, chosen, guide).total > how.gpu_nbytes]  # fmt: skip
        if not left:
            return number
    return None
