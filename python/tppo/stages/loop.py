"""The PPO loop around `tppo.methods.ppo`: metrics, checkpoints, the weights kept, the export.

It knows questions and judges, but no run, no session and no label: the PPO stage is one user of
it, a script with a reward function of its own another.

Files in the folder that it is given: `checkpoints/` while it runs, `metrics.jsonl` with a row a
step, `samples.jsonl` with some answers of each evaluation, and at the end `model/`,
`critic.safetensors` where there is a critic, and `report.json`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tppo import stopping
from tppo.evaluation.judge import FORMAT, Judge, finish, first_figure, spoken
from tppo.evaluation.metrics import evaluate_policy
from tppo.methods.config import WITHOUT_EFFECT, PPOConfig
from tppo.methods.critic_fit import Answered, fit_critic, sampled
from tppo.methods.guards import stands_still, sums
from tppo.methods.ppo import PPO
from tppo.methods.rlgf import SKIPPED, in_brackets
from tppo.methods.spoilt import SPOILT
from tppo.models.adapters import adapter_settings, has_adapter
from tppo.models.card import base_of, chosen, write_card
from tppo.models.config import Sampler
from tppo.models.folder import save_model
from tppo.models.keeper import fitting, restore
from tppo.models.policy import learners, load_trained, snapshot, trained_state
from tppo.progress import say, status
from tppo.rewards import Answers, Questions
from tppo.stages.journal import Journal, sample_rows
from tppo.stages.kept import kept_state, part_sizes
from tppo.stages.order import PromptOrder, schedule
from tppo.stages.replay import write_spoilt
from tppo.stages.skipped import course_of, skip, taken
from tppo.store.checkpoint import Checkpoints, save_checkpoint
from tppo.store.jsonl import write_json
from tppo.store.rows import Rows
from tppo.store.run_folder import KEPT

REACHED = (0.8, 0.9)  # levels of the judge's first figure


def response_figures(answers: Answers) -> dict[str, float]:
    """Mean length in tokens of answers, and the share of them that ended by themselves."""
    ends, n = finish(answers), len(answers.response_ids)
    return {
        "response/length": sum(map(len, answers.response_ids)) / n,
        "response/eos": ends.count("eos") / n,
    }


class Watch(NamedTuple):
    """What a row of metrics.jsonl says of the step's answers, beside the figures of the method."""

    figures: Callable[[Answers], Mapping[str, float]] = response_figures
    shown: Mapping[str, str] = {}
    """Text on the progress line -> name of the figure that it shows."""


class Held(NamedTuple):
    """Held-out questions, and the judge of the answers to them."""

    questions: Questions
    judge: Judge
    sampler: Sampler = Sampler()
    """Who answers."""


