"""The PPO stage: guards, the loop, the weights kept, resuming after a kill."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from tppo import stopping
from tppo.evaluation.metrics import evaluate_policy, score_answers
from tppo.labels.queries import parse_answer, query_key
from tppo.methods.advantages import ADVANTAGES
from tppo.methods.config import PPOConfig
from tppo.methods.experience import Models
from tppo.methods.ppo import PPO
from tppo.methods.reward_model import check_auc, check_signal
from tppo.models.folder import model_eos_ids, save_model
from tppo.models.guards import GuardError
from tppo.models.own_tokens import load_frozen
from tppo.models.parallel import ALONE, World, joined
from tppo.models.policy import Critic, snapshot
from tppo.models.recompute import recompute_layers
from tppo.models.rollout import HFRollout, RolloutBatch
from tppo.models.tokenizer import decode
from tppo.progress import say, status
from tppo.rewards import Questions
from tppo.rewards.token_model import SUGGESTED_LENGTH, TokenModelReward
from tppo.sessions.prompts import prompt_text
from tppo.sessions.session import Session
from tppo.stages.run import Run
from tppo.store.checkpoint import load_latest, save_checkpoint
from tppo.store.jsonl import read_json, write_json, write_jsonl
from tppo.store.run_folder import KEPT


def train(run: Run) -> None:
    """Token-level PPO from the SFT model; resumes from its newest checkpoint.

    Under torchrun in several processes, of which the first alone writes.
    """
    with joined(run.device) as world, ExitStack() as stack:
        first = world.rank == 0
        stack.enter_context(stopping.deferrable())  # ends after the stage: it has its name by then
        out = world.of_first(
            stack.enter_context(run.stage("train", resume=True)) if first else None
        )
        report = read_json(run.path("train-rm/report.json"))
        check_signal(report, run.config.ppo.without_signal)
        check_auc(report, run.config.reward_model)
        Loop(run, out, world).run_all()


class Loop:
    """The PPO loop with what it keeps: metrics, the best weights, the time spent."""

    def __init__(self, run: Run, out: Path, world: World):
        self.settings, self.out, self.config, self.world = run, out, run.config.ppo, world
        self.trainer = new_trainer(run, run.sft_model(), world)
        self.sessions = run.sessions("train")
        self.heldout = run.sessions("heldout")
        policy = self.trainer.models.policy
        self.prompts = run.prompts(self.sessions, policy)
        self.heldout_prompts = run.prompts(self.heldout, policy)
        self.steps, self.batch_size = schedule(len(self.sessions), self.config)
        self.order = prompt_order(len(self.sessions), self.steps * self.batch_size, run.seed)
        self.metrics: list[dict[str, Any]] = []
        self.best: dict[str, dict[str, Tensor]] = {}
        self.best_score, self.best_step, self.seconds = -1.0, 0, 0.0

    def run_all(self) -> None:
        """Every step that is still to do, then the export."""
        self.resume()
        first = self.trainer.step_count + 1
        stopping.defer()
        with status("ppo", self.steps) as bar:
            bar.resume(first - 1)
            for step in range(first, self.steps + 1):
                row = self.step(step)
                bar.advance()
                bar.note(
                    f"relevance {row['reward/rule']:.2f}, reward {row['objective/scores']:.2f}, "
                    f"KL {row['objective/kl']:.1f}, length {row['response/length']:.1f}"
                )
                if step < self.steps:
                    self.stop_if_asked(step)
        if self.world.rank == 0:
            self.export()
        self.world.of_first(None)

    def stop_if_asked(self, step: int) -> None:
        """Save and stop after a signal to any of the processes; raises Stopped in all of them."""
        signum = max(self.world.exchanged(stopping.asked() or 0))
        if not signum:
            return
        if self.world.rank == 0 and step % self.config.checkpoint_every:
            self.save(step)
        self.world.of_first(None)  # where one ends before the first has saved, torchrun ends it too
        raise stopping.Stopped(signum, f"it is saved after step {step} of {self.steps}")

    def step(self, step: int) -> dict[str, Any]:
        """One PPO step; looks at held-out users and writes a checkpoint when it is time."""
        start = time.monotonic()
        chosen = self.order[(step - 1) * self.batch_size : step * self.batch_size]
        rows = [i for i in chosen for _ in range(self.config.responses_per_prompt)]
        sessions = [self.sessions[i] for i in rows]
        questions = questions_of(self.settings, sessions, [self.prompts[i] for i in rows])
        before = _sums(self.trainer.models.policy) if step == 1 else None
        metrics, rollout = self.trainer.step(questions)
        if step == 1 and before == _sums(self.trainer.models.policy):
            stands_still(self.config.without_signal)
        row = {"step": step, **metrics, **self.answer_metrics(sessions, rollout)}
        last = step == self.steps
        if step % self.config.eval_every == 0 or last:
            row |= self.look(step)
        self.metrics.append(row)
        self.seconds += time.monotonic() - start
        if self.world.rank == 0:
            write_jsonl(self.out / "metrics.jsonl", self.metrics)
            if step % self.config.checkpoint_every == 0 and not last:
                self.save(step)
        return row

    def answer_metrics(
        self, sessions: Sequence[Session], rollout: RolloutBatch
    ) -> dict[str, float]:
        """What the reward model does not see: the rule's verdict, format, variety."""
        tokenizer, eos_ids = self.settings.tokenizer, self.trainer.eos_ids
        texts = [decode(tokenizer, ids, eos_ids) for ids in rollout.response_ids]
        threshold = self.settings.config.label.sentence_threshold
        figures = score_answers(sessions, texts, rollout.finish, threshold)
        keys = [query_key(query) for text in texts for query in parse_answer(text)]
        return {
            "reward/rule": figures["relevance"],
            "reward/rule_words": figures["words"],
            "response/length": sum(map(len, rollout.response_ids)) / len(texts),
            "response/format": figures["format"],
            "response/eos": rollout.finish.count("eos") / len(texts),
            "response/distinct_words": len({word for key in keys for word in key}),
            "response/distinct_queries": len(set(keys)),
            "response/queries_not_repeated": figures["distinct_queries"],
        }

    def judged(self, policy: PreTrainedModel) -> dict[str, Any]:
        """Figures of held-out answers, the same questions and draws every time."""
        run = self.settings
        return evaluate_policy(
            policy,
            self.trainer.models.ref,
            run.tokenizer,
            self.heldout,
            self.heldout_prompts,
            run.sampling(seed=run.seed),
            batch_size=run.config.generate.batch_size,
            threshold=run.config.label.sentence_threshold,
            prefix=run.config.prefix,
        )

    @cached_property
    def min_format(self) -> float:
        """The format share that weights must have to be kept.

        Relative to SFT's, because PPO starts there: a model or a log whose SFT answers seldom
        have the format could otherwise keep nothing.
        """
        return self.config.min_format * self.judged(self.trainer.models.ref)["format"]

    def look(self, step: int) -> dict[str, float]:
        """Judge held-out answers; keep the weights if they are the best that qualify."""
        models = self.trainer.models
        figures = self.judged(models.policy)
        qualifies = figures["format"] >= self.min_format and figures["kl"] <= self.config.max_kl
        if qualifies and figures["relevance"] > self.best_score:
            self.best_score, self.best_step = figures["relevance"], step
            for name, model in models.trained.items():
                self.best[name] = snapshot(model, self.best.get(name))
        return {f"heldout/{name}": figures[name] for name in ("relevance", "format", "kl")}

    def save(self, step: int) -> None:
        """A checkpoint with all that the remaining steps depend on."""
        models = self.trainer.models
        weights = {name: model.state_dict() for name, model in models.trained.items()}
        weights |= {f"best_{name}": tensors for name, tensors in self.best.items()}
        state = {
            "metrics": self.metrics,
            "best_score": self.best_score,
            "best_step": self.best_step,
            "seconds": self.seconds,
        }
        optimizer = self.trainer.optimizer.state_dict()
        save_checkpoint(self.out / KEPT, step, weights, optimizer, state)

    def resume(self) -> None:
        """Go on from the newest checkpoint, if there is one."""
        found = load_latest(self.out / KEPT)
        if found is None:
            return
        models = self.trainer.models
        for name, model in models.trained.items():
            model.load_state_dict(found.weights[name])
        self.trainer.optimizer.load_state_dict(found.optimizer)
        self.trainer.step_count = found.step
        self.best = {
            name: found.weights[f"best_{name}"]
            for name in models.trained
            if f"best_{name}" in found.weights
        }
        self.metrics, self.best_score = found.state["metrics"], found.state["best_score"]
        self.best_step, self.seconds = found.state["best_step"], found.state["seconds"]
        say(f"ppo: resumes after step {found.step} of {self.steps}")

    def export(self) -> None:
        """The weights kept, as a plain folder of transformers, and a report."""
        models = self.trainer.models
        if self.best:
            for name, model in models.trained.items():
                model.load_state_dict(self.best[name])
            say(
                f"ppo: kept step {self.best_step}, held-out relevance {self.best_score:.3f} (by "
                f"the rule), {self.seconds:.0f} s"
            )
        else:
            self.best_step = self.steps
            say(
                f"WARNING: no step had held-out format >= {self.min_format:.3f} "
                f"({self.config.min_format:g} of SFT's) and KL <= {self.config.max_kl:g}; the last "
                "one is kept"
            )
        save_model(models.policy, self.settings.tokenizer, self.out / "model")
        if models.critic is not None:
            critic = {name: x.cpu() for name, x in snapshot(models.critic).items()}
            save_file(critic, self.out / "critic.safetensors")
        write_json(self.out / "report.json", self.report())

    def report(self) -> dict[str, Any]:
        """What the closing table needs to know of the training."""
        reward, config = read_json(self.settings.path("train-rm/report.json")), self.config
        responses = self.batch_size * config.responses_per_prompt
        updates = config.epochs * math.ceil(responses / config.minibatch_size)
        return {
            "steps": self.steps,
            "optimizer_steps": self.steps * updates,
            "kept_step": self.best_step,
            "qualified": bool(self.best),
            "first_reward": self.metrics[0]["objective/scores"],
            "last_reward": self.metrics[-1]["objective/scores"],
            "auc": reward["auc"],
            "relevant_share": reward["relevant_share"],
            "sessions": reward["sessions"],
            "labeller": reward["labeller"],
            "seconds": self.seconds,
        }


