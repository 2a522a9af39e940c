"""Advantages with and without a critic: their formulas in plain Python, and that they learn."""

import random
from dataclasses import replace
from statistics import mean, stdev

import pytest
import torch
from test_ppo import CONFIG, GROUPS, folder  # noqa: F401

from tppo.errors import DataError
from tppo.methods.advantages import ADVANTAGES, GAE, GRPO, RLOO, Masks, TokenAdvantages
from tppo.methods.config import PPOConfig
from tppo.methods.experience import Models
from tppo.methods.ppo import PPO
from tppo.models.batch import Batch
from tppo.models.load import load_policy
from tppo.models.policy import Critic
from tppo.models.rollout import HFRollout, RolloutBatch, Sampling
from tppo.rewards import Answers, Questions, TokenReward
from tppo.rewards.terminal import TerminalReward
from tppo.rewards.token_model import TokenModelReward

CPU, PAD, EOS = torch.device("cpu"), 0, 1
LIKED = 20  # the token that the hand-made reward pays


class Likes:
    """Half a point for each token LIKED, and half a one off for each other."""

    def __init__(self):
        self.seen = []

    def __call__(self, batch, answers):
        self.seen.append(answers)
        paid = torch.where(batch.targets == LIKED, 0.5, -0.5)
        return TokenReward(paid * batch.mask)


def trainer(folder, config, reward=None, advantage=None):  # noqa: F811
    policy = load_policy(folder, CPU)
    used = advantage or ADVANTAGES[config.advantage](config)
    critic = Critic.from_policy(folder, CPU) if used.needs_critic else None
    models = Models(policy, load_policy(folder, CPU), critic)
    rollout = HFRollout(policy, pad_id=PAD, eos_id=EOS)
    return PPO(
        models, rollout, config, reward=reward or Likes(), advantage=advantage,
        sampling=Sampling(8), pad_id=PAD, eos_id=EOS, seed=0,
    )  # fmt: skip


# Ragged random input ------------------------------------------------------------------------------
LENGTHS = [5, 1, 3, 2, 4, 4, 1, 6, 2]
NUMBERS = [7, 7, 7, 3, 3, 9, 9, 9, 9]  # of the prompts
KL, GAMMA = 0.3, 0.9


def ragged(seed=0, terminal=False):
    """Rewards and log-probs as lists, and what an advantage is called with."""
    rng = random.Random(seed)
    rows = [[[rng.gauss(0, 1) for _ in range(n)] for n in LENGTHS] for _ in range(3)]
    if terminal:
        rows[0] = [[0.0] * (len(row) - 1) + [row[-1]] for row in rows[0]]
    pays = [[rng.random() < 0.7 for _ in range(n)] for n in LENGTHS]
    width = max(LENGTHS)

    def padded(lists, fill):
        return torch.tensor([row + [fill] * (width - len(row)) for row in lists])

    mask = padded([[True] * n for n in LENGTHS], False)
    masks = Masks(mask, mask, mask, padded(pays, False))
    tensors = [padded(lists, float("nan")) for lists in rows]  # filler must reach no result
    return rows, pays, (tensors[0], None, masks, tensors[1], tensors[2], NUMBERS)


def to_go(rows, pays, kl_coef, gamma):
    found = []
    for reward, old, ref, pay in zip(*rows, pays, strict=True):
        total, back = 0.0, []
        for t in reversed(range(len(reward))):
            total = reward[t] - kl_coef * (old[t] - ref[t]) * pay[t] + gamma * total
            back.insert(0, total)
        found.append(back)
    return found


def held(row, t):
    """A response that has ended counts with its last token's."""
    return row[min(t, len(row) - 1)]


def slow_grpo(returns, normalize=True):
    found = []
    for i, own in enumerate(returns):
        group = [g for g, number in zip(returns, NUMBERS, strict=True) if number == NUMBERS[i]]

        def off(row, t, group=group):
            return row[t] - mean(held(other, t) for other in group)

        squares = [mean(off(row, t) ** 2 for t in range(len(row))) for row in group]
        std = (sum(squares) / (len(group) - 1)) ** 0.5 + 1e-4 if normalize else 1.0
        found.append([off(own, t) / std for t in range(len(own))])
    return found


def slow_rloo(returns):
    found = []
    for i, own in enumerate(returns):
        others = [g for j, g in enumerate(returns) if NUMBERS[j] == NUMBERS[i] and j != i]
        found.append([own[t] - mean(held(g, t) for g in others) for t in range(len(own))])
    return found


