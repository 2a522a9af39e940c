"""The parts of PIT (`tppo.methods.pit`): SFT, the gap model, and two stages of RL."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tppo import stopping
from tppo.config import Config
from tppo.errors import DataError
from tppo.methods.advantages import ADVANTAGES
from tppo.methods.pit import Encode, GapPair, GapReader, Improver, evaluate_gap, improvement
from tppo.methods.ppo import PPO, step_seed
from tppo.methods.sentence_model import train_sentence_model
from tppo.methods.sft import Examples, train_sft
from tppo.models.adapters import add_adapter, load_adapter, merged, origin_of, shared_copy
from tppo.models.folder import model_eos_ids, save_model
from tppo.models.keeper import NOTHING_KEPT, Keeper
from tppo.models.load import load_policy
from tppo.models.recompute import recompute_layers
from tppo.models.rollout import Engine, Sampling, build
from tppo.models.vocabulary import limit_vocabulary
from tppo.progress import say
from tppo.rewards import Questions, Reward
from tppo.rewards.gap import GapReward
from tppo.rewards.sentence_model import SentenceModel
from tppo.stages.artifacts import PIT_POLICY, PIT_REPORT
from tppo.stages.journal import METRICS
from tppo.stages.loop import Loop
from tppo.stages.models import adapted, ppo_models
from tppo.stages.parts import Parts
from tppo.stages.preferences import answer_ids
from tppo.store.checkpoint import Checkpoints
from tppo.store.jsonl import plain, read_json, write_json, write_jsonl
from tppo.store.run_folder import KEPT

STAGE = "pit"
MODEL = "model"  # in the folder of each part


class Better(NamedTuple):
    """A prompt with a better and a worse answer, as texts."""

    prompt: Any
    better: str
    worse: str


@dataclass(frozen=True)
class Training:
    """All that the parts of PIT need: where they start, and their settings."""

    base: Path
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    encode: Encode
    cap: int  # tokens of an answer
    seed: int
    config: Config  # read: pit, sft, reward_model (of the gap model), ppo, generate, model, lora

    def settings(self) -> dict[str, Any]:
        """What the weights depend on, beside the base and the pairs."""
        names = ("prefix", "pit", "sft", "reward_model", "ppo", "generate", "lora")
        found = {name: plain(getattr(self.config, name)) for name in names}
        del found["pit"]["improve_steps"]
        found |= {"cap": self.cap, "dtype": self.config.model.dtype}
        return found | self.config.sampler.identity

    def policy(self, path: Path) -> PreTrainedModel:
        """The causal LM in a folder."""
        loading = self.config.model
        model = load_policy(path, self.device, loading.dtype, pickles=loading.allow_pickle)
        return limit_vocabulary(model, self.tokenizer)

    def engine(self, policy: PreTrainedModel) -> Engine:
        """Samples answers of a policy."""
        eos_ids, pad_id = model_eos_ids(self.tokenizer, policy), self.tokenizer.pad_token_id
        return build(policy, self.config.sampler, pad_id=pad_id, eos_id=eos_ids)

    def improver(self, policy: PreTrainedModel) -> Improver:
        """The policy, asked for better answers."""
        eos_ids = model_eos_ids(self.tokenizer, policy)
        return Improver(self.engine(policy), self.encode, self.tokenizer, eos_ids)

    def gap_reader(self, model: SentenceModel) -> GapReader:
        """How a gap model reads."""
        config = self.config
        reader = GapReader(model, self.tokenizer.pad_token_id, config.prefix,
                           config.reward_model.max_tokens)  # fmt: skip
        reader.fifth = config.pit.fifth_term
        return reader

    def sampling(self) -> Sampling:
        """Of rollouts."""
        return Sampling(self.cap, self.config.generate.temperature, self.seed)


def train_pit(out: Path, training: Training, pairs: Sequence[Better]) -> dict[str, Any]:
    """SFT, gap model and both stages of RL; `model/`, `gap/` and `report.json` in `out`.

    Each part lies whole in `checkpoints` of the folder when it is done, and until then has
    checkpoints of its own: what was killed goes on in the part, behind the step, where it was.
    """
    config = training.config.pit
    train, heldout = held_out(training, pairs)
    parts, report = Parts("pit", out, training.settings(), training.seed), dict[str, Any]()
    if not parts.done("sft"):
        with parts.part("sft") as work:
            stopping.defer()
            sft_part(work, training, train, heldout, Checkpoints(work / KEPT, "pit, sft"))
    if not parts.done("gap"):
        with parts.part("gap") as work:
            stopping.defer()
            gap_part(work, training, train, heldout, Checkpoints(work / KEPT, "pit, gap"))
    newest = "sft"
    for name, steps in (("stage-0", config.stage_0), ("stage-1", config.stage_1)):
        if not steps:
            continue
        if not parts.done(name):
            with parts.part(name) as work:
                start = parts.root / newest / MODEL
                stage_loop(work, parts.root, training, train, start, name, steps).run_all()
        report[name.replace("-", "_")] = read_json(parts.root / name / "report.json")
        newest = name
    for folder in parts.root.glob(f"*/{METRICS}"):
        shutil.copy(folder, out / f"{folder.parent.name}.jsonl")
    report |= {"pairs": len(train), "heldout": len(heldout),
               "sft": read_json(parts.root / "sft/report.json"),
               "gap": read_json(parts.root / "gap/report.json")}  # fmt: skip
    save_model(training.policy(parts.root / newest / MODEL), training.tokenizer,
               out / PIT_POLICY.name)  # fmt: skip
    shutil.copytree(parts.root / "gap" / MODEL, out / "gap")
    write_json(out / PIT_REPORT.name, report)
    return report


def held_out(training: Training, pairs: Sequence[Better]) -> tuple[list[Better], list[Better]]:
    """The pairs that are trained on, and those that stop trainings; drawn at random.

    Errors: DataError where there is one alone.
    """
    if len(pairs) < 2:
        raise DataError(f"pairs: {len(pairs)}, expected at least 2: one is held out")
    order = random.Random(f"{training.seed}/pit").sample(range(len(pairs)), len(pairs))
    n = max(1, round(training.config.pit.heldout_share * len(pairs)))
    return [pairs[i] for i in order[n:]], [pairs[i] for i in order[:n]]


def sft_part(
    out: Path,
    training: Training,
    train: Sequence[Better],
    heldout: Sequence[Better],
    keeper: Keeper = NOTHING_KEPT,
) -> None:
    """-log M(y_w | x, y_l), from the base, to the early stop."""
    model, config = training.policy(training.base), training.config
    if config.lora.on:
        add_adapter(model, config.lora, seed=training.seed)
    if config.model.gradient_checkpointing:
        recompute_layers(model)
    examples, unseen = (
        Examples(
            [training.encode(pair.prompt, pair.worse) for pair in part],
            [answer_ids(training.tokenizer, pair.better)[: training.cap] for pair in part],
        )
        for part in (train, heldout)
    )
    result = train_sft(model, examples, unseen, config.sft, seed=training.seed,
                       pad_id=training.tokenizer.pad_token_id, prefix=config.prefix,
                       keeper=keeper)  # fmt: skip
    save_model(merged(model) if config.lora.on else model, training.tokenizer, out / MODEL)
    write_jsonl(out / METRICS, result.history)
    write_json(out / "report.json", {"steps": result.steps, "best_step": result.best_step,
                                     "heldout_loss": result.heldout_loss})  # fmt: skip


def gap_part(
    out: Path,
    training: Training,
    train: Sequence[Better],
    heldout: Sequence[Better],
    keeper: Keeper = NOTHING_KEPT,
) -> None:
    """The gap model, from the base, an epoch past its best on held-out pairs."""
    config = training.config
    model = SentenceModel.from_policy(
        training.base, training.device, "mean" if config.pit.reward == "token" else "last",
        config.model.dtype, training.seed, lora=config.lora, pickles=config.model.allow_pickle,
        recompute=config.model.gradient_checkpointing,
    )  # fmt: skip
    reader = training.gap_reader(model)
    rows, unseen = ([gap_pair(training, pair) for pair in part] for part in (train, heldout))
    history = train_sentence_model(reader, rows, unseen,  # type: ignore[arg-type]
                                   config.reward_model, seed=training.seed,
                                   name="gap model", keeper=keeper)  # fmt: skip
    report = evaluate_gap(reader, unseen)
    model.save(out / MODEL, training.tokenizer)
    write_jsonl(out / METRICS, history)
    write_json(out / "report.json", report)
    say(f"pit: the gap model puts the better answer over the worse one above the worse over the "
        f"better one for {report['wl_above_lw']:.1%} of {len(unseen)} held-out pairs")  # fmt: skip


def gap_pair(training: Training, pair: Better) -> GapPair:
    """A pair in tokens, as the gap model reads it."""
    better, worse = (answer_ids(training.tokenizer, y) for y in (pair.better, pair.worse))
    return GapPair(training.encode(pair.prompt, pair.worse),
                   training.encode(pair.prompt, pair.better), better, worse)  # fmt: skip


class StageLoop(Loop):
    """A stage of RL: its questions are prompts with a reference that is to be bettered.

    own: references are written by the policy of the moment, which betters those of the data.
    """

    training: Training
    own = False

    def asked(self, step: int, rows: Sequence[int]) -> Questions:
        """The questions of the data, or the same with the policy's improvement as reference."""
        found = super().asked(step, rows)
        if not self.own:
            return found
        improver = self.training.improver(self.trainer.models.policy)
        first = [k for k, row in enumerate(rows) if not k or row != rows[k - 1]]  # of each group
        texts, references = found.prompts, found.columns["reference"]
        seed = step_seed(self.trainer.seed + 1, step)
        written = improver.step([texts[k] for k in first], [references[k] for k in first],
                                replace(self.training.sampling(), seed=seed))  # fmt: skip
        of_row = dict(zip((rows[k] for k in first), improver.texts(written), strict=True))
        new = [of_row[row] for row in rows]
        ids = [self.training.encode(x, y) for x, y in zip(texts, new, strict=True)]
        return Questions(ids, texts, {"reference": new})


