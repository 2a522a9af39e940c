"""One whole PPO update, and one rollout: a prompt computed once for its G answers, or with each.

An update is old and reference log-probs, values, rewards, advantages, and one optimiser step of
policy and critic on `GROUPS` prompts. Both ways compute the same: losses, metrics and gradients
are compared before anything is timed. On a GPU as many tokens go through a model at once as its
memory holds, in both ways and in TRL's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from statistics import median
from typing import Any

import _goals
import pytest
import torch
from _harness import Attempts, RedGate
from _journal import Journal
from _machine import wait, wall_us
from _steps import StepRow
from _timing import peak_mb

pytest.importorskip("transformers")
import _trl  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForTokenClassification  # noqa: E402

from tppo.methods.config import PPOConfig  # noqa: E402
from tppo.methods.experience import Experience, Models  # noqa: E402
from tppo.methods.ppo import PPO  # noqa: E402
from tppo.models.config import Prefix  # noqa: E402
from tppo.models.policy import Critic, RewardModel  # noqa: E402
from tppo.models.rollout import HFRollout, RolloutBatch, Sampling  # noqa: E402
from tppo.rewards import Questions  # noqa: E402
from tppo.rewards.token_model import TokenModelReward  # noqa: E402

PAD, EOS = 0, 1
CENTRE = {"cpu": (1024, 24, 8), "cuda": (2048, 24, 8)}  # P, R, G
AXES = {"P": (256, 1024, 2048, 4096), "R": (8, 24, 64), "G": (1, 4, 8, 16)}
GROUPS = {"cpu": 1, "cuda": 8}
LISTED = 10  # shapes that are always measured: the first two, and one of P, R, G moved
GOAL = (256, 16, 8)  # with the four prompts of one of the demo's minibatches
MODELS = {
    "demo": {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 160,
             "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4},
    "1.5B": {"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960,
             "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2},
    "8B": {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
           "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
           "tie_word_embeddings": False},
}
MODELS_OF = {"cpu": ("demo",), "cuda": ("1.5B", "8B")}
TOKENS_AT_ONCE = {"demo": 1 << 20, "1.5B": 1 << 14, "8B": 1 << 13}  # about 55 GB of activations
UNMOVED = 1e-30  # of a weight this is less than a rounding
TRL = f"TRL {_trl.VERSION.rpartition('.')[0]}"
TRAINED = {"8B": ("q_proj", "v_proj")}  # what adapters train: with all of it one GPU is too small


def shapes(device: str) -> list[tuple[int, int, int]]:
    """The goal's shape, the centre with one of P, R, G moved at a time, then the rest of the grid.
    """
    centre = CENTRE[device]
    moved = [centre[:axis] + (value,) + centre[axis + 1:]
             for axis, values in enumerate(AXES.values()) for value in values]
    return list(dict.fromkeys([GOAL, centre, *moved, *product(*AXES.values())]))


def settings_of(name: str) -> dict[str, Any]:
    """The configuration of a model."""
    return {"max_position_embeddings": 8192, "tie_word_embeddings": True, "num_labels": 3,
            "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 2, **MODELS[name]}


def models_of(name: str, device: str) -> tuple[Models, RewardModel]:
    """Random weights; bf16 on a GPU, where flash attention wants it."""
    torch.manual_seed(0)
    settings = settings_of(name)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if device == "cpu" else torch.bfloat16)
    try:
        with torch.device(device):
            policy = LlamaForCausalLM(LlamaConfig(**settings)).eval()
            reward = LlamaForTokenClassification(LlamaConfig(**settings)).eval()
            critic = Critic(copy.deepcopy(policy.model), settings["hidden_size"]).eval()
            ref = copy.deepcopy(policy)
    finally:
        torch.set_default_dtype(before)
    for model in (policy, critic) if name in TRAINED else ():
        for part, parameter in model.named_parameters():
            parameter.requires_grad_(any(trained in part for trained in TRAINED[name]))
    return Models(policy, ref, critic), RewardModel(reward)


def trainer(used: tuple[Models, RewardModel], prefix: Prefix, response: int, group: int,
            groups: int, tokens_at_once: int = 1 << 20) -> PPO:
    """With a learning rate that moves no weight, both ways and every round work on the same."""
    config = PPOConfig(lr=UNMOVED, critic_lr=UNMOVED, epochs=1, minibatch_size=group * groups,
                       responses_per_prompt=group, max_tokens=tokens_at_once)
    models, classifier = used
    engine = HFRollout(models.policy, pad_id=PAD, eos_id=-1, prefix=prefix)
    reward = TokenModelReward(classifier, max_tokens=tokens_at_once)
    return PPO(models, engine, config, reward=reward, sampling=Sampling(response), pad_id=PAD,
               eos_id=EOS, seed=0, prefix=prefix)


def rollout(vocab: int, prompt: int, response: int, group: int, groups: int) -> RolloutBatch:
    """Random token ids; every answer is cut at R."""
    g = torch.Generator().manual_seed(1)

    def ids(n: int) -> list[int]:
        return torch.randint(3, vocab, (n,), generator=g).tolist()

    prompts = [row for _ in range(groups) for row in [ids(prompt)] * group]
    return RolloutBatch(prompts, [ids(response) for _ in prompts], None, ["length"] * len(prompts))


def scored(ppo: PPO, batch: RolloutBatch) -> Experience:
    """What an update trains on."""
    lengths = [float(len(ids)) for ids in batch.response_ids]
    questions = Questions(batch.prompt_ids, columns={"suggested_length": lengths})
    return ppo.score(batch, ppo.answers(questions, batch))[0]


def update(ppo: PPO, batch: RolloutBatch) -> dict[str, float]:
    """Everything between a rollout and the next weights."""
    return ppo.update(scored(ppo, batch))


def gate(ways: dict[str, PPO], batch: RolloutBatch, tolerance: float) -> None:
    """Raises `RedGate` where losses, metrics or gradients of the two ways differ."""
    metrics, gradients = {}, {}
    for prefix, ppo in ways.items():
        metrics[prefix] = update(ppo, batch)
        ppo.gradients(scored(ppo, batch), ppo.config.max_tokens)  # an update keeps none
        parameters = [p for m in ppo.models.trained.values() for p in m.parameters()]
        gradients[prefix] = [p.grad for p in parameters if p.grad is not None]
        assert gradients[prefix], "no gradients to compare"
    for name, dense in metrics["dense"].items():
        if abs(metrics["shared"][name] - dense) > tolerance * max(1.0, abs(dense)):
            raise RedGate(f"red gate, no number: {name} is {metrics['shared'][name]:g} shared, "
                          f"{dense:g} dense")
    for i, (shared, dense) in enumerate(zip(gradients["shared"], gradients["dense"], strict=True)):
        error = float((shared - dense).abs().max() / dense.abs().max().clamp(min=1e-12))
        if not error <= tolerance:
            raise RedGate(f"red gate, no number: gradient {i} is off by {error:.1e}")


@dataclass
class Times:
    """What the ways of one shape took."""

    ms: dict[tuple[str, str], list[float]]  # (prefix, what)
    peak_mb: dict[str, float]
    trl_ms: list[float]


def measured(ways: dict[str, PPO], batch: RolloutBatch, device: str, rounds: int,
             trl: Callable[[], float] | None, attempts: Attempts) -> Times:
    """Updates and rollouts of both ways, and TRL's update, in turn, round by round."""
    work: dict[str, Callable[[PPO], Any]] = {
        "update": lambda ppo: update(ppo, batch),
        "rollout": lambda ppo: ppo.rollout.generate(batch.prompt_ids, ppo.sampling),
    }
    times = Times({(p, w): [] for p in ways for w in work}, {}, [])
    for ppo in ways.values():
        work["rollout"](ppo)
    for _ in range(rounds):
        for (prefix, what), ms in times.ms.items():
            wait(device)
            if device != "cpu":  # of an update that is timed as well: a dense one takes long
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            ms.append(wall_us(work[what], (ways[prefix],), device) / 1e3)
            if device != "cpu" and what == "update":
                times.peak_mb[prefix] = (torch.cuda.max_memory_allocated() - before) / 1e6
        if trl is not None:
            seconds = attempts.peer(TRL, trl)
            trl = trl if seconds else None
            times.trl_ms += [1e3 * seconds] if seconds else []
    if device == "cpu":
        times.peak_mb = {p: peak_mb(work["update"], (ppo,), device) for p, ppo in ways.items()}
    return times


