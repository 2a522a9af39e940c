"""SER (`tppo.methods.ser`) in a run of stages: the rounds with what they leave on the disk, by
pairs of answers and by labels of words.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from tppo.errors import DataError
from tppo.labels.sources import by_hand
from tppo.methods.config import RewardModelConfig, SERConfig
from tppo.methods.reward_model import IRRELEVANT, RELEVANT, PolicyTokens
from tppo.methods.sentence_model import SentenceReader
from tppo.methods.ser import Learner, Pairs, State, evolve
from tppo.methods.ser_words import Tokens
from tppo.models.config import AdapterConfig, ModelConfig, Prefix
from tppo.models.keeper import check, restore, state_of
from tppo.models.policy import trained_state
from tppo.progress import say
from tppo.rewards.sentence_model import SentenceModel
from tppo.stages.artifacts import (
    ANSWERS,
    EQUALS,
    LABELS,
    PREFERENCES,
    SER_MODEL,
    SER_REPORT,
    SFT_MODEL,
)
from tppo.stages.reward_model import new_reward_model, save_reward_model
from tppo.stages.reward_rows import check_sessions, policy_rows, policy_twins, without_label
from tppo.stages.run import Run
from tppo.stages.session_pairs import preferred_pairs, session_pairs
from tppo.store.checkpoint import Checkpoints, load_latest, save_checkpoint
from tppo.store.jsonl import write_json, write_jsonl
from tppo.store.run_folder import KEPT

Item = TypeVar("Item")
STAGE = "ser"
SEED_SHARE = 0.15  # of the paper


class Split(NamedTuple):
    """Which items are labelled, which are to be labelled by the model, which judge it."""

    seed: list[Any]
    pool: list[Any]
    heldout: list[Any]
    keys: list[Any]  # what the items of the seed belong to, in their order


def split(
    labelled: Mapping[Any, Sequence[Item]],
    others: Sequence[Item],
    config: SERConfig,
    seed: int,
    hand: bool = False,
    checks: Collection[Any] = (),
) -> Split:
    """Items by what they belong to (a session, a prompt), which stays together.

    others: that nobody has labelled.  hand: whether people have labelled, who gave labels to have
    them used.  checks: what is held out before the rest.
    Errors: DataError where a share leaves none.
    """
    groups = random.Random(f"{seed}/reward").sample(sorted(labelled), len(labelled))
    groups.sort(key=lambda group: group not in checks)
    n_heldout = max(1, round(config.heldout_share * len(groups)),
                    min(len(checks), len(groups) // 2))  # fmt: skip
    train = groups[n_heldout:]
    share = config.seed_share or (1.0 if hand else SEED_SHARE)
    n_seed = round(share * len(train))
    if not n_seed:
        raise DataError(
            f"ser.seed_share was {share:g}: of {len(train)} prompts with labels that "
            f"is none, expected a share of at least {1 / max(1, len(train)):.2g}"
        )
    chosen = set(random.Random(f"{seed}/ser").sample(train, n_seed))
    return Split(
        [item for key in train if key in chosen for item in labelled[key]],
        [item for key in train if key not in chosen for item in labelled[key]] + [*others],
        [item for key in groups[:n_heldout] for item in labelled[key]],
        [key for key in train if key in chosen],
    )


def run_rounds(
    out: Path,
    learner: Learner[Any, Any],
    parts: Split,
    config: SERConfig,
    save: Callable[[Any, Path], None],
    truth: Callable[[Any], bool],
) -> dict[str, Any]:
    """The rounds; `model/`, `rounds.jsonl` and `report.json`.  There is a checkpoint after each
    round, and within one that takes long those of its training, in a folder of their own.

    truth: whether the true label of an item is known.
    """
    state, kept = State[Any](), load_latest(out / KEPT)

    def keep_in(name: str) -> None:
        learner.keeper = Checkpoints(out / KEPT / name, f"ser, {name.replace('-', ' ')}")

    if kept is not None:
        found = state_of(kept, {"rounds": [dict], "labels": dict, "stopped": str})
        state = State(found["rounds"], {int(i): x for i, x in found["labels"].items()})
        check(kept, rounds=(len(state.rounds), kept.step))
        restore(kept, {"model": learner.model})  # type: ignore[attr-defined]
        say(f"ser: resumes after round {len(state.rounds) - 1}")

    def keep(state: State[Any]) -> None:
        weights = {"model": trained_state(learner.model)}  # type: ignore[attr-defined]
        save_checkpoint(out / KEPT, len(state.rounds), weights, {}, asdict(state))
        shutil.rmtree(out / KEPT / f"round-{len(state.rounds) - 1}", ignore_errors=True)
        write_jsonl(out / "rounds.jsonl", state.rounds)
        say(_told(state.rounds[-1]))

    evolve(learner, parts.seed, parts.pool, config, state, keep,
           lambda state: keep_in(f"round-{len(state.rounds)}"))  # fmt: skip
    write_jsonl(out / "rounds.jsonl", state.rounds)  # a checkpoint alone has them after a kill
    save(learner.model, out / SER_MODEL.name)  # type: ignore[attr-defined]
    same = [*parts.seed, *(parts.pool[i] for i in sorted(state.labels))]
    everything, beside = [*parts.seed, *parts.pool], dict[str, Any]()
    if config.all_labels and parts.pool and all(map(truth, everything)):
        for name, items in (("true labels", same), ("all labels", everything)):
            if name == "true labels" and len(same) in (len(parts.seed), len(everything)):
                continue  # it is the seed's model, or that of all labels
            keep_in(name.replace(" ", "-"))
            learner.train(items, [None] * len(items))
            beside[name] = {"trained_on": len(items), **learner.figures()}
            say(_told({"round": name, **beside[name]}))
    report = {
        "labels": config.labels, "seed": len(parts.seed), "pool": len(parts.pool),
        "heldout": len(parts.heldout), "rounds": state.rounds, "stopped": state.stopped,
        "true_labels": beside.get("true labels"), "all_labels": beside.get("all labels"),
    }  # fmt: skip
    write_json(out / SER_REPORT.name, report)
    return report


def _told(row: Mapping[str, Any]) -> str:
    """A row of the report as a line of progress."""
    name = f"round {row['round']}" if isinstance(row["round"], int) else row["round"]
    parts = [f"trained on {row['trained_on']}"]
    if row.get("kept"):
        right = row["kept_accuracy"]
        shown = "" if right is None else f", {right:.1%} of these labels are right"
        parts.append(f"{row['kept']} kept ({row['status']}){shown}")
    parts += [f"held-out {key} {row[key]:.3f}" for key in ("accuracy", "auc")
              if row.get(key) is not None]  # fmt: skip
    return f"ser, {name}: {'; '.join(parts)}"


def new_reader(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    config: SERConfig,
    training: RewardModelConfig,
    *,
    loading: ModelConfig,
    lora: AdapterConfig,
    seed: int,
    prefix: Prefix,
) -> SentenceReader:
    """The model of whole answers before any training, and how it reads."""
    model = SentenceModel.from_policy(
        path, device, config.pooling, loading.dtype, seed, lora=lora, pickles=loading.allow_pickle,
        recompute=loading.gradient_checkpointing,
    )  # fmt: skip
    return SentenceReader(model, tokenizer.pad_token_id, prefix, training.max_tokens)


def pair_rounds(
    out: Path,
    start: Callable[[], SentenceReader],
    parts: Split,
    tokenizer: PreTrainedTokenizerBase,
    config: SERConfig,
    training: RewardModelConfig,
    seed: int,
    *,
    few: bool = False,
) -> None:
    """The rounds by pairs of answers.  few: as in `tppo.methods.ser.Pairs`."""
    learner = Pairs(start, parts.heldout, config, training, seed, few)
    run_rounds(out, learner, parts, config, lambda model, folder: model.save(folder, tokenizer),
               lambda item: item.better is not None)  # fmt: skip


def ser_stage(run: Run) -> None:
    """SER on the generated answers of a run, by pairs of them or by the labels of their words."""
    with run.stage(STAGE, resume=True) as out:
        config, training = run.config.ser, run.config.reward_model
        if config.labels == "words":
            _word_rounds(run, out, config, training)
            return
        preferred, equal = run.path(PREFERENCES), run.path(EQUALS)
        hand = preferred.exists() or equal.exists()
        if hand:
            labelled, others = preferred_pairs(run.paths(ANSWERS), preferred, equal)
            say(f"ser: the seed is what people have said of pairs ({preferred}), and no label of "
                "an answer")  # fmt: skip
        else:
            labelled, others = session_pairs(run.paths(ANSWERS), run.paths(LABELS))
        start = partial(
            new_reader, run.path(SFT_MODEL), run.tokenizer, run.device, config, training,
            loading=run.config.model, lora=run.config.lora, seed=run.seed,
            prefix=run.config.prefix,
        )  # fmt: skip
        parts = split(labelled, others, config, run.seed, hand)
        pair_rounds(out, start, parts, run.tokenizer, config, training, run.seed, few=hand)


def _word_rounds(run: Run, out: Path, config: SERConfig, training: RewardModelConfig) -> None:
    if training.model is not None:
        raise DataError(f"--reward-model.model was {training.model!r}, expected none with "
                        "--ser.labels words: tokens are labelled in the policy's tokenizer")
    rows, twins = policy_rows(run), policy_twins(run)
    hand = any(by_hand(row.labeller) for of in rows.values() for row in of)
    parts = split(rows, without_label(run), config, run.seed, hand, check_sessions(run))
    have = {label for row in parts.seed for label in row.categories}
    for label, name in ((IRRELEVANT, "irrelevant"), (RELEVANT, "relevant")):
        if label not in have:
            raise DataError(
                f"none of the words of {len(parts.seed)} answers is {name}, expected both classes; "
                "a larger --ser.seed-share, or more labelled answers (--generate.samples)"
            )
    repeated = [twin for session in parts.keys for twin in twins.get(session, ())]
    parts = parts._replace(seed=parts.seed + repeated)
    learner = Tokens(
        lambda: PolicyTokens(new_reward_model(run)[0], run.tokenizer.pad_token_id,
                             run.config.prefix),
        parts.heldout, config, training, run.seed, run.config.label.sentence_threshold, hand,
    )  # fmt: skip
    run_rounds(out, learner, parts, config,
               lambda model, folder: save_reward_model(run, model, run.tokenizer, folder),
               lambda item: min(item.categories) >= 0)  # fmt: skip