def check(found, expected):
    for row, (n, wanted) in zip(found.advantages, zip(LENGTHS, expected, strict=True), strict=True):
        torch.testing.assert_close(row[:n], torch.tensor(wanted), atol=1e-5, rtol=1e-5)
        assert row[n:].tolist() == [0.0] * (len(row) - n)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("terminal", [False, True])
def test_grpo_and_rloo_are_their_formulas(seed, terminal):
    rows, pays, arguments = ragged(seed, terminal)
    for kl_coef, gamma in ((0.0, 1.0), (KL, GAMMA)):
        returns = to_go(rows, pays, kl_coef, gamma)
        check(GRPO(kl_coef, gamma)(*arguments), slow_grpo(returns))
        check(GRPO(kl_coef, gamma, normalize=False)(*arguments), slow_grpo(returns, False))
        check(RLOO(kl_coef, gamma)(*arguments), slow_rloo(returns))


def test_a_reward_at_the_last_token_gives_the_papers_advantages():
    """One number a response, the same at every token of it."""
    rows, _, arguments = ragged(terminal=True)
    totals = [row[-1] for row in rows[0]]
    grpo, rloo = GRPO(0.0)(*arguments).advantages, RLOO(0.0)(*arguments).advantages
    for i, total in enumerate(totals):
        group = [x for x, number in zip(totals, NUMBERS, strict=True) if number == NUMBERS[i]]
        wanted = (total - mean(group)) / (stdev(group) + 1e-4)
        assert grpo[i, : LENGTHS[i]].tolist() == pytest.approx([wanted] * LENGTHS[i], abs=1e-5)
        wanted = total - (sum(group) - total) / (len(group) - 1)
        assert rloo[i, : LENGTHS[i]].tolist() == pytest.approx([wanted] * LENGTHS[i], abs=1e-5)


def test_gae_pays_kl_and_whitens_by_its_masks():
    """KL of tokens outside `masks.kl` costs nothing, whatever their log-probs are."""
    rows, pays, (rewards, _, masks, old, ref, groups) = ragged()
    trained = masks.action & (torch.rand(masks.action.shape) < 0.6)
    masks = masks._replace(policy=trained)
    values = torch.zeros_like(rewards)
    raw = GAE(KL, GAMMA, 1.0, normalize=False)(rewards, values, masks, old, ref, groups)
    check(raw, to_go(rows, pays, KL, GAMMA))
    white = GAE(KL, GAMMA, 1.0)(rewards, values, masks, old, ref, groups).advantages
    assert white[~trained].abs().max() == 0
    assert white[trained].mean().item() == pytest.approx(0, abs=1e-6)
    assert white[trained].std().item() == pytest.approx(1, abs=1e-5)


def test_responses_that_are_paid_alike_have_no_advantage():
    rewards = torch.tensor([[0.3, -0.1, 0.0], [0.3, -0.1, 0.0]])
    mask = torch.ones(2, 3, dtype=torch.bool)
    logprobs = torch.randn(2, 3)
    for kind in (GRPO(0.0), RLOO(0.0)):
        found = kind(rewards, None, Masks(mask, mask, mask, mask), logprobs, logprobs, [0, 0])
        assert found.advantages.abs().max() < 1e-3 and found.returns is None


def test_one_response_of_a_prompt_is_nothing_to_compare():
    _, _, arguments = ragged()
    for kind in (GRPO(0.0), RLOO(0.0)):
        with pytest.raises(ValueError, match="one response alone.*--ppo.responses-per-prompt"):
            kind(*arguments[:-1], [7, 7, 7, 3, 4, 9, 9, 9, 9])
    for name in ("grpo", "rloo", "remax"):
        with pytest.raises(DataError, match=f"with advantage {name}.*--ppo.responses-per-prompt"):
            PPOConfig(advantage=name)
        PPOConfig(advantage=name, responses_per_prompt=2)


# Steps --------------------------------------------------------------------------------------------
FOUR = replace(CONFIG, responses_per_prompt=4, length_alpha=None, bootstrap_truncated=False)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_each_of_them_raises_a_dense_reward_from_the_same_start(folder, name):  # noqa: F811
    ppo = trainer(folder, replace(FOUR, advantage=name))
    scores = [ppo.step(Questions(GROUPS))[0]["objective/scores"]
              for _ in range(14 if name == "remax" else 8)]  # one answer is a noisy baseline
    length = -2.0 * scores[0]  # about: hardly a token is liked
    assert sum(scores[-2:]) / 2 > scores[0] + 0.25 * length, scores


