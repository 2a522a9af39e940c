"""SER: a reward model that labels pairs for itself (`tppo.methods.ser`), as `tppo ser` in a run of
stages and on a file of preferences, and as `tppo.ser` in a script.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from tppo.config import Config, fill_defaults
from tppo.errors import DataError
from tppo.methods.config import RewardModelConfig, SERConfig
from tppo.methods.reward_model import IRRELEVANT, RELEVANT, LabelledAnswer, PolicyTokens
from tppo.methods.sentence_model import SentenceReader
from tppo.methods.ser import Doubtful, Learner, Pairs, State, evolve
from tppo.methods.ser_words import Tokens
from tppo.models.adapters import add_to_classifier, need_peft, save_classifier
from tppo.models.config import AdapterConfig, ModelConfig, Prefix
from tppo.models.folder import save_weights
from tppo.models.hub import locate
from tppo.models.load import load_from, resolve_device
from tppo.models.own_tokens import start_reward_model
from tppo.models.policy import load_trained, trained_state
from tppo.models.recompute import recompute_layers
from tppo.models.tokenizer import load_tokenizer
from tppo.progress import say
from tppo.rewards.sentence_model import SentenceModel, SentenceModelReward
from tppo.stages.artifacts import ANSWERS, LABELS, SER_MODEL, SER_REPORT, SFT_MODEL
from tppo.stages.given import check_model, check_place, check_sections, checked_seed
from tppo.stages.lengths import positions_of
from tppo.stages.models import sft_origin
from tppo.stages.preferences import Preference, encoded, read_preferences
from tppo.stages.reward_rows import policy_rows, policy_twins
from tppo.stages.run import Run
from tppo.stages.session_pairs import session_pairs
from tppo.store.checkpoint import load_latest, save_checkpoint
from tppo.store.jsonl import plain, read_json, write_json, write_jsonl
from tppo.store.run_folder import KEPT, RunFolder

Item = TypeVar("Item")
STAGE = "ser"


class Split(NamedTuple):
    """Which items are labelled, which are to be labelled by the model, which judge it."""

    seed: list[Any]
    pool: list[Any]
    heldout: list[Any]
    keys: list[Any]  # what the items of the seed belong to, in their order


def split(
    labelled: Mapping[Any, Sequence[Item]], others: Sequence[Item], config: SERConfig, seed: int
) -> Split:
    """Items by what they belong to (a session, a prompt), which stays together.

    others: that nobody has labelled.
    Errors: DataError where a share leaves none.
    """
    groups = random.Random(f"{seed}/reward").sample(sorted(labelled), len(labelled))
    n_heldout = max(1, round(config.heldout_share * len(groups)))
    train = groups[n_heldout:]
    n_seed = round(config.seed_share * len(train))
    if not n_seed:
        raise DataError(
            f"ser.seed_share was {config.seed_share:g}: of {len(train)} prompts with labels that "
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
    """The rounds, with a checkpoint after each; `model/`, `rounds.jsonl` and `report.json`.

    truth: whether the true label of an item is known.
    """
    state, kept = State[Any](), load_latest(out / KEPT)
    if kept is not None:
        found = kept.state
        state = State(found["rounds"], {int(i): x for i, x in found["labels"].items()})
        load_trained(learner.model, kept.weights["model"])  # type: ignore[attr-defined]
        say(f"ser: resumes after round {len(state.rounds) - 1}")

    def keep(state: State[Any]) -> None:
        weights = {"model": trained_state(learner.model)}  # type: ignore[attr-defined]
        save_checkpoint(out / KEPT, len(state.rounds), weights, {}, asdict(state))
        say(_told(state.rounds[-1]))

    evolve(learner, parts.seed, parts.pool, config, state, keep)
    save(learner.model, out / SER_MODEL.name)  # type: ignore[attr-defined]
    everything = [*parts.seed, *parts.pool]
    of_all: dict[str, Any] | None = None
    if config.all_labels and parts.pool and all(map(truth, everything)):
        learner.train(everything, [None] * len(everything))
        of_all = {"trained_on": len(everything), **learner.figures()}
        say(_told({"round": "all labels", **of_all}))
    report = {
        "labels": config.labels, "seed": len(parts.seed), "pool": len(parts.pool),
        "heldout": len(parts.heldout), "rounds": state.rounds, "stopped": state.stopped,
        "all_labels": of_all,
    }  # fmt: skip
    write_jsonl(out / "rounds.jsonl", state.rounds)
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


# On a file of preferences.


class SERResult(NamedTuple):
    """What `tppo.ser` gives."""

    report: dict[str, Any]
    """As `report.json` has it: a row a round, and of the model that had all labels."""
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
    out: folder that gets `ser/model`, `ser/report.json` and, while it runs, a checkpoint a round.

    A script that was killed goes on behind its last whole round when it runs again with the same
    arguments; one that has finished is not repeated.
    Errors: DataError naming the argument, or file and line.
    """
    check_model(model)
    check_sections(config=(config, SERConfig), training=(training, RewardModelConfig),
                   loading=(loading, ModelConfig), lora=(lora, AdapterConfig))  # fmt: skip
    check_place(device, prefix)
    config, loading, lora = config or SERConfig(), loading or ModelConfig(), lora or AdapterConfig()
    if config.labels != "pairs":
        raise DataError(f"config.labels was {config.labels!r}, expected 'pairs': of a file of "
                        "preferences no word is labelled")  # fmt: skip
    if lora.on:
        need_peft()
    known = Config(reward_model=training or RewardModelConfig(), lora=lora)
    training = fill_defaults(known, pretrained=True).reward_model
    given = {"pairs": read_preferences(pairs, "pairs", skip_bad=skip_bad)}
    for name, source in (("heldout", heldout), ("unlabelled", unlabelled)):
        given[name] = [] if source is None else read_preferences(source, name, skip_bad=skip_bad)
    for pair in (*given["pairs"], *given["heldout"]):
        if not pair.labelled:
            raise DataError(f"{pair.place}: had 'answers', expected 'chosen' and 'rejected'; pairs "
                            "without a label belong into `unlabelled`")  # fmt: skip
    path = locate(model, loading.revision, flag="model", pickles=loading.allow_pickle)
    tokenizer = load_tokenizer(path)
    at = resolve_device(device)
    start = partial(new_reader, path, tokenizer, at, config, training, loading=loading, lora=lora,
                    seed=checked_seed(seed), prefix=prefix)  # fmt: skip
    parts = _parts(given, tokenizer, positions_of(load_from(AutoConfig, path)), config, seed)
    identity = {
        "given": hashlib.sha256(json.dumps(plain(given)).encode()).hexdigest(),
        "ser": plain(config), "training": plain(training), "dtype": loading.dtype,
        "lora": plain(lora) if lora.on else None, "prefix": prefix,
    }  # fmt: skip
    folder, final = RunFolder(out), Path(out) / STAGE
    if folder.done(STAGE, [path], identity, seed):
        say(f"{final}: finished before, nothing is trained again")
    else:
        with folder.lock(), folder.stage(STAGE, [path], identity, seed, resume=True) as work:
            learner = Pairs(start, parts.heldout, config, training, seed)
            save = partial(_save_pairs, tokenizer=tokenizer)
            run_rounds(work, learner, parts, config, save, _is_known)
    last = SentenceModel.load(final / SER_MODEL.name, at, loading.dtype)
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
    for name, value, expected in (
        ("--pairs", pairs, "a JSONL file of pairs; --heldout and --unlabelled go with it"),
        ("--model", model, "the model that the reward model starts from"),
    ):
        if value is None:
            raise DataError(f"{name} was not given, expected {expected}")
    assert model is not None
    ser(model, pairs, heldout=heldout, unlabelled=unlabelled, config=settings.ser,
        training=settings.reward_model, loading=settings.model, lora=settings.lora,
        prefix=settings.prefix, **options)  # fmt: skip


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


