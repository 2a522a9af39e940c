"""The noise stage: how noisy the policy's gradient is at the SFT model, by where rewards are paid.

Every arm is given the same answers and the same reward model.  What differs is where the rewards
are paid, and whether the critic has been fitted beforehand on answers that the stages before have
generated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from tppo.methods.advantages import GAE
from tppo.methods.critic_fit import fit_critic, sampled
from tppo.methods.gradient_noise import GradientNoise, policy_gradient
from tppo.methods.ppo import PPO
from tppo.models.rollout import RolloutBatch
from tppo.progress import say, status
from tppo.rewards import Questions, Reward
from tppo.rewards.terminal import TerminalReward
from tppo.stages.artifacts import NOISE, SFT_MODEL
from tppo.stages.models import new_ppo
from tppo.stages.ppo import generated_answers, policy_and_ref, questions_of, run_reward
from tppo.stages.run import Run
from tppo.store.jsonl import write_json

BLOCK = 8  # answers whose gradient is one; the estimate does not depend on it
FITTED_ON = 1600  # answers at most, of those that were generated, where --ppo.fit-critic is 0
TOTAL = "the total itself"  # without bias: lambda 1, whatever the critic


class Paid(NamedTuple):
    """Where rewards are paid, and what becomes of them."""

    trainer: PPO
    advantage: GAE


def noise(run: Run) -> None:
    """Gradient noise of each arm, and the cosine with the gradient of the expected total."""
    with run.stage("noise") as out:
        found = measured(run)
        write_json(out / NOISE.name, found)
    print(table(found))
    say(f"noise: {run.path(NOISE)}")


def measured(run: Run) -> dict[str, Any]:
    """What `noise.json` holds."""
    policy, ref = policy_and_ref(run, SFT_MODEL)
    reward = run_reward(run, policy, ref)
    questions = questions_of(run, run.sessions("train"), policy)
    config = replace(run.config.ppo, advantage="gae")

    def trainer(pays: Reward) -> PPO:
        return new_ppo(run, config, policy, ref, pays)

    at_tokens, at_end = (trainer(reward), trainer(TerminalReward(reward)))
    fitted = (trainer(reward), trainer(TerminalReward(reward)))
    existing = generated_answers(run, questions, config.fit_critic or FITTED_ON)
    fits = [fit_critic(ppo, *existing) for ppo in fitted]
    gae = GAE(config.kl_coef, config.gamma, config.lam, normalize=False)
    arms = {
        "rewards at tokens": Paid(at_tokens, gae),
        "total at the end": Paid(at_end, gae),
        "rewards at tokens, critic fitted": Paid(fitted[0], gae),
        "total at the end, critic fitted": Paid(fitted[1], gae),
        "each token's own reward": Paid(at_tokens, replace(gae, gamma=0.0, lam=0.0)),
        TOTAL: Paid(fitted[0], replace(gae, lam=1.0)),
    }
    asked, rollout = sampled(at_tokens, questions, run.config.eval.noise_answers)
    noise = gradients(arms, asked, rollout)
    explained = {name: fit.explained_variance_after
                 for name, fit in zip(list(arms)[2:4], fits, strict=True)}  # fmt: skip
    return {
        "answers": noise.blocks * BLOCK,
        "tokens": sum(map(len, rollout.response_ids)) / len(rollout.response_ids),
        "fitted_on": fits[0].answers,
        "arms": {
            name: {
                **noise.scale(name)._asdict(), "cosine": noise.cosine(name, TOTAL),
                "explained_variance": explained.get(name),
            }
            for name in arms
        },
    }  # fmt: skip


def gradients(arms: Mapping[str, Paid], asked: Questions, rollout: RolloutBatch) -> GradientNoise:
    """The gradients of all arms over the same blocks of answers."""
    found = GradientNoise(list(arms), BLOCK)
    blocks = range(0, len(asked) - BLOCK + 1, BLOCK)
    with status("gradient noise", len(blocks)) as bar:
        for first in blocks:
            rows = range(first, first + BLOCK)
            part = RolloutBatch([rollout.prompt_ids[i] for i in rows],
                                [rollout.response_ids[i] for i in rows], None,
                                [rollout.finish[i] for i in rows])  # fmt: skip
            each = {}
            for name, (ppo, advantage) in arms.items():
                ppo.advantage = advantage
                experience, _ = ppo.score(part, ppo.answers(asked.rows(rows), part))
                temperature = ppo.sampling.temperature
                each[name] = policy_gradient(ppo.models.policy, experience, temperature)
            found.add(each)
            bar.advance()
    return found


def table(found: Mapping[str, Any]) -> str:
    """The figures as lines of text."""
    lines = [f"gradient noise at the SFT model, {found['answers']} answers of "
             f"{found['tokens']:.1f} tokens; critics fitted on {found['fitted_on']}",
             f"{'':<34}{'signal = noise at answers':>26}{'cosine with the total':>24}"]  # fmt: skip
    for name, arm in found["arms"].items():
        scale = f"{arm['answers']:.1f} ± {arm['se']:.1f}"
        lines.append(f"{name:<34}{scale:>26}{arm['cosine']:>24.2f}")
    return "\n".join(lines)