def stands_still(allowed: bool) -> None:
    """Stop after a first step that left the policy as it was.

    Errors: GuardError unless `allowed`.
    """
    problem = (
        "there is nothing to learn from: the first step left the policy as it was (every advantage "
        "is zero, or the learning rate is too small for a weight to change)"
    )
    if not allowed:
        raise GuardError(f"{problem}. --ppo.without-signal goes on all the same")
    say(f"WARNING: {problem}")


def _sums(model: PreTrainedModel) -> list[float]:
    """A number a weight tensor that changes where the tensor does, but for a coincidence."""
    return torch.stack([p.detach().double().sum() for p in model.parameters()]).tolist()


def new_trainer(run: Run, policy: PreTrainedModel, world: World = ALONE) -> PPO:
    """PPO over `policy`, with the reference and, where it is needed, the critic from SFT, and the
    frozen reward model.
    """
    config, prefix = run.config.ppo, run.config.prefix
    pad_id, eos_ids = run.tokenizer.pad_token_id, model_eos_ids(run.tokenizer, policy)
    advantage = ADVANTAGES[config.advantage](config)
    with_critic = advantage.needs_critic
    models = Models(
        policy=policy,
        ref=run.sft_model(),
        critic=Critic.from_policy(run.path("sft/model"), run.device) if with_critic else None,
    )
    if run.config.model.gradient_checkpointing:
        for trained in models.trained.values():
            recompute_layers(trained)
    reward = TokenModelReward(
        load_frozen(run.path("train-rm/model"), run.tokenizer, run.device, eos_ids),
        mode=config.reward,
        values=config.reward_values,
        length_alpha=config.length_alpha,
        max_tokens=config.max_tokens,
    )
    batch_size = run.config.generate.batch_size
    return PPO(
        models,
        HFRollout(policy, pad_id=pad_id, eos_id=eos_ids, batch_size=batch_size, prefix=prefix),
        config,
        reward=reward,
        advantage=advantage,
        tokenizer=run.tokenizer,
        sampling=run.sampling(),
        pad_id=pad_id,
        eos_id=eos_ids,
        seed=run.seed,
        prefix=prefix,
        world=world,
    )


