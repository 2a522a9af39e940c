"""The SFT stage: a tokenizer and a model that write the true next queries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tppo import stopping
from tppo.labels.queries import answer_text
from tppo.methods.config import SFTConfig
from tppo.methods.sft import Examples, train_sft
from tppo.models.adapters import (
    adapter_settings,
    add_adapter,
    check_targets,
    merged,
    origin_of,
    save_adapter,
)
from tppo.models.card import base_of, chosen, write_card
from tppo.models.folder import model_eos_ids, save_model
from tppo.models.keeper import history_of
from tppo.models.load import load_policy, place
from tppo.models.policy import new_policy
from tppo.models.preflight import preflight
from tppo.models.recompute import recompute_layers
from tppo.models.tokenizer import load_tokenizer, train_tokenizer
from tppo.models.vocabulary import check_embeddings
from tppo.progress import say
from tppo.sessions.prompts import check_ends, encode_answer, encode_prompt, prompt_text
from tppo.sessions.session import Session
from tppo.stages.answering.recipe import recipe_of, write_recipe
from tppo.stages.artifacts import SFT_MODEL
from tppo.stages.free_memory import check_memory
from tppo.stages.lengths import answer_cap, fit_prompts
from tppo.stages.run import Run
from tppo.stages.trackers import followed
from tppo.store.checkpoint import Checkpoints
from tppo.store.jsonl import write_json
from tppo.store.run_folder import KEPT


def sft(run: Run) -> None:
    """Tokenizer and model, trained on the true next queries to the early stop; resumes."""
    with stopping.deferrable(), run.stage("sft", resume=True) as out:
        train, heldout = run.sessions("train"), run.sessions("heldout")
        tokenizer, model = _base_model(run, train)
        lora = run.config.lora
        if lora.on and run.base is None:
            check_targets(model, lora)  # before hours of other stages
            say("sft: a model from scratch trains all its weights; adapters begin behind it")
        elif lora.on:
            assert run.base is not None
            add_adapter(model, lora, seed=run.seed, origin=origin_of(run.model, run.base))
        if run.config.model.gradient_checkpointing:
            recompute_layers(model)
        cap = answer_cap(tokenizer, train, run.config.generate)
        examples, unseen = (_examples(tokenizer, model, part, cap) for part in (train, heldout))
        check_memory(run, model, max(map(len, examples.prompts)), cap)
        with followed(run.config.report_to, out, run.out, run.config.sft) as journal:
            kept = Checkpoints(out / KEPT, "sft",
                               resumed=lambda found: journal.resume(history_of(found)))  # fmt: skip
            stopping.defer()
            result = train_sft(
                model,
                examples,
                unseen,
                run.config.sft,
                pad_id=tokenizer.pad_token_id,
                seed=run.seed,
                prefix=run.config.prefix,
                each=journal.write,
                keeper=kept,
            )
        adapter = adapter_settings(model)
        if adapter:
            save_adapter(model, out / "adapter")
            model = merged(model)
        save_model(model, tokenizer, out / SFT_MODEL.name)
        write_recipe(out / SFT_MODEL.name, recipe_of(train, cap))
        log = "generated sessions" if run.data is None else f"sessions of {run.data.name!r}"
        write_card(
            out / SFT_MODEL.name,
            base=base_of(run.base),
            method="supervised fine-tuning",
            data=f"the true next queries of {len(train)} {log}",
            settings={"seed": run.seed} | chosen(run.config.sft, SFTConfig) | adapter,
            figures={"loss, nats a token": result.heldout_loss},
        )
        report = {name: value for name, value in result._asdict().items() if name != "history"}
        write_json(out / "report.json", report)
        say(
            f"sft: stopped at step {result.steps}, kept step {result.best_step} "
            f"with held-out loss {result.heldout_loss:.3f} nats a token"
        )


def _base_model(
    run: Run, train: Sequence[Session]
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    if run.base is not None:
        config = run.config.model
        tokenizer = load_tokenizer(run.base)
        probe = encode_prompt(tokenizer, "search: red shoes\nnext 2:\n")
        model = load_policy(run.base, run.device, config.dtype, pickles=config.allow_pickle)
        check_ends(tokenizer, model_eos_ids(tokenizer, model), train)
        preflight(model, tokenizer, probe, where=str(run.base), prefix=run.config.prefix)
        return tokenizer, model
    texts = (text for s in train for text in (prompt_text(s), answer_text(s.targets)))
    tokenizer = train_tokenizer(texts, run.config.scratch.vocab_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        model = new_policy(run.config.scratch, tokenizer)
    return tokenizer, place(model, run.device)


def _examples(
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    sessions: Sequence[Session],
    cap: int,
) -> Examples:
    """Prompts with their true answers; an answer longer than the cap is cut, and has no EOS.

    Errors: ValueError where the model has no embedding for one of their tokens.
    """
    answers = [encode_answer(tokenizer, session.targets)[:cap] for session in sessions]
    prompts = fit_prompts(tokenizer, sessions, model, cap)
    check_embeddings(tokenizer, model, max(map(max, (*prompts, *answers))))
    return Examples(prompts, answers)
