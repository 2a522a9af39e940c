"""What each stage depends on: the files that it reads, and the settings that change its result.

A setting that decides how fast, how often or whether at all something happens, but not what comes
of it, is in no list: changing it repeats no stage.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter
from typing import Any, NamedTuple

from tppo.config import Config
from tppo.labels.rule import RULE
from tppo.store.jsonl import plain


class Dependencies(NamedTuple):
    """Of one stage; a name such as `ppo.lr` is a setting, `ppo` a section, `-ppo.lr` without it."""

    files: tuple[str, ...]
    """In the run folder; what the user names is added by `Run`."""
    settings: tuple[str, ...]


HELD = "model.dtype"  # the type of weights in memory
SAMPLING = ("generate.max_new_tokens", "generate.batch_size", "prefix", HELD)  # of any temperature
JUDGED = ("train", "eval")  # stages whose result depends on the rule's verdicts, as its labels do
OPTIONAL = {
    "data/transfer.jsonl",  # only generated sessions have it
    "train/critic.safetensors",  # only where the advantage needs one
}

STAGES: dict[str, Dependencies] = {
    "data": Dependencies((), ()),
    "sft": Dependencies(
        ("data/train.jsonl", "data/heldout.jsonl"),
        ("sft", "generate.max_new_tokens", "prefix", HELD),
    ),
    "generate": Dependencies(("data/train.jsonl", "sft/model"), ("generate", "prefix", HELD)),
    "label": Dependencies(("data/train.jsonl", "generate/answers.jsonl"), ("label.labeller",)),
    "map": Dependencies(("sft/model", "generate/answers.jsonl", "label/labels.jsonl"), ()),
    "train-rm": Dependencies(
        ("sft/model", "generate/answers.jsonl", "label/labels.jsonl", "map/categories.jsonl"),
        (
            "reward_model", "-reward_model.model", "-reward_model.min_auc",
            "-reward_model.min_auc_sessions", "label.sentence_threshold", "prefix", HELD,
        ),
    ),
    "train": Dependencies(
        (
            "data/train.jsonl", "data/heldout.jsonl", "sft/model", "map/lengths.json",
            "train-rm/model", "train-rm/report.json",
        ),
        (
            "generate.temperature", *SAMPLING, "label.sentence_threshold", "ppo",
            "-ppo.checkpoint_every", "-ppo.verify_prefix", "-ppo.without_signal",
        ),
    ),
    "eval": Dependencies(
        (
            "data/train.jsonl", "data/test.jsonl", "data/transfer.jsonl", "sft/model",
            "train/model", "train/report.json",
        ),
        (
            "sft.lr", "sft.final_lr_share", "sft.batch_size", "sft.prompt_loss", "sft.grad_norm",
            "sft.max_tokens", *SAMPLING, "label.sentence_threshold", "eval.temperatures",
        ),
    ),
    "heat": Dependencies(
        (
            "data/train.jsonl", "data/test.jsonl", "sft/model", "map/lengths.json",
            "train-rm/model", "train/model", "train/critic.safetensors",
        ),
        (
            "generate.temperature", *SAMPLING, "ppo.reward", "ppo.reward_values",
            "ppo.length_alpha", "ppo.train_on_unlabelled", "ppo.bootstrap_truncated",
            "ppo.kl_coef", "ppo.gamma", "ppo.lam", "ppo.normalize", "ppo.max_tokens",
            "ppo.advantage", "ppo.responses_per_prompt", "eval.heat_users",
        ),
    ),
}  # fmt: skip

_OF_A_FILE = ("sessions.heldout_share", "sessions.test_share", "sessions.read")
_GENERATED = (
    "sessions.train_users", "sessions.heldout_users", "sessions.test_users",
    "sessions.transfer_users",
)  # fmt: skip
_OF_AN_ENDPOINT = (
    "label.endpoint", "-label.endpoint.base_url", "-label.endpoint.api_key_env",
    "-label.endpoint.concurrency", "-label.endpoint.max_retries", "-label.endpoint.timeout_s",
    "-label.endpoint.price_read", "-label.endpoint.price_written", "-label.endpoint.max_wait_s",
    "-label.endpoint.max_dropped",
)  # fmt: skip


def settings(stage: str, config: Config, *, from_file: bool, from_model: bool) -> dict[str, Any]:
    """The settings that the result of a stage depends on, by name.

    from_file, from_model: whether sessions are read, and whether SFT starts from a model.
    """
    names = list(STAGES[stage].settings)
    if stage == "data":
        names += _OF_A_FILE if from_file else _GENERATED
    elif stage == "sft" and not from_model:
        names += ["scratch"]
    elif stage == "label":
        rule = config.label.labeller == "rule"
        names += ["label.sentence_threshold"] if rule else _OF_AN_ENDPOINT
    found = _chosen(config, names)
    if stage in JUDGED or stage == "label" and config.label.labeller == "rule":
        found["rule"] = RULE
    return found


def _chosen(config: Config, names: Iterable[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in names:
        if name.startswith("-"):
            section, _, key = name.removeprefix("-").rpartition(".")
            del found[section][key]
        else:
            found[name] = plain(attrgetter(name)(config))
    return found