def questions_of(
    run: Run, sessions: Sequence[Session], prompt_ids: Sequence[Sequence[int]]
) -> Questions:
    """The sessions as a reward sees them."""
    columns = {SUGGESTED_LENGTH: suggested_lengths(run, sessions)}
    return Questions(prompt_ids, [prompt_text(session) for session in sessions], columns)


def suggested_lengths(run: Run, sessions: Sequence[Session]) -> list[float]:
    """Tokens after which the length penalty bites: the queries' median length times their
    number, plus the separators between them.
    """
    median = read_json(run.path("map/lengths.json"))["median_query_tokens"]
    counts = [len(session.targets) for session in sessions]
    return [float(median * n + (n - 1)) for n in counts]


def schedule(sessions: int, config: PPOConfig) -> tuple[int, int]:
    """Steps and prompts a step: a small file gets fewer of both."""
    batch_size = min(config.batch_size, sessions)
    return max(1, min(config.steps, math.ceil(config.max_passes * sessions / batch_size))), (
        batch_size
    )


def prompt_order(sessions: int, n: int, seed: int) -> list[int]:
    """Indices of the prompts of all steps: one shuffled pass after another."""
    rng = random.Random(f"{seed}/ppo")
    order: list[int] = []
    while len(order) < n:
        order += rng.sample(range(sessions), sessions)
    return order[:n]