@pytest.mark.parametrize("name", ["grpo", "rloo", "remax"])
def test_without_a_critic_there_is_nothing_of_one(folder, name):  # noqa: F811
    config = replace(FOUR, advantage=name, verify_prefix=True)
    ppo = trainer(folder, config)
    assert list(ppo.models.trained) == ["policy"] and len(ppo.optimizer.param_groups) == 1
    metrics, _ = ppo.step(Questions(GROUPS))
    assert not {"loss/value_avg", "val/clipfrac_avg", "val/explained_variance"} & metrics.keys()
    assert metrics["val/ratio"] == pytest.approx(1, abs=0.5)
    assert all(isinstance(value, float | int) for value in metrics.values())
    with_critic = Models(*ppo.models[:2], Critic.from_policy(folder, CPU))
    for models, wanted in ((with_critic, name), (ppo.models, "gae")):
        with pytest.raises(ValueError, match=r"models\.critic was .*, expected .* for advantages"):
            PPO(models, ppo.rollout, replace(FOUR, advantage=wanted), reward=Likes(),
                sampling=Sampling(8), pad_id=PAD, eos_id=EOS, seed=0)  # fmt: skip


def test_a_minibatch_holds_whole_groups(folder):  # noqa: F811
    ppo = trainer(folder, replace(FOUR, advantage="rloo"))
    seen, real = [], ppo._minibatch

    def noted(data, first):
        seen.append([tuple(ids) for ids in data.batch.prompt_ids])
        return real(data, first)

    ppo._minibatch = noted
    ppo.step(Questions(GROUPS))
    assert len(seen) == 2 * 2
    for prompts in seen:
        assert all(len(set(prompts[i : i + 4])) == 1 for i in range(0, 8, 4))


def test_a_reward_sees_the_answers_with_their_groups_and_columns(folder):  # noqa: F811
    reward = Likes()
    ppo = trainer(folder, replace(FOUR, advantage="grpo"), reward)
    columns = {"age": list(range(16))}
    _, rollout = ppo.step(Questions(GROUPS, ["a"] * 16, columns))
    (seen,) = reward.seen
    assert seen.groups == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert seen.response_ids == rollout.response_ids and seen.columns == columns
    assert seen.prompts == ["a"] * 16 and list(seen.eos_ids) == [EOS]


class Own:
    """An advantage of somebody else's that gives what it is told."""

    def __init__(self, given, needs_critic):
        self.given, self.needs_critic = given, needs_critic

    def __call__(self, rewards, values, masks, old, ref, groups, bootstrap=None):
        return self.given(rewards)


@pytest.mark.parametrize(
    ("given", "needs_critic", "said"),
    [
        (lambda r: r, False, "the advantage gave a Tensor, expected a tppo.TokenAdvantages"),
        (TokenAdvantages, True, "gave returns None, expected the critic's targets"),
        (lambda r: TokenAdvantages(r.sum(1)), False, r"advantages of shape \[16\], expected \[B"),
        (lambda r: TokenAdvantages(r, r[:, :1]), True, r"returns of shape \[16, 1\], expected"),
    ],
)
def test_an_advantage_that_breaks_its_promise_is_told_what(
    folder, given, needs_critic, said  # noqa: F811
):
    ppo = trainer(folder, FOUR, advantage=Own(given, needs_critic))
    with pytest.raises((ValueError, RuntimeError), match=said):
        ppo.step(Questions(GROUPS))


def test_returns_that_are_not_finite_cost_the_step_and_are_named(folder, capsys):  # noqa: F811
    ppo = trainer(folder, FOUR, advantage=Own(lambda r: TokenAdvantages(r, r / 0), True))
    metrics, _ = ppo.step(Questions(GROUPS))
    assert metrics["ppo/spoilt"] == 1 and metrics["policy/updates"] == 0
    assert "not finite: returns" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.bfloat16])
