"""Gradient noise: a bandit whose gradient is known in closed form, and PPO's own gradient."""

import json
import math

import pytest
import torch
from torch import nn

from tppo.cli import main
from tppo.methods.gradient_noise import GROUPS, GradientNoise

LOGITS = torch.tensor([0.3, -0.2, 0.8, 0.0, -1.0], dtype=torch.float64)
REWARDS = torch.tensor([1.0, 0.2, 0.5, -0.5, 2.0], dtype=torch.float64)


def arms_of_a_bandit():
    """g = r_a (e_a - pi) of each arm a, drawn with probability pi_a; its mean and tr(Sigma)."""
    chance = LOGITS.softmax(0)
    each = REWARDS[:, None] * (torch.eye(5, dtype=torch.float64) - chance)  # [A, P]
    mean = chance @ each
    return each, mean, (chance @ each.square().sum(1) - mean.square().sum()).item()


def drawn(blocks, block, seed, cut=lambda g: g):
    """Estimates from blocks of draws of the bandit."""
    each, _, _ = arms_of_a_bandit()
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.multinomial(LOGITS.softmax(0), blocks * block, True, generator=generator)
    found = GradientNoise(["all", "cut"], block)
    for part in each[chosen].view(blocks, block, 5).mean(1):
        found.add({"all": part, "cut": cut(part)})
    return found


def test_the_bandit_s_own_gradient_is_its_mean():
    """The closed form is that of the expected reward, by autograd."""
    logits = LOGITS.clone().requires_grad_()
    (logits.softmax(0) @ REWARDS).backward()
    assert torch.allclose(logits.grad, arms_of_a_bandit()[1])


@pytest.mark.parametrize("block", (1, 4, 16))
def test_the_noise_scale_of_a_bandit_is_right_whatever_the_blocks(block):
    _, mean, noise = arms_of_a_bandit()
    true = noise / mean.square().sum().item()
    found = drawn(64_000 // block, block, 1).scale("all")
    assert found.answers == pytest.approx(true, rel=0.1)
    assert found.signal == pytest.approx(mean.square().sum().item(), rel=0.1)
    assert found.noise == pytest.approx(noise, rel=0.1)
    assert 0 < found.se < 0.1 * true


def test_few_answers_give_the_right_figures_on_average_and_a_biased_estimator_does_not():
    """16 answers are fewer than the noise scale: the mean gradient is mostly noise there."""
    _, mean, noise = arms_of_a_bandit()
    signal, plain = [], []
    for seed in range(800):
        found = drawn(16, 1, seed)
        signal.append(found.scale("all").signal)
        total = sum(sums.total for sums in found.groups)[0] / 16
        plain.append(total.square().sum().item())
    true = mean.square().sum().item()
    assert sum(signal) / 800 == pytest.approx(true, rel=0.1)
    assert sum(plain) / 800 == pytest.approx(true + noise / 16, rel=0.1)
    assert not sum(plain) / 800 == pytest.approx(true, rel=0.1)  # the control


def test_the_standard_error_is_that_of_the_estimates():
    scales = [drawn(512, 4, seed).scale("all") for seed in range(100, 160)]
    spread = torch.tensor([scale.answers for scale in scales]).std().item()
    mean_se = sum(scale.se for scale in scales) / len(scales)
    assert 0.6 < mean_se / spread < 1.6


def test_cosines_are_of_the_mean_gradients_and_not_of_their_noise():
    each, mean, _ = arms_of_a_bandit()
    weights = torch.tensor([1.0, 0.0, 1.0, 0.0, -1.0], dtype=torch.float64)
    true = nn.functional.cosine_similarity(mean, weights * mean, dim=0).item()
    found = drawn(4_000, 4, 5, lambda g: weights * g)
    assert found.cosine("all", "cut") == pytest.approx(true, abs=0.05)
    assert found.cosine("all", "all") == pytest.approx(1)
    of_blocks = nn.functional.cosine_similarity(each, weights * each, dim=1)
    chance = LOGITS.softmax(0)
    assert abs((chance @ of_blocks).item() - true) > 0.1  # the noise has another cosine


def test_what_cannot_be_told_is_not_made_up():
    noise = GradientNoise(["a"], 4)
    noise.add({"a": torch.ones(3)})
    with pytest.raises(ValueError, match="of 1 blocks, expected at least 2"):
        noise.scale("a")
    noise.add({"a": -torch.ones(3)})
    found = noise.scale("a")
    assert found.signal < 0 and found.answers == math.inf == found.se
    assert math.isnan(noise.cosine("a", "a")) and GROUPS > 2


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """Every stage before PPO, of a model that has learnt little."""
    out = tmp_path_factory.mktemp("noise") / "run"
    flags = ["--out", str(out), "--sessions.train-users", "80", "--sessions.heldout-users", "8",
             "--sessions.test-users", "8", "--scratch.hidden-size", "32", "--scratch.vocab-size",
             "400", "--scratch.intermediate-size", "32", "--sft.max-steps", "60",
             "--generate.samples", "64", "--generate.max-new-tokens", "24",
             "--eval.noise-answers", "64"]  # fmt: skip
    for stage in ("data", "sft", "generate", "label", "map", "train-rm"):
        main([stage, *flags])
    return out


def test_noise_of_a_run(run_folder, capsys):
    main(["noise", "--out", str(run_folder)])
    found = json.loads((run_folder / "noise/noise.json").read_text())
    shown, said = capsys.readouterr()
    assert said.rstrip().endswith(str(run_folder / "noise/noise.json"))
    assert found["answers"] == 64 and found["fitted_on"] <= 64
    arms = found["arms"]
    assert len(arms) == 6 and all(name in shown for name in arms)
    assert arms["the total itself"]["cosine"] in (None, pytest.approx(1))
    assert all(arm["noise"] > 0 for arm in arms.values())
    # Unfitted critics give 0: with lambda 1 token and end would be one; with .95 they are not.
    signals = [arm["signal"] for arm in arms.values()]
    assert len(set(signals)) == len(signals)


def test_a_gradient_is_that_of_ppo_s_first_update(run_folder):
    """Of the clipped objective at the policy that sampled, times its tokens over the answers."""
    from pathlib import Path

    from tppo.commands import _read
    from tppo.config import fill_defaults
    from tppo.methods.critic_fit import sampled
    from tppo.methods.gradient_noise import policy_gradient
    from tppo.models.guards import trainable
    from tppo.models.policy import policy_head, policy_states
    from tppo.stages.ppo import new_trainer, questions_of
    from tppo.stages.run import Run

    options = _read(Path(run_folder) / "run.yaml")
    run = Run(out=run_folder, config=fill_defaults(options.settings, False))
    ppo = new_trainer(run)
    policy = ppo.models.policy
    questions = questions_of(run, run.sessions("train"), policy)
    asked, rollout = sampled(ppo, questions, 8)
    experience, _ = ppo.score(rollout, ppo.answers(asked, rollout))
    found = policy_gradient(policy, experience, ppo.sampling.temperature)
    tokens = experience.masks.policy.sum()
    loss = ppo.objective(policy_head(policy), policy_states(policy, experience.batch), experience,
                         temperature=ppo.sampling.temperature, num_tokens=tokens)  # fmt: skip
    loss.loss.backward()
    own = torch.cat([w.grad.flatten() for w in trainable(policy)]) * tokens / 8
    assert found.norm() > 1e-4 and torch.allclose(found, -own, atol=1e-5 * own.norm().item())
