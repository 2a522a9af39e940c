"""The generate stage: answers of the SFT model, to be labelled."""

from __future__ import annotations

import random

from tppo import stopping
from tppo.models.rollout import build
from tppo.models.tokenizer import decode
from tppo.stages.artifacts import ANSWERS
from tppo.stages.run import Run
from tppo.store.checkpoint import Checkpoints
from tppo.store.jsonl import write_json, write_jsonl
from tppo.store.run_folder import KEPT


def generate(run: Run) -> None:
    """Answers of the SFT model to training sessions; resumes."""
    with stopping.deferrable(), run.stage("generate", resume=True) as out:
        model, sessions = run.sft_model().requires_grad_(False), run.sessions("train")
        config = run.config.generate
        order = random.Random(f"{run.seed}/generate").sample(sessions, len(sessions))
        n = min(config.samples, config.samples_per_session * len(sessions))
        chosen = [order[i % len(order)] for i in range(n)]
        prompts = run.prompts(order[:n], model)
        engine = build(
            model,
            run.config.sampler,
            pad_id=run.tokenizer.pad_token_id,
            eos_id=run.eos_ids,
        )
        stopping.defer()
        rollout = engine.generate(
            [prompts[i % len(prompts)] for i in range(n)],
            run.sampling(seed=run.round_seed),
            keeper=Checkpoints(out / KEPT, "generate", "batch"),
        )
        write_jsonl(
            out / ANSWERS.name,
            (
                {
                    "id": f"{session.id}#{i // len(order)}",
                    "session": session.id,
                    "prompt_ids": rollout.prompt_ids[i],
                    "response_ids": rollout.response_ids[i],
                    "finish": rollout.finish[i],
                    "text": decode(run.tokenizer, rollout.response_ids[i], run.eos_ids),
                }
                for i, session in enumerate(chosen)
            ),
        )
        read, written = (sum(map(len, ids)) for ids in rollout[:2])
        write_json(out / "report.json", {"answers": n, "prompt_tokens": read,
                                         "answer_tokens": written})  # fmt: skip