def test_rewards_of_any_type_of_numbers_are_taken(folder, dtype):  # noqa: F811
    ppo = trainer(
        folder, replace(FOUR, advantage="rloo"),
        lambda batch, answers: TokenReward((2 * Likes()(batch, answers).rewards).to(dtype)),
    )  # fmt: skip
    rollout = ppo.rollout.generate(GROUPS, Sampling(8))
    found, _ = ppo.score(rollout, ppo.answers(Questions(GROUPS), rollout))
    wanted = 2 * Likes()(found.batch, None).rewards
    assert found.rewards.dtype == torch.float32 and torch.equal(found.rewards, wanted)


# Rewards ------------------------------------------------------------------------------------------
def test_a_reward_that_is_no_token_reward_is_told_so(folder):  # noqa: F811
    ppo = trainer(folder, FOUR, lambda batch, answers: torch.zeros(batch.mask.shape))
    with pytest.raises(ValueError, match="the reward gave a Tensor, expected a tppo.TokenReward"):
        ppo.step(Questions(GROUPS))


def test_only_the_token_model_itself_bootstraps_by_default(folder):  # noqa: F811
    """Another reward pays all of a cut answer at its end, with or without a length penalty."""
    after = torch.ones(1)
    for reward, wanted in ((Likes(), 0.0), (TerminalReward(Likes()), 0.0),
                           (TokenModelReward(torch.nn.Linear(1, 1), length_alpha=None), 1.0),
                           (TokenModelReward(torch.nn.Linear(1, 1)), 0.0)):  # fmt: skip
        for length_alpha in (None, 2.0):
            config = replace(FOUR, length_alpha=length_alpha, bootstrap_truncated=None)
            ppo = trainer(folder, config, reward)
            assert ppo.bootstrap(["length"], after).tolist() == [wanted]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda mask: torch.zeros(len(mask)), r"rewards of shape \[2\], expected \[B, T\] = \[2, "),
        (lambda mask: torch.ones(mask.shape), r"1.0 at token 1 of response 0, which has 1 tokens"),
        (lambda mask: torch.where(mask, float("nan"), 0.0), "not finite: rewards, advantages"),
    ],
)
def test_a_reward_that_breaks_its_promise_stops_before_the_update(folder, wrong, said):  # noqa: F811
    config = replace(FOUR, advantage="rloo", responses_per_prompt=2)
    ppo = trainer(folder, config, lambda batch, answers: TokenReward(wrong(batch.mask)))
    rollout = RolloutBatch([[5], [5]], [[8], [9, EOS]], None, ["length", "eos"])
    with pytest.raises((ValueError, RuntimeError), match=said):
        ppo.score(rollout, ppo.answers(Questions([[5], [5]]), rollout))


def test_a_terminal_reward_pays_the_total_at_the_last_token():
    class Dense:
        def __call__(self, batch, answers):
            paid = torch.arange(1.0, 7.0).reshape(2, 3) * batch.mask
            return TokenReward(paid, batch.targets)

    batch = Batch([[5], [5]], [[8, 9, EOS], [10]], PAD)
    answers = Answers([], batch.response_ids, {}, None, [EOS], [0, 0])
    found = TerminalReward(Dense())(batch, answers)
    assert found.rewards.tolist() == [[0, 0, 6], [4, 0, 0]]
    assert torch.equal(found.category, batch.targets)


def test_a_terminal_reward_keeps_the_return_and_freezes_its_model(folder):  # noqa: F811
    """With gamma and lambda 1 and a critic of 0, the first tokens have the same advantage."""
    inner = torch.nn.Linear(1, 1)

    class OfModel(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, batch, answers):
            return Likes()(batch, answers)

    config = replace(FOUR, lam=1.0, normalize=False, kl_coef=0.0)
    found = []
    for reward in (OfModel(), TerminalReward(OfModel())):
        ppo = trainer(folder, config, reward)
        assert not any(p.requires_grad for p in reward.parameters())
        rollout = ppo.rollout.generate(GROUPS, Sampling(8))
        found.append(ppo.score(rollout, ppo.answers(Questions(GROUPS), rollout))[0])
    dense, terminal = found
    assert torch.equal(dense.advantages[:, 0], terminal.advantages[:, 0])
    assert not torch.equal(dense.advantages, terminal.advantages)
    with torch.no_grad():
        inner.bias.fill_(float("inf"))
    ppo = trainer(folder, config, TerminalReward(OfModel()))
    with pytest.raises(RuntimeError, match="the norm of the reward's weights is inf"):
        ppo.step(Questions(GROUPS))