class Loop:
    """The steps of PPO with what they keep: metrics, the best weights, the time spent.

    Weights are the best where the first figure of the judge is the largest on the held-out
    questions, of those with a KL of at most `max_kl` and, if the judge has a figure "format", at
    least `min_format` of the reference's.  Without held-out questions the last weights are kept.

    A signal is answered after the step under way where the caller has opened
    `stopping.deferrable()`; that block ends after all that has to be whole on the disk.
    Several processes (`trainer.world`) call every method together; the first alone writes.
    """

    def __init__(
        self,
        trainer: PPO,
        train: Questions,
        held: Held | None,
        out: Path,
        tokenizer: PreTrainedTokenizerBase,
        *,
        watch: Watch | None = None,
        about: Mapping[str, Any] | None = None,
        existing: Callable[[], Answered] | None = None,
        journal: Journal | None = None,
    ):
        """`about` is what report.json says besides: of the reward, of the data.  `existing` gives
        answers of the policy as it is to fit the critic on, which are else sampled for that.
        `journal` writes rows and samples, by default into `out` alone.
        """
        self.trainer, self.train, self.held, self.out = trainer, train, held, out
        trainer.skips.keep = partial(write_spoilt, out) if trainer.world.rank == 0 else None
        self.tokenizer, self.watch, self.about = tokenizer, watch or Watch(), about or {}
        self.config, self.world = trainer.config, trainer.world
        self.steps, self.batch_size = schedule(len(train), self.config)
        trainer.schedules.steps = self.steps
        trainer.schedules.check_length()
        self.order = PromptOrder(len(train), trainer.seed)
        self.metrics, self.samples, self.new_samples = Rows(), Rows(), list[dict[str, Any]]()
        self.journal = journal or Journal(out)
        self.best: dict[str, dict[str, Tensor]] = {}
        self.best_score: float | None = None
        self.best_step, self.seconds = 0, 0.0
        self.existing, self.critic_fit = existing, dict[str, float]()

    def run_all(self) -> None:
        """Every step that is still to do, then the export."""
        self.say_what_is_cut()
        self.resume()
        first = self.trainer.step_count + 1
        if self.config.fit_critic and first == 1:
            self.fit_critic(self.config.fit_critic)
        stopping.defer()
        with status("ppo", self.steps) as bar:
            bar.resume(first - 1)
            for step in range(first, self.steps + 1):
                row = self.step(step)
                bar.advance()
                if taken(row):
                    bar.note(self.noted(row))
                if step < self.steps:
                    self.stop_if_asked(step)
        if self.world.rank == 0:
            self.export()
        self.world.of_first(None)

    def noted(self, row: Mapping[str, Any]) -> str:
        """What the progress line says of a step."""
        shown = {**self.watch.shown, "reward": "objective/scores", "KL": "objective/kl",
                 "length": "response/length"}  # fmt: skip
        return ", ".join(f"{text} {row[name]:.2f}" for text, name in shown.items())

    def fit_critic(self, answers: int) -> None:
        """Fit the critic before the first step; a run that resumes has it fitted."""
        start = time.monotonic()
        found = self.existing() if self.existing else sampled(self.trainer, self.train, answers)
        self.critic_fit = fit_critic(self.trainer, *found)._asdict()
        self.seconds += time.monotonic() - start

    def say_what_is_cut(self) -> None:
        """A small set of prompts gets fewer steps than asked for, and smaller ones."""
        config, n = self.config, len(self.train)
        if self.steps < config.steps:
            say(f"ppo: {self.steps} of {config.steps} steps, because max_passes is "
                f"{config.max_passes:g} and a step takes {self.batch_size} of {n} "
                "prompts")  # fmt: skip
        if self.batch_size < config.batch_size:
            say(f"ppo: a step takes all {n} prompts (batch_size is {config.batch_size})")

    def stop_if_asked(self, step: int) -> None:
        """Save and stop after a signal to any of the processes; raises Stopped in all of them."""
        signum = max(self.world.exchanged(stopping.asked() or 0))
        if not signum:
            return
        if self.world.rank == 0 and step % self.config.checkpoint_every:
            self.save(step)
        self.world.of_first(None)  # where one ends before the first has saved, torchrun ends it too
        raise stopping.Stopped(signum, f"it is saved after step {step} of {self.steps}")

    def asked(self, step: int, rows: Sequence[int]) -> Questions:
        """What a step asks: some rows of the training questions."""
        return self.train.rows(rows)

    def step(self, step: int) -> dict[str, Any]:
        """One PPO step; looks at held-out questions and writes a checkpoint when it is time."""
        start = time.monotonic()
        weights = self.trainer.policy_weights
        chosen = self.order.rows((step - 1) * self.batch_size, self.batch_size)
        rows = [i for i in chosen for _ in range(self.config.responses_per_prompt)]
        first = step == self.config.critic_warmup_steps + 1  # that trains the policy
        before = sums(weights) if first else None
        questions = self.asked(step, rows)
        metrics, rollout = self.trainer.step(questions)
        skipped = bool(metrics.get(SKIPPED))
        if skipped:
            skip(self, step)
        if first and not skipped and SPOILT not in metrics and before == sums(weights):
            stands_still(self.config.without_signal)
        row = {"step": step, **metrics}
        if not skipped:
            answers = self.trainer.answers(questions, rollout)
            row |= self.watch.figures(answers.rows(self.trainer.counted(rollout)))
        read = sum(map(len, (*rollout.prompt_ids, *rollout.response_ids)))
        row["num_tokens"] = read + (self.metrics[-1]["num_tokens"] if self.metrics else 0)
        last = step == self.steps
        if self.held is not None and (step % self.config.eval_every == 0 or last):
            row |= self.evaluate_heldout(step, self.held)
        self.metrics.append(row)
        self.samples.extend(sorted(self.new_samples, key=lambda sample: sample["step"]))
        self.new_samples.clear()
        self.seconds += time.monotonic() - start
        if self.world.rank == 0:
            self.journal.write(self.metrics, self.samples)
            if step % self.config.checkpoint_every == 0 and not last and not skipped:
                self.save(step)
        return row

    def judged(self, policy: PreTrainedModel, held: Held, step: int) -> dict[str, Any]:
        """Figures of held-out answers after a step, the same questions and draws every time; some
        of the answers are kept.

        The first process judges for all: another answer of the judge to another process would have
        them keep other weights.
        """
        trainer, figures = self.trainer, None
        if self.world.rank == 0:
            found = evaluate_policy(
                policy,
                trainer.models.ref,
                held.questions,
                held.judge,
                replace(trainer.sampling, seed=trainer.seed),
                tokenizer=self.tokenizer,
                sampler=held.sampler,
            )
            figures = found.figures
            if step or all(row["step"] for row in self.samples):  # a resumed run asks SFT again
                self.new_samples += sample_rows(step, found)
        return self.world.of_first(figures)

    @cached_property
    def min_format(self) -> float:
        """The format share that weights must have to be kept, where the judge knows a format.

        Relative to SFT's, because PPO starts there: a model or a log whose SFT answers seldom
        have the format could otherwise keep nothing.
        """
        assert self.held is not None
        return self.config.min_format * self.judged(self.trainer.models.ref, self.held, 0)[FORMAT]

    def evaluate_heldout(self, step: int, held: Held) -> dict[str, float]:
        """Judge held-out answers; keep the weights if they are the best that qualify."""
        figures = self.judged(self.trainer.models.policy, held, step)
        figure = first_figure(figures)
        assert figure is not None
        qualifies = figures["kl"] <= self.config.max_kl
        if FORMAT in figures:  # asked in every process, for they judge the reference together
            qualifies = figures[FORMAT] >= self.min_format and qualifies
        if qualifies and (self.best_score is None or figures[figure] > self.best_score):
            self.best_score, self.best_step = figures[figure], step
            for name, model in self.trainer.models.trained.items():
                self.best[name] = snapshot(model, self.best.get(name))
        names = dict.fromkeys((figure, f"{figure}_interval", FORMAT, "kl"))  # in order, once each
        return {f"heldout/{name}": figures[name] for name in names if name in figures}

    def save(self, step: int) -> None:
        """A checkpoint with all that the remaining steps depend on."""
        weights = {
            name: trained_state(model) for name, model in self.trainer.models.trained.items()
        }
        weights |= {f"best_{name}": tensors for name, tensors in self.best.items()}
        state = {
            "metrics": self.metrics,
            "samples": self.samples,
            "best_score": self.best_score,
            "best_step": self.best_step,
            "seconds": self.seconds,
            "schedules": self.trainer.schedules.state(),
            "spoilt_in_row": self.trainer.skips.in_row,
            "part_sizes": [size.tokens for size in part_sizes(self.trainer)],
            "processes": self.world.size,
            "critic_fit": self.critic_fit,
        }
        optimizer = self.trainer.optimizer.state_dict()
        save_checkpoint(self.out / KEPT, step, weights, optimizer, state)

    def resume(self) -> None:
        """Go on from the newest checkpoint, if there is one.

        Errors: DataError where it is not of this training, or of another version of tppo.
        """
        found = Checkpoints(self.out / KEPT, "ppo").newest(self.steps)
        if found is None:
            return
        sizes, trained = part_sizes(self.trainer), self.trainer.models.trained
        state = kept_state(found, len(sizes))
        if state["best_step"]:
            self.best = {name: fitting(found, f"best_{name}", x) for name, x in trained.items()}
        restore(found, trained, self.trainer.optimizer)
        self.trainer.step_count = found.step
        self.trainer.schedules.load(state["schedules"])
        self.trainer.skips.in_row = state["spoilt_in_row"]
        for size, tokens in zip(sizes, state["part_sizes"], strict=True):
            size.go_on(tokens)
        if (before := state["processes"]) != self.world.size:
            say(f"ppo: goes on in {self.world.size} processes, begun in {before}: the same answers "
                "and steps but for rounding, and other answers of an engine or a guide of one's "
                "own, which each process asks for itself")  # fmt: skip
        self.critic_fit, self.samples = state["critic_fit"], state["samples"]
        self.metrics, self.best_score = state["metrics"], state["best_score"]
        self.best_step, self.seconds = state["best_step"], state["seconds"]
        if self.world.rank == 0:
            self.journal.resume(self.metrics, self.samples)

    def export(self) -> None:
        """The weights kept, as a plain folder of transformers or an adapter's, and a report."""
        models, kept = self.trainer.models.trained, f"ppo: kept step {self.best_step}"
        if self.held is not None and self.best:
            for name, model in models.items():
                load_trained(model, self.best[name])
            judge = spoken(self.held.judge.name)
            say(
                f"{kept}, held-out {self._looked_at()[0]} {self.best_score:.3f} (by {judge}), "
                f"{self.seconds:.0f} s"
            )
        else:
            self.best_step = self.steps
            say(f"ppo: kept step {self.steps}, the last: nothing is held out, {self.seconds:.0f} s"
                if self.held is None else self._none_qualified())  # fmt: skip
        save_model(self.trainer.models.policy, self.tokenizer, self.out / "model")
        write_card(self.out / "model", **self.card())
        if "critic" in models:
            weights = trained_state(learners(models["critic"])).items()
            critic = {name: tensor.detach().cpu().clone() for name, tensor in weights}
            save_file(critic, self.out / "critic.safetensors")
        write_json(self.out / "report.json", self.report())

    def card(self) -> dict[str, Any]:
        """What `write_card` says of the weights kept."""
        return {
            "base": base_of(self.trainer.models.policy.name_or_path),
            "method": f"token-level PPO{in_brackets(self.trainer)}, {self.best_step} of "
            f"{self.steps} steps",
            "data": f"answers to {len(self.train)} prompts",
            "settings": {"seed": self.trainer.seed}
            | chosen(self.config, PPOConfig, without=WITHOUT_EFFECT)
            | adapter_settings(self.trainer.models.policy),
            "figures": self._kept_figures(),
            "adapter": has_adapter(self.trainer.models.policy),
        }

    def _kept_figures(self) -> dict[str, float]:
        """What the judge said of the weights kept, by name."""
        row = self.metrics[self.best_step - 1]
        found = {k.removeprefix("heldout/"): v for k, v in row.items() if k.startswith("heldout/")}
        return {name: value for name, value in found.items() if isinstance(value, int | float)}

    def report(self) -> dict[str, Any]:
        """What the closing table needs to know of the training."""
        course = course_of(self.metrics)
        return {
            "steps": self.steps,
            "optimizer_steps": course.updates,
            "kept_step": self.best_step,
            "qualified": bool(self.best),
            "first_reward": course.first["objective/scores"],
            "last_reward": course.last["objective/scores"],
            **({"skipped_steps": missed} if (missed := self.steps - course.steps) else {}),
            "reached": self.reached(),
            **({"critic_fit": self.critic_fit} if self.critic_fit else {}),
            **self.about,
            "seconds": self.seconds,
        }

    def reached(self) -> dict[str, int | None]:
        """The first step after which the judge's first figure of held-out answers was so high."""
        if self.held is None:
            return {}
        name = f"heldout/{self._looked_at()[0]}"
        return {f"{level:g}": next((row["step"] for row in self.metrics
                                    if row.get(name, 0) >= level), None)
                for level in REACHED}  # fmt: skip

    def _looked_at(self) -> list[str]:
        """Names of the figures of held-out answers, the one first by which weights are kept."""
        newest = next(row for row in reversed(self.metrics) if "heldout/kl" in row)
        return [name.removeprefix("heldout/") for name in newest if name.startswith("heldout/")]

    def _none_qualified(self) -> str:
        form = ""
        if FORMAT in self._looked_at():
            form = f"format >= {self.min_format:.3f} ({self.config.min_format:g} of SFT's) and "
        return (f"WARNING: no step had held-out {form}KL <= {self.config.max_kl:g}; the last one "
                "is kept")  # fmt: skip
