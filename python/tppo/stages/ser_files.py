"""SER (`tppo.methods.ser`) on a file of preferences: `tppo ser --pairs`, and `tppo.ser`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tppo.config import Config, fill_defaults
from tppo.errors import DataError
from tppo.methods.config import RewardModelConfig, SERConfig
from tppo.methods.ser import Doubtful
from tppo.models.config import AdapterConfig, ModelConfig, Prefix
from tppo.rewards.sentence_model import SentenceModel, SentenceModelReward
from tppo.stages.artifacts import SER_MODEL, SER_REPORT
from tppo.stages.on_files import Base, base_of, check_arguments, check_labelled, mark_of, need, once
from tppo.stages.preferences import Preference, encoded, read_preferences
from tppo.stages.ser import STAGE, Split, new_reader, pair_rounds, split
from tppo.store.jsonl import plain, read_json


class SERResult(NamedTuple):
    """What `tppo.ser` gives."""

    report: dict[str, Any]
    """As `report.json` has it: a row a round, and of models that had true labels."""
    model: Path
    """Folder of the last model: a causal LM's, with a head beside it."""
    reward: SentenceModelReward
    """Pays the last model's probability at the end of an answer: for `tppo.PPOTrainer`."""


def ser(
    model: str | Path,
    pairs: Any,
    *,
    heldout: Any = None,
    unlabelled: Any = None,
    config: SERConfig | None = None,
    training: RewardModelConfig | None = None,
    loading: ModelConfig | None = None,
    lora: AdapterConfig | None = None,
    skip_bad: bool = False,
    out: str | Path = "runs/ser",
    seed: int = 0,
    device: str = "auto",
    prefix: Prefix = "shared",
) -> SERResult:
    """Train a reward model from a share of labelled pairs, by self-labelling rounds.

        result = tppo.ser("path/or/hub-id", "pairs.jsonl", unlabelled="more.jsonl")
        tppo.PPOTrainer("path/or/hub-id", reward=result.reward, prompts=prompts).train()

    model: what `--model` takes; the trunk of the reward model, with a new head.
    pairs: a JSONL file, or rows, of {"prompt", "chosen", "rejected"}, texts or chats; without
        "prompt" whole chats, or texts in HH-RLHF's layout.  Of `config.seed_share` of the prompts
        the labels are used; those of the others are hidden, and figures know them.
    heldout: more of them, for figures; by default `config.heldout_share` of the prompts of `pairs`.
    unlabelled: a file, or rows, of {"prompt", "answers": [one, another]}.
    training: epochs, batch_size, lr (by default 1e-5, with LoRA 1e-4), grad_norm and max_tokens.
    skip_bad: leave pairs out that are wrong, instead of stopping at the first.
    out: folder that gets `ser/model`, `ser/report.json` and, while it runs, checkpoints.

    A script that was killed goes on from its newest checkpoint when it runs again with the same
    arguments; one that has finished is not repeated.
    Errors: DataError naming the argument, or file and line.
    """
    check_arguments(
        model, device, prefix, seed, config=(config, SERConfig),
        training=(training, RewardModelConfig), loading=(loading, ModelConfig),
        lora=(lora, AdapterConfig),
    )  # fmt: skip
    config, loading, lora = config or SERConfig(), loading or ModelConfig(), lora or AdapterConfig()
    if config.labels != "pairs":
        raise DataError(f"config.labels was {config.labels!r}, expected 'pairs': of a file of "
                        "preferences no word is labelled")  # fmt: skip
    known = Config(reward_model=training or RewardModelConfig(), lora=lora)
    training = fill_defaults(known, pretrained=True).reward_model
    sources = {"pairs": pairs, "heldout": heldout, "unlabelled": unlabelled}
    given = {name: [] if source is None else read_preferences(source, name, skip_bad=skip_bad)
             for name, source in sources.items()}  # fmt: skip
    check_labelled([*given["pairs"], *given["heldout"]],
                   "; pairs without a label belong into `unlabelled`")  # fmt: skip
    base = base_of(model, loading, device)
    parts = _parts(given, base, config, seed, skip_bad)
    start = partial(new_reader, base.path, base.tokenizer, base.device, config, training,
                    loading=loading, lora=lora, seed=seed, prefix=prefix)  # fmt: skip
    identity = {
        "given": mark_of(given), "ser": plain(config), "training": plain(training),
        "dtype": loading.dtype, "lora": plain(lora) if lora.on else None, "prefix": prefix,
    }  # fmt: skip
    final = once(STAGE, out, base, identity, seed, lambda work: pair_rounds(
        work, start, parts, base.tokenizer, config, training, seed))  # fmt: skip
    last = SentenceModel.load(final / SER_MODEL.name, base.device, loading.dtype)
    reward = SentenceModelReward(last, scale=config.scale, max_tokens=training.max_tokens)
    return SERResult(read_json(final / SER_REPORT.name), final / SER_MODEL.name, reward)


def ser_on_files(
    pairs: Path | None,
    heldout: Path | None,
    unlabelled: Path | None,
    model: Path | None,
    settings: Config,
    **options: Any,
) -> None:
    """What `tppo ser --pairs` does: `ser` with the settings of a run.

    Errors: DataError naming what is not given.
    """
    pairs, model = need(pairs, model, "that the reward model starts from")
    ser(model, pairs, heldout=heldout, unlabelled=unlabelled, config=settings.ser,
        training=settings.reward_model, loading=settings.model, lora=settings.lora,
        prefix=settings.prefix, **options)  # fmt: skip


def _parts(
    given: Mapping[str, Sequence[Preference]],
    base: Base,
    config: SERConfig,
    seed: int,
    skip_bad: bool,
) -> Split:
    items = {name: encoded(pairs, base.tokenizer, base.positions, skip_bad=skip_bad)
             for name, pairs in given.items()}  # fmt: skip
    by_prompt: dict[tuple[int, ...], list[Doubtful]] = {}
    for item in items["pairs"]:
        by_prompt.setdefault(tuple(item.prompt_ids), []).append(item)
    if len(by_prompt) < 2:
        raise DataError(f"{given['pairs'][0].place}: pairs had {len(by_prompt)} prompt, expected "
                        "at least 2")  # fmt: skip
    parts = split(by_prompt, items["unlabelled"], config, seed)
    if items["heldout"]:
        parts = parts._replace(pool=[*parts.pool, *parts.heldout], heldout=items["heldout"])
    return parts
