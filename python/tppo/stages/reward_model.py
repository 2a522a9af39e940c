"""The train-rm stage: a token reward model of the labelled answers."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tppo import stopping
from tppo.errors import DataError
from tppo.methods.auc import auc_interval, shown_auc
from tppo.methods.reward_model import (
    PolicyTokens,
    Reader,
    evaluate_reward_model,
    figures_of,
    rate_tokens,
    relevant_share,
    train_reward_model,
)
from tppo.models.adapters import add_to_classifier, merged, save_classifier
from tppo.models.folder import save_weights
from tppo.models.keeper import history_of
from tppo.models.own_tokens import OwnTokens, start_reward_model
from tppo.models.probe import write_probe
from tppo.models.recompute import recompute_layers
from tppo.progress import say
from tppo.stages.artifacts import REWARD_MODEL, REWARD_REPORT, SFT_MODEL
from tppo.stages.models import sft_origin
from tppo.stages.reward_curve import LabelledParts, learning_curve, passes, split_labelled, tell
from tppo.stages.reward_rows import (
    check_sessions,
    own_rows,
    own_twins,
    policy_rows,
    policy_twins,
)
from tppo.stages.run import Run
from tppo.stages.trackers import followed
from tppo.store.checkpoint import Checkpoints
from tppo.store.jsonl import write_json
from tppo.store.run_folder import KEPT


def train_rm(run: Run) -> None:
    """The token reward model, its trunk started from SFT or from a folder of its own; resumes."""
    with stopping.deferrable(), run.stage("train-rm", resume=True) as out:
        model, tokenizer, reader = _new_reader(run)
        parts = _split(run, reader)
        rows, config = parts.training(), run.config.reward_model
        config = passes(config, rows)
        with followed(run.config.report_to, out, run.out, config) as journal:
            kept = Checkpoints(out / KEPT, "train-rm",
                               resumed=lambda found: journal.resume(history_of(found)))  # fmt: skip
            stopping.defer()
            train_reward_model(reader, rows, config, seed=run.seed, each=journal.write,
                               keeper=kept)  # fmt: skip
        rated, confusion = rate_tokens(reader, parts.heldout, config)
        report = figures_of(rated, confusion)
        report["auc_interval"] = auc_interval(rated, parts.heldout_sessions)
        report["auc_repeated"] = evaluate_reward_model(reader, parts.unseen, config)["auc"]
        report |= {"sessions": parts.sessions, "answers": len(parts.answers)}
        report["sources"] = sources = parts.sources(rated)
        report["labeller"] = next(iter(sources)) if len(sources) == 1 else list(sources)
        report["relevant_share"] = relevant_share(parts.answers)
        report["own_tokens"] = model.config.own_tokens
        save_reward_model(run, model, tokenizer, out / REWARD_MODEL.name, run.own_reward_model)
        auc, repeated = shown_auc(report["auc"], report["auc_interval"]), report["auc_repeated"]
        say(
            f"reward model: AUC {auc}, accuracy {report['accuracy']:.3f} on {len(parts.heldout)} "
            f"held-out answers; AUC {'unknown' if repeated is None else f'{repeated:.3f}'} where "
            "one of their queries is repeated"
        )
        del model, reader  # before others are trained beside it
        report["curve"] = learning_curve(
            parts, rated, lambda: _new_reader(run)[2], run.config.reward_model, run.seed,
            out / KEPT,
        )  # fmt: skip
        write_json(out / REWARD_REPORT.name, report)
        tell(report)


def _new_reader(run: Run) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Reader]:
    """A reward model before its training, its tokenizer, and how it reads."""
    model, tokenizer = new_reward_model(run, run.own_reward_model)
    if model.config.own_tokens:
        return model, tokenizer, OwnTokens(model, tokenizer)
    reader = PolicyTokens(model, run.tokenizer.pad_token_id, run.config.prefix)
    return model, tokenizer, reader


def _split(run: Run, reader: Reader) -> LabelledParts:
    """What is learnt from, and what is held out."""
    if isinstance(reader, OwnTokens):
        rows, twins = own_rows(run, reader), own_twins(run, reader)
    else:
        rows, twins = policy_rows(run), policy_twins(run)
    if len(rows) < 2:
        raise DataError("1 session is labelled, expected at least 2: one is held out")
    order = random.Random(f"{run.seed}/reward").sample(sorted(rows), len(rows))
    return split_labelled(rows, twins, order, check_sessions(run), run.config.reward_model)


def new_reward_model(
    run: Run, own: Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A token reward model before its training, from SFT or from the user's own folder."""
    loading, lora = run.config.model, run.config.lora
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        model, tokenizer = start_reward_model(
            own, run.path(SFT_MODEL), run.tokenizer, run.device, loading.dtype,
            pickles=loading.allow_pickle,
        )  # fmt: skip
    if lora.on:
        add_to_classifier(model, lora, seed=run.seed, origin=sft_origin(run))
    if loading.gradient_checkpointing:
        recompute_layers(model)
    return model, tokenizer


def save_reward_model(
    run: Run,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    own: Path | None = None,
) -> None:
    """A trained one, with what it says of a short text (`tppo.models.probe`); with LoRA adapter and
    head alone, where their base is a part of the run.
    """
    if run.config.lora.on and own is None:
        save_classifier(model, folder)
    else:  # the folder of the user may be gone when the reward model is read
        save_weights(merged(model) if run.config.lora.on else model, folder)
    tokenizer.save_pretrained(folder)
    write_probe(model, tokenizer, folder)