def stage_questions(training: Training, pairs: Sequence[Better]) -> Questions:
    """Each prompt twice, with the worse and with the better answer as the reference."""
    both = [(pair.prompt, y) for pair in pairs for y in (pair.worse, pair.better)]
    ids = [training.encode(x, y) for x, y in both]
    return Questions(ids, [x for x, _ in both], {"reference": [y for _, y in both]})


def stage_loop(
    out: Path,
    parts: Path,
    training: Training,
    pairs: Sequence[Better],
    start: Path,
    name: str,
    steps: int,
    reward: Reward | None = None,
) -> StageLoop:
    """PPO on the gap from the policy in `start`, with KL to PIT's SFT model.

    reward: in place of the gap model's.
    """
    settings, sft = training.config, parts / "sft" / MODEL
    lora, loading = settings.lora, settings.model
    ref = training.policy(sft)
    if lora.on:
        policy = (adapted(ref, lora, training.seed, origin_of(None, sft)) if start == sft
                  else load_adapter(shared_copy(ref), start, trained=True))  # fmt: skip
    else:
        policy = training.policy(start)
    config = replace(settings.ppo, steps=steps)
    advantage = ADVANTAGES[config.advantage](config)
    models = ppo_models(policy, ref, sft, training.device, loading, lora,
                        critics=int(advantage.needs_critic), seed=training.seed)  # fmt: skip
    if reward is None:
        gap = SentenceModel.load(parts / "gap" / MODEL, training.device, loading.dtype)
        reward = GapReward(gap, tokens=settings.pit.reward == "token", scale=settings.pit.scale,
                           max_tokens=config.max_tokens)  # fmt: skip
    trainer = PPO(
        models, training.engine(policy), config, reward=reward, advantage=advantage,
        tokenizer=training.tokenizer, sampling=training.sampling(),
        pad_id=training.tokenizer.pad_token_id, eos_id=model_eos_ids(training.tokenizer, policy),
        seed=training.seed, prefix=settings.prefix,
    )  # fmt: skip
    loop = StageLoop(trainer, stage_questions(training, pairs), None, out, training.tokenizer,
                     about={"stage": name, "reward": settings.pit.reward})  # fmt: skip
    loop.training, loop.own = training, name == "stage-1"
    return loop


def encoder(room: int, read: Callable[[Any], list[int]]) -> Encode:
    """Prompts with references in at most `room` tokens; a longer one loses its start."""
    return lambda prompt, reference: read(improvement(prompt, reference))[-room:]
