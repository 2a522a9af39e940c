"""PIT (`tppo.methods.pit`) on a file of preferences: `tppo pit --pairs`, and `tppo.pit`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tppo.config import Config, fill_defaults
from tppo.errors import DataError
from tppo.methods.config import PITConfig, PPOConfig, RewardModelConfig, SFTConfig
from tppo.models.config import (
    AdapterConfig,
    GenerateConfig,
    ModelConfig,
    Prefix,
    RolloutName,
    VLLMConfig,
)
from tppo.models.rollout import Sampling
from tppo.stages.artifacts import PIT_POLICY, PIT_REPORT
from tppo.stages.given import as_sampler, given_rollout
from tppo.stages.on_files import base_of, check_arguments, check_labelled, mark_of, need, once
from tppo.stages.pit_parts import STAGE, Better, Training, encoder, train_pit
from tppo.stages.preferences import read_preferences, spelled
from tppo.stages.prompts import encode_given
from tppo.store.jsonl import read_json

LONGEST = 256  # tokens of an answer by default


class PITResult(NamedTuple):
    """What `tppo.pit` gives."""

    report: dict[str, Any]
    model: Path
    """Folder of the policy."""
    training: Training

    def improve(
        self, prompts: Sequence[Any], first: Sequence[str] | None = None, *, steps: int = 3,
        temperature: float | None = None, seed: int = 0,
    ) -> list[list[str]]:  # fmt: skip
        """y_0, y_1, .. of each prompt, the answers of a step in one list.

        first: y_0; by default the answers of the model that PIT started from.
        """
        training = self.training
        warm = training.config.generate.temperature if temperature is None else temperature
        sampling = Sampling(training.cap, warm, seed)
        if first is None:
            base = training.improver(training.policy(training.base))
            first = base.texts(base.step(prompts, [""] * len(prompts), sampling))
        policy = training.improver(training.policy(self.model))
        later = policy.steps(prompts, first, steps, replace(sampling, seed=seed + 1))
        return [list(first), *map(policy.texts, later)]


def pit(
    model: str | Path,
    pairs: Any,
    *,
    config: PITConfig | None = None,
    sft: SFTConfig | None = None,
    gap: RewardModelConfig | None = None,
    ppo: PPOConfig | None = None,
    generate: GenerateConfig | None = None,
    loading: ModelConfig | None = None,
    lora: AdapterConfig | None = None,
    skip_bad: bool = False,
    out: str | Path = "runs/pit",
    seed: int = 0,
    device: str = "auto",
    prefix: Prefix = "shared",
    rollout: RolloutName | VLLMConfig = "hf",
) -> PITResult:
    """Train a policy that betters answers, from pairs of a better and a worse one.

        result = tppo.pit("path/or/hub-id", "pairs.jsonl")
        y0, y1, y2, y3 = result.improve(["a prompt"], steps=3)

    model: what `--model` takes.  pairs: as `tppo.ser` takes them, all of them labelled.
    sft, gap, ppo: settings of the three trainings; `ppo.steps` is not used, the stages have their
        own in `config`.  generate: `max_new_tokens` (0: as the longest answer of the pairs, at most
        256), `temperature` and `batch_size`.
    rollout: who samples, as in `PPOTrainer`.
    out: folder that gets `pit/model`, `pit/gap`, `pit/report.json` and the metrics of both stages.

    A script that was killed goes on in the part, and in PPO behind the checkpoint, where it was.
    Errors: DataError naming the argument, or file and line.
    """
    check_arguments(
        model, device, prefix, seed, config=(config, PITConfig), sft=(sft, SFTConfig),
        gap=(gap, RewardModelConfig), ppo=(ppo, PPOConfig), generate=(generate, GenerateConfig),
        loading=(loading, ModelConfig), lora=(lora, AdapterConfig),
    )  # fmt: skip
    sampler = as_sampler(rollout, generate or GenerateConfig(), prefix)
    given = Config(
        rollout=sampler.rollout, vllm=sampler.vllm,
        sft=sft or SFTConfig(), reward_model=gap or RewardModelConfig(), ppo=ppo or PPOConfig(),
        generate=generate or GenerateConfig(), pit=config or PITConfig(), prefix=prefix,
        model=loading or ModelConfig(), lora=lora or AdapterConfig(),
    )  # fmt: skip
    filled = fill_defaults(given, pretrained=True)
    passes = None if ppo is None else ppo.max_passes  # by default as many as the steps take
    filled = replace(filled, ppo=replace(filled.ppo, max_passes=passes))
    read = read_preferences(pairs, "pairs", skip_bad=skip_bad)
    check_labelled(read)
    base = base_of(model, filled.model, device)
    rows = spelled(read, base.tokenizer, base.positions, skip_bad=skip_bad)
    items = [Better(row.pair.prompt, *row.pair.answers) for row in rows]
    longest = max(len(ids) for row in rows for ids in (row.first, row.second))
    cap = filled.generate.max_new_tokens or min(longest, LONGEST)
    room = base.positions - max(cap, longest)
    if room < 1:
        raise DataError(f"generate.max_new_tokens was {cap}, expected less than the "
                        f"{base.positions} positions of the model")  # fmt: skip
    encode = encoder(room, partial(encode_given, base.tokenizer, place="pairs"))
    training = Training(base.path, base.tokenizer, base.device, encode, cap, seed, filled)
    identity = training.settings() | {"pairs": mark_of(items)}
    final = once(STAGE, out, base, identity, seed,
                 lambda work: train_pit(work, training, items))  # fmt: skip
    return PITResult(read_json(final / PIT_REPORT.name), final / PIT_POLICY.name, training)


def pit_on_files(
    pairs: Path | None, model: Path | None, settings: Config, **options: Any
) -> None:
    """What `tppo pit --pairs` does: `pit` with the settings of a run.

    Errors: DataError naming what is not given.
    """
    pairs, model = need(pairs, model, "to train")
    pit(model, pairs, config=settings.pit, sft=settings.sft, gap=settings.reward_model,
        ppo=settings.ppo, generate=settings.generate, loading=settings.model, lora=settings.lora,
        prefix=settings.prefix, rollout=given_rollout(settings), **options)  # fmt: skip