def measure_shape(name: str, device: str, shape: tuple[int, int, int], groups: int, rounds: int,
                  journal: Journal | None = None) -> list[StepRow]:
    """Both ways at one shape."""
    prompt, response, group = shape
    attempts = Attempts(unit_of(name, shape, groups), device, journal)
    attempts.about("")
    batch = rollout(MODELS[name]["vocab_size"], prompt, response, group, groups)
    used = models_of(name, device)
    both: tuple[Prefix, ...] = ("shared", "dense")
    ways = {prefix: trainer(used, prefix, response, group, groups, TOKENS_AT_ONCE[name])
            for prefix in both}
    gate(ways, batch, 1e-3 if device == "cpu" else 0.1)
    trl = attempts.peer(TRL, lambda: _trl_update(ways["dense"], name, batch, device)
                        ) if not broken(attempts) else None
    times = measured(ways, batch, device, rounds, trl, attempts)
    middle = {key: median(ms) for key, ms in times.ms.items()}
    tokens = {"shared": groups * (prompt + group * response),
              "dense": groups * group * (prompt + response)}
    theirs = round(median(times.trl_ms), 1) if times.trl_ms else None
    return [StepRow(name, device, groups, prompt, response, group, prefix, tokens[prefix],
                    round(middle[prefix, "update"], 1), round(middle[prefix, "rollout"], 1),
                    round(times.peak_mb[prefix], 1),
                    round(middle["dense", "update"] / middle[prefix, "update"], 2),
                    round(middle["dense", "rollout"] / middle[prefix, "rollout"], 2),
                    theirs, round(theirs / middle[prefix, "update"], 2) if theirs else None)
            for prefix in ways]


