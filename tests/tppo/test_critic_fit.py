"""The critic fitted before the first step, on answers that exist."""

import json
import random
from dataclasses import replace

import pytest
import torch
from test_door import CONFIG as DOOR
from test_door import assert_same, door, model, weights  # noqa: F401  # a fixture
from test_memory import refuse
from test_shared_prefix import CPU, EOS, PAD, models, questions

import tppo
from tppo.errors import DataError
from tppo.methods.config import PPOConfig
from tppo.methods.critic_fit import fit_critic, sampled
from tppo.methods.early_stop import train_to_best
from tppo.methods.ppo import PPO
from tppo.models.batch import Batch
from tppo.models.rollout import HFRollout, RolloutBatch, Sampling
from tppo.rewards import TokenReward
from tppo.stages.loop import Loop

PROMPTS = [[a, 6, n] for n in range(10, 22) for a in (8, 9)]
PAID = {8: 2.0, 9: -1.0}
FIT = PPOConfig(lr=1e-3, critic_lr=1e-2, minibatch_size=16, gamma=0.9, batch_size=8,
                length_alpha=None)  # fmt: skip


class Known:
    """A reward that the prompt's first token decides, at the first and the last token."""

    def __call__(self, batch, answers):
        rewards = torch.zeros(batch.mask.shape)
        for b, (prompt, ids) in enumerate(zip(batch.prompt_ids, batch.response_ids, strict=True)):
            rewards[b, len(ids) - 1] = PAID[prompt[0]]
            rewards[b, 0] += 0.5
        return TokenReward(rewards)


def new_ppo(**changes):
    used, _ = models()
    torch.nn.init.zeros_(used.critic.head.weight)
    rollout = HFRollout(used.policy, pad_id=PAD, eos_id=EOS)
    return PPO(used, rollout, replace(FIT, **changes), reward=Known(), sampling=Sampling(6),
               pad_id=PAD, eos_id=EOS, seed=0)  # fmt: skip


def answered(ppo, each=8):
    return sampled(ppo, questions(PROMPTS), each * len(PROMPTS))


def wanted(rollout, gamma):
    """The rewards to come by a loop, a list a response."""
    found = []
    for prompt, ids in zip(rollout.prompt_ids, rollout.response_ids, strict=True):
        rewards = [0.0] * len(ids)
        rewards[-1] = PAID[prompt[0]]
        rewards[0] += 0.5
        found.append([sum(r * gamma**k for k, r in enumerate(rewards[t:]))
                      for t in range(len(ids))])  # fmt: skip
    return found


def explained(ppo, rollout, rows):
    """1 - Var(G - V) / Var(G) over the tokens of some answers, by numpy's formula."""
    returns, errors = [], []
    targets = wanted(rollout, ppo.config.gamma)
    for i in rows:
        batch = Batch([rollout.prompt_ids[i]], [rollout.response_ids[i]], PAD, CPU)
        with torch.no_grad():
            values = ppo.models.critic(batch)[0][0].tolist()
        returns += targets[i]
        errors += [g - v for g, v in zip(targets[i], values, strict=True)]
    spread = torch.tensor(errors).double().var() / torch.tensor(returns).double().var()
    return 1 - spread.item()


