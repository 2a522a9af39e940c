"""What changes from step to step: learning rates, a critic that starts alone, KL's coefficient."""

import json
import math
from dataclasses import replace

import pytest
import torch
from test_door import CONFIG as DOOR
from test_door import PROMPTS, assert_same, door, model, weights  # noqa: F401  # a fixture
from test_parallel import ALL_SCHEDULES, FAST
from test_parallel import CONFIG as PARALLEL
from test_parallel import PROMPTS as GROUPS
from test_shared_prefix import new_trainer, questions

from tppo.errors import DataError
from tppo.methods.advantages import ADVANTAGES, GAE, TokenAdvantages
from tppo.methods.config import PPOConfig
from tppo.methods.schedules import Schedules, next_kl_coef
from tppo.stages.loop import Loop


def rates(**changes):
    """The rates of six steps, as shares of those asked for, policy and critic."""
    schedules = Schedules(PPOConfig(steps=6, lr=2.0, critic_lr=4.0, **changes))
    found = [schedules.rates(step) for step in range(1, 7)]
    return [x["policy"] / 2 for x in found], [x["critic"] / 4 for x in found]


def test_learning_rates_rise_and_fall():
    assert rates() == ([1.0] * 6, [1.0] * 6)
    policy, critic = rates(lr_warmup_steps=3, critic_lr_warmup_steps=2)
    assert policy == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1])
    assert critic == pytest.approx([1 / 2, 1, 1, 1, 1, 1])
    policy, critic = rates(lr_schedule="linear", lr_warmup_steps=2)
    assert policy == pytest.approx([1 / 2, 1, 1, 3 / 4, 2 / 4, 1 / 4])
    assert critic == pytest.approx([1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    policy, critic = rates(lr_schedule="cosine", final_lr_share=0.2, critic_warmup_steps=2)
    wanted = [0.2 + 0.8 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]
    assert policy == pytest.approx([0, 0, *wanted])
    assert critic[0] == 1 and critic == sorted(critic, reverse=True)


@pytest.mark.parametrize("changes", [{}, {"lr_warmup_steps": 3}, {"critic_warmup_steps": 2}])
def test_an_update_without_a_step_is_as_the_first(changes):
    """It divided by the warm-up of 0, and would have left the policy alone."""
    schedules = Schedules(PPOConfig(steps=6, lr=2.0, critic_lr=4.0, **changes))
    assert schedules.rates(0) == schedules.rates(1)
    assert schedules.critic_alone(0) == schedules.critic_alone(1)


def test_the_coefficient_follows_ziegler():
    assert next_kl_coef(0.2, 6.6, 64, 6.0, 640) == pytest.approx(0.2 * 1.01)
    assert next_kl_coef(0.2, 60.0, 64, 6.0, 640) == pytest.approx(0.2 * 1.02)
    assert next_kl_coef(0.2, -1.0, 64, 6.0, 640) == pytest.approx(0.2 * 0.98)
    schedules = Schedules(PPOConfig(adaptive_kl=6.0, adaptive_kl_horizon=640, kl_coef=0.3))
    schedules.adapt(1, 12.0, 64)
    priced = schedules.priced(GAE(0.3, lam=0.9))
    assert priced == GAE(pytest.approx(0.306), lam=0.9)
    assert Schedules(PPOConfig()).priced(priced) is priced


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"critic_warmup_steps": 1, "advantage": "rloo", "responses_per_prompt": 2},
         "critic_warmup_steps was 1, expected 0 with advantage rloo"),
        ({"adaptive_kl": 6.0, "kl_coef": 0.0}, "kl_coef was 0, expected more with adaptive_kl"),
        ({"adaptive_kl": 6.0, "adaptive_kl_horizon": 63.0}, "expected at least the 64 responses"),
        ({"adaptive_kl": 0.0}, "adaptive_kl.*expected more than 0"),
        ({"target_kl": -1.0}, "target_kl.*expected more than 0"),
        ({"lr_schedule": "cosin"}, "did you mean 'cosine'"),
        ({"final_lr_share": 1.5}, "final_lr_share.*expected at most 1"),
        ({"lr_warmup_steps": -1}, "lr_warmup_steps.*expected at least 0"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(DataError, match=message):
        PPOConfig(**changes)


def test_a_coefficient_that_an_advantage_does_not_have_cannot_be_adapted():
    class Bare:
        needs_critic = True

        def __call__(self, rewards, *_):
            return TokenAdvantages(rewards)

    schedules = Schedules(PPOConfig(adaptive_kl=6.0))
    with pytest.raises(ValueError, match="expected a dataclass with the field kl_coef"):
        schedules.priced(Bare())
    for make in ADVANTAGES.values():
        schedules.priced(make(schedules.config))


def copies(ppo):
    return {name: [p.detach().clone() for p in found.parameters()]
            for name, found in ppo.models.trained.items()}  # fmt: skip


def moved(ppo, before):
    after = copies(ppo)
    pairs = {name: zip(before[name], after[name], strict=True) for name in before}
    return {name for name, both in pairs.items() if any((a != b).any() for a, b in both)}


def test_the_critic_starts_alone_and_leaves_no_trace_in_the_policy():
    """Neither the weights nor the optimiser's moments of the policy know of the warm-up."""
    ppo = new_trainer("shared", replace(PARALLEL, critic_warmup_steps=2, adaptive_kl=1.0), 6)
    for step in (1, 2, 3):
        before = copies(ppo)
        metrics, _ = ppo.step(questions(GROUPS))
        assert moved(ppo, before) == ({"critic"} if step < 3 else {"policy", "critic"})
        assert metrics["policy/updates"] == (0 if step < 3 else 4)
        assert metrics["lr"] == (0 if step < 3 else PARALLEL.lr) and metrics["critic_lr"] > 0
        assert metrics["objective/kl_coef"] == ppo.config.kl_coef
        group = ppo.optimizer.param_groups[0]["params"]
        assert {len(ppo.optimizer.state.get(p, {})) for p in group} == ({0} if step < 3 else {3})
        if step < 3:
            assert metrics["val/ratio"] == 1 or abs(metrics["val/ratio"] - 1) < 1e-5
    assert ppo.schedules.kl_coef < ppo.config.kl_coef  # the policy is nearer than it may be


def test_a_policy_that_cannot_learn_is_found_after_the_warm_up_too():
    ppo = new_trainer("shared", replace(PARALLEL, critic_warmup_steps=1), 6)
    for parameter in ppo.models.policy.parameters():
        parameter.register_hook(torch.zeros_like)
    ppo.step(questions(GROUPS))
    with pytest.raises(RuntimeError, match="policy is zero"):
        ppo.step(questions(GROUPS))


def test_a_step_ends_where_the_policy_is_too_far_from_its_answers():
    config = replace(PARALLEL, epochs=8, **FAST)
    whole, _ = new_trainer("shared", config, 6).step(questions(GROUPS))
    assert whole["policy/updates"] == 16
    ppo = new_trainer("shared", replace(config, target_kl=0.02), 6)
    seen, minibatch = [], ppo._minibatch

    def watched(data, first):
        before = copies(ppo)
        figures, stepped = minibatch(data, first)
        seen.append((figures["policy/approxkl_avg"], stepped, moved(ppo, before)))
        return figures, stepped

    ppo._minibatch = watched
    metrics, _ = ppo.step(questions(GROUPS))
    assert 1 <= metrics["policy/updates"] == len(seen) - 1 < 15
    *good, (kl, stepped, changed) = seen
    assert kl > 0.02 and not stepped and not changed
    assert all(k <= 0.02 and s and c == {"policy", "critic"} for k, s, c in good)


def all_knobs(model, out, **changes):  # noqa: F811
    """A run of six steps through the Python door in which every schedule is at work."""
    config = replace(DOOR, steps=6, **FAST, **ALL_SCHEDULES | changes)
    return door(model, out, config=config, heldout=PROMPTS)


def test_a_run_with_every_schedule_resumes_to_the_bit(model, tmp_path):  # noqa: F811
    once = all_knobs(model, tmp_path / "once")
    once.train()
    step, seen = Loop.step, []

    def killed(self, number):
        if len(seen) == 5:
            raise KeyboardInterrupt
        seen.append(number)
        return step(self, number)

    twice = all_knobs(model, tmp_path / "twice")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            twice.train()
    (state,) = (tmp_path / "twice").glob("train.tmp/checkpoints/step-4/state.json")
    saved = json.loads(state.read_text())["schedules"]
    assert saved == {"kl_coef": once.metrics[4]["objective/kl_coef"]}
    twice.train()
    assert_same(weights(tmp_path / "once/train/model"), weights(tmp_path / "twice/train/model"))
    assert once.metrics == twice.metrics
    rows = once.metrics
    assert len({row["objective/kl_coef"] for row in rows}) > 3  # it moves in every step but one
    assert [row["policy/updates"] for row in rows][0] == 0
    assert any(0 < row["policy/updates"] < 4 for row in rows), "no step was stopped"
    assert once.report["optimizer_steps"] == sum(row["policy/updates"] for row in rows)
    with pytest.raises(ValueError, match="expected fewer than the 6 steps of this run"):
        all_knobs(model, tmp_path / "never", critic_warmup_steps=6).train()