def unit_of(name: str, shape: tuple[int, int, int], groups: int) -> str:
    """What a journal calls a shape; goals name it so."""
    prompt, response, group = shape
    return f"step {name} P {prompt}, R {response}, G {group}, {groups} prompts"


def broken(attempts: Attempts) -> bool:
    """Whether TRL's update ended a process before."""
    return attempts.journal is not None and bool(
        attempts.journal.of("broken", unit=attempts.unit, who=TRL))


def _trl_update(ppo: PPO, name: str, batch: RolloutBatch, device: str) -> Any:
    """TRL's update of copies of the same models, or None where TRL is not here."""
    if not _trl.available():
        return None
    policy, ref = (copy.deepcopy(model) for model in (ppo.models.policy, ppo.models.ref))
    update = _trl.TrlUpdate(policy, ref, settings_of(name), batch, device, TOKENS_AT_ONCE[name])
    update()  # warm-up
    return update


def asked_for(name: str, device: str, shape: tuple[int, int, int], groups: int,
              goals_only: bool, journal: Journal | None) -> None:
    """Skips a shape that has no goal, where only those are measured, or is measured already; fails
    one that ended a process before."""
    unit = unit_of(name, shape, groups)
    if goals_only and not _goals.of("step", unit.removeprefix("step "), device):
        pytest.skip("no goal on this device")
    if journal and journal.of("unit", unit=unit, state="ok"):
        pytest.skip("measured before")
    if journal and (died := journal.of("broken", unit=unit, who="")):
        pytest.fail(died[-1]["why"])


@pytest.mark.parametrize("index", range(len(shapes("cpu"))))
@pytest.mark.parametrize("size", range(2), ids=("small", "large"))
def test_step(steps, shape_of, device, smoke, size, index, request):
    goals_only, journal = map(request.getfixturevalue, ("goals_only", "journal"))
    if size >= len(MODELS_OF[device]):
        pytest.skip("fewer models on this device")
    listed = shapes(device)
    if not request.config.getoption("--bench-grid"):
        listed = listed[:LISTED]
    name = "demo" if smoke else MODELS_OF[device][size]
    shape = shape_of({device: listed}, index, (24, 4, 3))
    rounds = 1 if smoke else min(2 if device == "cuda" else 5,
                                 request.config.getoption("--bench-rounds"))
    groups = 1 if smoke else 4 if shape == GOAL else GROUPS[device]
    asked_for(name, device, shape, groups, goals_only, journal)
    try:
        rows = measure_shape(name, device, shape, groups, rounds, journal)
    finally:
        Attempts(unit_of(name, shape, groups), device, journal).end()
    steps(rows)
    if journal:
        journal.add("unit", part="benchmarks", unit=unit_of(name, shape, groups), state="ok",
                    said="")
    shared, dense = rows
    assert shared.tokens <= dense.tokens
    assert smoke or shared.group == 1 or shared.speed_up > 1