def test_a_fitted_critic_foretells_the_rewards_of_prompts_it_has_not_seen(capsys, monkeypatch):
    ppo = new_ppo(bootstrap_truncated=False)
    found = answered(ppo)
    before = [p.detach().clone() for p in ppo.models.policy.parameters()]
    fit = fit_critic(ppo, *found)
    assert fit.answers == 192 and fit.explained_variance_before == pytest.approx(0, abs=1e-6)
    assert fit.best_epoch in (fit.epochs, fit.epochs - 1) and fit.best_epoch > 0
    assert 0.3 < fit.explained_variance_after <= 1
    held = held_out(ppo, found.rollout)
    assert explained(ppo, found.rollout, held) == pytest.approx(
        fit.explained_variance_after, abs=1e-4
    )
    assert len(held) == 16, "a tenth of the prompts, with all their answers"
    assert explained(ppo, found.rollout, range(192)) > 0.6
    after = ppo.models.policy.parameters()
    assert all((a == b).all() for a, b in zip(before, after, strict=True))
    assert not ppo.optimizer.state, "the moments of the fit are not those of PPO"
    assert "the critic is fitted on 192 answers" in capsys.readouterr().err
    again = new_ppo(bootstrap_truncated=False)
    assert fit_critic(again, *answered(again)) == fit
    small = new_ppo(bootstrap_truncated=False)
    found = answered(small)
    refuse(32, monkeypatch)
    assert fit_critic(small, *found) == pytest.approx(fit, rel=1e-3)
    assert capsys.readouterr().err.count("WARNING: out of memory") >= 1
    assert small.part_size.tokens < 33


def held_out(ppo, rollout):
    """The rows that a fit holds out, found by what it does not train on."""
    prompts = list(dict.fromkeys(map(tuple, rollout.prompt_ids)))
    random.Random(f"{ppo.seed}/critic").shuffle(prompts)
    kept = set(prompts[: round(0.1 * len(prompts))])
    return [i for i, prompt in enumerate(rollout.prompt_ids) if tuple(prompt) in kept]


def test_cut_answers_teach_nothing_where_their_value_would_be_bootstrapped():
    ppo = new_ppo(bootstrap_truncated=True)
    found = answered(ppo)
    cut = found.rollout.finish.count("length")
    assert 0 < cut < 192
    assert fit_critic(ppo, *found).answers == 192 - cut
    only = RolloutBatch(*(rows and rows[:8] for rows in found.rollout[:4]))
    with pytest.raises(ValueError, match="answers to 1 prompts, expected at least 2"):
        fit_critic(ppo, questions(PROMPTS[:1] * 8), only._replace(finish=["eos"] * 8))


def test_training_ends_an_epoch_past_its_best_and_keeps_that():
    layer = torch.nn.Linear(1, 1)
    given, trained = iter([3.0, 2.0, 1.0, 1.5, 0.0]), []

    def train(epoch):
        trained.append(epoch)
        torch.nn.init.constant_(layer.weight, epoch)

    assert train_to_best(layer, 9, train, lambda: next(given)) == [3.0, 2.0, 1.0, 1.5]
    assert trained == [1, 2, 3] and layer.weight.item() == 2
    given = iter([1.0, 1.0])
    torch.nn.init.constant_(layer.weight, 7)
    assert train_to_best(layer, 9, train, lambda: next(given)) == [1.0, 1.0]
    assert layer.weight.item() == 7


def test_no_critic_no_fit():
    with pytest.raises(DataError, match="fit_critic was 5, expected 0 with advantage grpo"):
        PPOConfig(fit_critic=5, advantage="grpo", responses_per_prompt=2)


def test_the_python_door_fits_on_new_answers_and_resumes_with_it(model, tmp_path):  # noqa: F811
    config = replace(DOOR, fit_critic=32)
    once = door(model, tmp_path / "once", config=config)
    once.train()
    plain = door(model, tmp_path / "plain")
    plain.train()
    fit = once.report["critic_fit"]
    assert fit["answers"] == 32 and "critic_fit" not in plain.report
    name = "val/explained_variance"
    assert once.metrics[0][name] != plain.metrics[0][name]
    step = Loop.step
    twice = door(model, tmp_path / "twice", config=config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "step", lambda self, n: 1 / 0 if n == 4 else step(self, n))
        with pytest.raises(ZeroDivisionError):
            twice.train()
        patch.setattr("tppo.stages.loop.fit_critic", None)  # it is not fitted again
        patch.setattr(Loop, "step", step)
        twice.train()
    assert_same(weights(tmp_path / "once/train/model"), weights(tmp_path / "twice/train/model"))
    report = json.loads((tmp_path / "twice/train/report.json").read_text())
    assert report["critic_fit"] == fit and isinstance(twice, tppo.PPOTrainer)