def _parts(
    given: Mapping[str, Sequence[Preference]],
    tokenizer: PreTrainedTokenizerBase,
    positions: int,
    config: SERConfig,
    seed: int,
) -> Split:
    items = {name: encoded(pairs, tokenizer, positions) for name, pairs in given.items()}
    by_prompt: dict[tuple[int, ...], list[Doubtful]] = {}
    for item in items["pairs"]:
        by_prompt.setdefault(tuple(item.prompt_ids), []).append(item)
    if len(by_prompt) < 2:
        raise DataError(f"{given['pairs'][0].place}: pairs had 1 prompt, expected at least 2")
    parts = split(by_prompt, items["unlabelled"], config, seed)
    if items["heldout"]:
        parts = parts._replace(pool=[*parts.pool, *parts.heldout], heldout=items["heldout"])
    return parts


def _is_known(item: Doubtful) -> bool:
    return item.better is not None


def _save_pairs(model: SentenceModel, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model.save(folder, tokenizer)


# In a run of stages.


def ser_stage(run: Run) -> None:
    """SER on the generated answers of a run, by pairs of them or by the labels of their words."""
    with run.stage(STAGE, resume=True) as out:
        config, training = run.config.ser, run.config.reward_model
        if config.labels == "words":
            _words(run, out, config, training)
            return
        labelled, others = session_pairs(run.paths(ANSWERS), run.paths(LABELS))
        parts = split(labelled, others, config, run.seed)
        start = partial(
            new_reader, run.path(SFT_MODEL), run.tokenizer, run.device, config, training,
            loading=run.config.model, lora=run.config.lora, seed=run.seed,
            prefix=run.config.prefix,
        )  # fmt: skip
        learner = Pairs(start, parts.heldout, config, training, run.seed)
        save = partial(_save_pairs, tokenizer=run.tokenizer)
        run_rounds(out, learner, parts, config, save, _is_known)


def _words(run: Run, out: Path, config: SERConfig, training: RewardModelConfig) -> None:
    if training.model is not None:
        raise DataError(f"--reward-model.model was {training.model!r}, expected none with "
                        "--ser.labels words: tokens are labelled in the policy's tokenizer")
    rows, twins = policy_rows(run), policy_twins(run)
    parts = split(rows, [], config, run.seed)
    have = {label for row in parts.seed for label in row.categories}
    for label, name in ((IRRELEVANT, "irrelevant"), (RELEVANT, "relevant")):
        if label not in have:
            raise DataError(
                f"ser.seed_share was {config.seed_share:g}: none of the words of {len(parts.seed)} "
                f"answers is {name}, expected both classes; a larger share, or more answers "
                "(--generate.samples)"
            )
    repeated = [twin for session in parts.keys for twin in twins.get(session, ())]
    parts = parts._replace(seed=parts.seed + repeated)

    def start() -> PolicyTokens:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            model, _ = start_reward_model(None, run.path(SFT_MODEL), run.tokenizer, run.device,
                                          run.config.model.dtype)  # fmt: skip
        if run.config.lora.on:
            add_to_classifier(model, run.config.lora, seed=run.seed, origin=sft_origin(run))
        if run.config.model.gradient_checkpointing:
            recompute_layers(model)
        return PolicyTokens(model, run.tokenizer.pad_token_id, run.config.prefix)

    def save(model: Any, folder: Path) -> None:
        save_classifier(model, folder) if run.config.lora.on else save_weights(model, folder)
        run.tokenizer.save_pretrained(folder)

    learner = Tokens(start, parts.heldout, config, training, run.seed,
                     run.config.label.sentence_threshold)  # fmt: skip
    run_rounds(out, learner, parts, config, save, _is_labelled)


def _is_labelled(item: LabelledAnswer) -> bool:
    return min(item.categories) >= 0
