"""The Python door: token-level PPO of a model on prompts, with a reward function of one's own.

No log, no labels and no reward model are needed.  `tppo train --reward` is the same from the
command line.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tppo import stopping
from tppo.config import guided_settings
from tppo.errors import DataError
from tppo.methods.advantages import ADVANTAGES, Advantage
from tppo.methods.config import WITHOUT_EFFECT, Algorithm, PPOConfig, RLGFConfig
from tppo.models.adapters import merged, need_peft, origin_of
from tppo.models.card import write_card
from tppo.models.config import (
    AdapterConfig,
    GenerateConfig,
    GuideConfig,
    ModelConfig,
    Prefix,
    RolloutName,
    VLLMConfig,
)
from tppo.models.folder import model_eos_ids, save_model
from tppo.models.hub import locate
from tppo.models.load import load_policy, resolve_device
from tppo.models.parallel import ALONE, World, from_environment, joined
from tppo.models.preflight import preflight
from tppo.models.rollout import Engine, Sampling, build
from tppo.models.tokenizer import decode, load_tokenizer
from tppo.models.vocabulary import check_embeddings, limit_vocabulary
from tppo.progress import say
from tppo.rewards import Questions
from tppo.rewards.served import check_served
from tppo.stages.answering.recipe import Recipe, write_recipe
from tppo.stages.artifacts import POLICY
from tppo.stages.given import (
    RewardJudge,
    as_guide,
    as_judge,
    as_reward,
    as_sampler,
    check_advantage_given,
    check_columns,
    check_model,
    check_place,
    check_sections,
    check_targets,
    checked_seed,
    described,
    guide_files,
    guide_identity,
    own_settings,
)
from tppo.stages.guides import UNGUIDED, Guided, Learner, new_guide
from tppo.stages.journal import Journal
from tppo.stages.lengths import positions_of
from tppo.stages.loop import Held, Loop
from tppo.stages.models import adapted, ppo_models
from tppo.stages.prompts import Prompts, encode_given, questions, read_prompts
from tppo.stages.replay import replayed
from tppo.stages.trackers import followed, need_trackers
from tppo.store.jsonl import plain
from tppo.store.run_folder import RunFolder

STAGE = "train"  # the folder in `out` that holds what `train` makes
LONGEST = 256  # tokens of an answer by default, but at most half of the model's positions


class PPOTrainer:
    """Token-level PPO of a causal LM on prompts, with a reward of one's own.

        trainer = tppo.PPOTrainer("path/or/hub-id", reward=my_reward, prompts=prompts,
                                  config=tppo.PPOConfig(steps=100, responses_per_prompt=8))
        trainer.train()
        trainer.save("out")

    model: what `--model` takes.  The reference, and the critic's trunk, start from it too.
    reward: a function `f(prompts, completions, **columns) -> list`, one entry an answer: a number,
        a list with one number a token, or a list of (start, end, value) over the characters of the
        answer (`tppo.FunctionReward` says how each is paid); a list of functions, which add up; or
        any `tppo.Reward`, called with (batch, answers).
    prompts: a list of texts, of chats (lists of {"role": ..., "content": ...}), or of dicts with
        the key "prompt", whose other keys are columns; a `datasets.Dataset`; the path of a JSONL
        file of such dicts.  A text is read as it stands, a chat through the chat template.
    config: settings of PPO.  `advantage="grpo"`, "rloo" or "remax" trains no critic.  Those of the
        token reward model (reward, reward_values, length_alpha, format_cost, train_on_unlabelled)
        do not apply to a function.
    heldout: prompts like those above, on which `judge` decides every `config.eval_every` steps
        which weights are kept; without them those of the last step are.
    judge: a function `f(prompts, completions, **columns) -> list of numbers`, or a `tppo.Judge`; by
        default the reward itself.
    advantage: a `tppo.Advantage` of one's own instead of `config.advantage`.
    generate: `max_new_tokens` (0: 256, but at most half of the model's positions), `temperature`
        and `batch_size` of sampling.
    loading: how the models are loaded and held in memory.
    lora: `tppo.AdapterConfig(rank=16)` trains adapters over one frozen copy of the model instead of
        all weights; `save` then writes the adapter.
    algorithm: "ppo++", "aggrevated", "lols" or "d2lols" have a guide write a part of each answer
        (docs/rlgf.md).  guide: None, the model itself before training, with the sampling of a
        `tppo.GuideConfig()`; the folder or hub id of another model; a `tppo.GuideConfig`, also of
        an endpoint; or any `Rollout` of one's own.  rlgf: their settings.
    rollout: who samples: "hf", transformers' `generate`; or "vllm", or a `tppo.VLLMConfig`
        (docs/vllm.md).
    out: folder that gets `train/model`, `train/metrics.jsonl` (a row a step, TRL's names),
        `train/report.json`, and checkpoints while it runs.
    seed: decides everything random.  device: auto, cpu, cuda, cuda:1.

    report_to: trackers that follow the training, "tensorboard,wandb,trackio" or some of them.

    A script that was killed or stopped goes on from its newest checkpoint when it runs again with
    the same arguments.  Under `torchrun --nproc-per-node N` the processes share the responses; each
    calls the reward function with those of its share.

    Errors: DataError for arguments that do not fit together, before any weights are loaded.
    """

    used = False
    report: dict[str, Any] | None = None
    _card: dict[str, Any] | None = None

    def __init__(
        self,
        model: str | Path,
        *,
        reward: Callable[..., Any] | Sequence[Callable[..., Any]],
        prompts: Any,
        config: PPOConfig | None = None,
        heldout: Any = None,
        judge: Callable[..., Any] | None = None,
        advantage: Advantage | None = None,
        generate: GenerateConfig | None = None,
        loading: ModelConfig | None = None,
        lora: AdapterConfig | None = None,
        algorithm: Algorithm = "ppo",
        guide: Any = None,
        rlgf: RLGFConfig | None = None,
        out: str | Path = "runs/ppo",
        seed: int = 0,
        device: str = "auto",
        prefix: Prefix = "shared",
        rollout: RolloutName | VLLMConfig = "hf",
        report_to: str = "none",
    ) -> None:
        check_model(model)
        self.report_to = need_trackers(report_to)
        check_sections(config=(config, PPOConfig), generate=(generate, GenerateConfig),
                       loading=(loading, ModelConfig), lora=(lora, AdapterConfig),
                       rlgf=(rlgf, RLGFConfig))  # fmt: skip
        check_place(device, prefix)
        self.out, self.seed, self.prefix = Path(out), checked_seed(seed), prefix
        self.device = resolve_device(str(device))
        self.generate, self.loading = generate or GenerateConfig(), loading or ModelConfig()
        self.lora = lora or AdapterConfig()
        self.sampler = as_sampler(rollout, self.generate, prefix)
        if self.lora.on:
            need_peft()
        self.reward = as_reward(reward)
        given = config or PPOConfig()
        self.advantage = ADVANTAGES[given.advantage](given) if advantage is None else advantage
        check_advantage_given(self.advantage, given)
        self.guide = as_guide(guide)
        self.settings = own_settings(given, self.reward, self.lora, algorithm, rlgf, self.guide)
        self.config = self.settings.ppo
        self.prompts = read_prompts(prompts)
        self.heldout = None if heldout is None else read_prompts(heldout, "heldout")
        held_columns = None if self.heldout is None else list(self.heldout.columns)
        check_columns(self.reward, list(self.prompts.columns), held_columns)
        check_targets(self.settings.rlgf, list(self.prompts.columns))
        self.judge = as_judge(judge, self.reward, held_columns)
        self.identity = self._identity()
        pickles = self.loading.allow_pickle
        self.path = locate(model, self.loading.revision, flag="model", pickles=pickles)
        self.inputs = [self.path, *guide_files(self.settings, pickles)]
        self.origin = origin_of(model, self.path)
        self._load_all()
        preflight(self.model, self.tokenizer, self._train.ids[0], where=str(model),
                  prefix=self.prefix)  # fmt: skip
        self._held = None if self.heldout is None else self._questions(self.heldout)
        self.metrics: list[dict[str, Any]] = []

    def _load_all(self) -> None:
        """Tokenizer and model, and what they make of the prompts."""
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(self.path)
        self._start()
        self.eos_ids = model_eos_ids(self.tokenizer, self.model)
        self.positions = positions_of(self.model.config)
        longest = self.generate.max_new_tokens or min(LONGEST, self.positions // 2)
        self.sampling = Sampling(longest, self.generate.temperature, self.seed)
        self._train = self._questions(self.prompts)
        check_served(self.reward, self.tokenizer, max(map(len, self._train.ids)) + longest)

    def train(self) -> dict[str, Any]:
        """Every step that is still to do; returns the report, also in `report.json`.

        Afterwards `model` holds the weights kept, `metrics` a row a step.  Ctrl-C and SIGTERM let
        the step under way end and be saved, then raise `KeyboardInterrupt`; a second one does not
        wait.
        Errors: DataError where the reward returns what it should not; RuntimeError from the guards
        where to go on would do harm, or another process works in the folder.
        """
        try:
            with stopping.listening():
                return self._run()
        except stopping.Stopped as stop:
            say(f"stopped by {stop.cause}: {stop.lost or 'nothing is lost'}. The same script goes "
                "on from there")  # fmt: skip
            raise

    def _run(self) -> dict[str, Any]:
        folder = RunFolder(self.out)
        if (self.out / "run.yaml").exists():
            raise DataError(f"{self.out}: holds a run of stages (run.yaml), expected another "
                            "folder for the training with a reward of one's own")  # fmt: skip
        if from_environment().rank == 0 and folder.manifest(STAGE) is not None:
            changes = folder.changes(STAGE, self.inputs, self.identity, self.seed)
            say(f"WARNING: {self.out / STAGE} holds a finished training, which is replaced when "
                f"this one ends (another `out` keeps it): {'; '.join(changes) or 'the same'}")
        with joined(self.device) as world, ExitStack() as stack:
            stack.enter_context(folder.lock() if world.rank == 0 else nullcontext())
            stack.enter_context(stopping.deferrable())  # ends after the folder has its name
            out = world.of_first(
                stack.enter_context(
                    folder.stage(STAGE, self.inputs, self.identity, self.seed, resume=True)
                )
                if world.rank == 0
                else None
            )
            journal = None
            if world.rank == 0:
                journal = stack.enter_context(
                    followed(self.report_to, out, self.out, self.config)
                )
            loop = self._loop(out, world, journal)
            loop.run_all()
            if world.rank == 0:
                write_recipe(out / POLICY.name, self._recipe())
            report = world.of_first(loop.report() if world.rank == 0 else None)
        self.metrics, self.report, self._card = [*loop.metrics], report, loop.card()
        return report

    def _loop(self, out: Path, world: World, journal: Journal | None) -> Loop:
        if self.used:  # from the beginning, or from a checkpoint
            self._start()
        self.used = True
        ref = self.base or self._load()
        guided = self._guided(ref)
        models = ppo_models(self.model, ref, self.path, self.device, self.loading, self.lora,
                            critics=guided.critics(self.advantage), seed=self.seed)  # fmt: skip
        trainer = guided.trainer(
            models,
            self._engine(),
            self.config,
            reward=self.reward,
            advantage=self.advantage,
            tokenizer=self.tokenizer,
            sampling=self.sampling,
            pad_id=self.tokenizer.pad_token_id,
            eos_id=self.eos_ids,
            seed=self.seed,
            prefix=self.prefix,
            world=world,
        )
        held = None
        if self._held is not None:
            assert self.judge is not None
            held = Held(self._held, self.judge, self.sampler)
        loop = Loop(trainer, self._train, held, out, self.tokenizer,
                    about={"reward": described(self.reward)}, journal=journal)  # fmt: skip
        self._say_what_runs()
        return loop

    def _guided(self, ref: PreTrainedModel) -> Guided:
        settings, given = self.settings, self.guide
        if settings.algorithm == "ppo":
            return UNGUIDED
        learner = Learner(ref, self.tokenizer, self.eos_ids, self.sampler, self._train,
                          partial(encode_given, place="guide"))  # fmt: skip
        if isinstance(given, GuideConfig):
            given = new_guide(given, learner, self.device, self.loading)
        return Guided(settings.algorithm, given, settings.rlgf, settings.guide)

    def _say_what_runs(self) -> None:
        if not self.generate.max_new_tokens:
            say(f"ppo: an answer has at most {self.sampling.max_new_tokens} tokens "
                "(generate.max_new_tokens)")  # fmt: skip
        if isinstance(self.judge, RewardJudge):
            say("ppo: held-out answers are judged by the reward that is trained on, because no "
                "judge is given: it cannot see what the reward gets wrong")  # fmt: skip

    def answer(self, prompts: Any, *, temperature: float | None = None, seed: int = 0) -> list[str]:
        """Answers of the model as it is now, one a prompt.  prompts: in any form of those above."""
        asked = self._questions(read_prompts(prompts))
        warmth = self.sampling.temperature if temperature is None else temperature
        sampling = Sampling(self.sampling.max_new_tokens, warmth, seed)
        rollout = self._engine().generate(asked.ids, sampling)
        return [decode(self.tokenizer, ids, self.eos_ids) for ids in rollout.response_ids]

    def replay(self, batch: str | Path) -> str:
        """What `tppo replay` says, of a batch that this training has skipped: repeated with the
        weights of the newest checkpoint, those of this trainer stay as they are.

        batch: the .json that the warning names.  Errors: DataError where it is none.
        """
        again = copy.copy(self)
        again.used = True  # its own model, and not the one of this trainer
        return replayed(Path(batch), self.out, lambda out, rows: again._loop(out, ALONE, rows))

    def save(self, folder: str | Path, *, merge: bool = False) -> None:
        """Write the model as it is now with its tokenizer, as `save_pretrained` does, and after
        `train` a model card.

        With LoRA the adapter alone, which names its base; `merge`: the sum of both, a plain model.
        """
        if from_environment().rank == 0:
            whole = merge and self.lora.on
            save_model(merged(self.model) if whole else self.model, self.tokenizer, folder)
            write_recipe(folder, self._recipe())
            if self._card is not None:
                write_card(folder, **self._card | ({"adapter": False} if whole else {}))

    def _recipe(self) -> Recipe:
        return Recipe(prompt="as given", max_new_tokens=self.sampling.max_new_tokens,
                      temperature=self.sampling.temperature)  # fmt: skip

    def _start(self) -> None:
        """The policy as it begins; with LoRA an adapter over `base`, which others share."""
        loaded = self._load()
        self.base = loaded if self.lora.on else None
        self.model = loaded
        if self.base is not None:
            self.model = adapted(self.base, self.lora, self.seed, self.origin)

    def _load(self) -> PreTrainedModel:
        config = self.loading
        model = load_policy(self.path, self.device, config.dtype, pickles=config.allow_pickle)
        return limit_vocabulary(model, self.tokenizer)

    def _engine(self) -> Engine:
        return build(self.model, self.sampler, pad_id=self.tokenizer.pad_token_id,
                     eos_id=self.eos_ids)  # fmt: skip

    def _questions(self, prompts: Prompts) -> Questions:
        asked = questions(prompts, self.tokenizer, self.positions - self.sampling.max_new_tokens)
        check_embeddings(self.tokenizer, self.model, max(map(max, asked.ids)))
        return asked

    def _identity(self) -> dict[str, Any]:
        """All that the weights depend on: another one begins anew instead of resuming."""
        ppo = plain(self.config)
        for name in WITHOUT_EFFECT:
            del ppo[name]
        sampling = {name: getattr(self.generate, name)
                    for name in ("max_new_tokens", "temperature", "batch_size")}  # fmt: skip
        return {
            "dtype": self.loading.dtype,
            "prompts": self.prompts.fingerprint,
            "heldout": None if self.heldout is None else self.heldout.fingerprint,
            "reward": described(self.reward),
            "judge": None if self.judge is None else described(self.judge),
            "advantage": described(self.advantage),
            "ppo": ppo,
            "generate": sampling,
            "prefix": self.prefix,
            **self.sampler.identity,
            **({"lora": plain(self.lora)} if self.lora.on else {}),
            **guided_settings(self.settings),
            **guide_identity(self.settings, self.guide),
        }
