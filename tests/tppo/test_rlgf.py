"""A guide that writes a part of the answers: what each algorithm comes down to, and its masks.

Chang et al. 2023: PPO++, AggreVaTeD, LOLS and D2LOLS.
"""

import copy
from dataclasses import replace

import pytest
import torch
from _weights import enlarged
from test_advantages import CPU, EOS, PAD, Likes
from test_ppo import CONFIG, GROUPS, folder  # noqa: F401
from transformers import LlamaConfig, LlamaForCausalLM

from tppo.methods.config import RLGFConfig
from tppo.methods.experience import Models
from tppo.methods.ppo import PPO
from tppo.methods.rlgf import AGGREVATED, PLUS, SKIPPED, GuidedPPO
from tppo.models.batch import Batch
from tppo.models.guards import GuardError
from tppo.models.load import load_policy
from tppo.models.policy import Critic, TwoCritics, learners, policy_logprobs
from tppo.models.rollout import LOST, HFRollout, RolloutBatch, Sampling
from tppo.rewards import Questions
from tppo.rewards.terminal import TerminalReward

NAN = float("nan")
PAPER = RLGFConfig()
OWN = Sampling(1)  # the guide's temperature and top_p: the whole distribution, as the learner's
ASKED = Questions(GROUPS, columns={"target": ["x"] * len(GROUPS)})
SETTINGS = replace(CONFIG, length_alpha=None, value_clip=0.2)


def other_model():
    """A guide with weights of its own."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=2,
    )  # fmt: skip
    return enlarged(LlamaForCausalLM(config)).eval()


class Ends:
    """A guide that always goes on with the same tokens."""

    def __init__(self, *ids):
        self.ids = list(ids)

    def generate(self, prompts, sampling, prefixes=None):
        begun = prefixes or [[] for _ in prompts]
        rows = [[*b, *self.ids][: sampling.max_new_tokens] for b in begun]
        author = [[t >= len(b) for t in range(len(r))] for b, r in zip(begun, rows, strict=True)]
        finish = ["eos" if row[-1:] == [EOS] else "length" for row in rows]
        return RolloutBatch([[*p] for p in prompts], rows, None, finish, author)


def heads(critic, seed):
    """Values that are not 0, so that a wrong critic or token is seen."""
    torch.manual_seed(seed)
    torch.nn.init.normal_(critic.head.weight)
    return critic


def parts(folder, two=False, reward=None, config=SETTINGS):  # noqa: F811
    policy = load_policy(folder, CPU)
    critic = heads(Critic.from_policy(folder, CPU), 3)
    if two:
        critic = TwoCritics(critic, heads(Critic.from_policy(folder, CPU), 4))
    models = Models(policy, load_policy(folder, CPU), critic)
    options = {"reward": reward or Likes(), "sampling": Sampling(8), "pad_id": PAD,
               "eos_id": EOS, "seed": 0}  # fmt: skip
    return (models, HFRollout(policy, pad_id=PAD, eos_id=EOS), config), options


def plain(folder, **changes):  # noqa: F811
    given, options = parts(folder, **changes)
    return PPO(*given, **options)


def guided(folder, algorithm, guide=None, rlgf=PAPER, sampling=OWN, **changes):  # noqa: F811
    given, options = parts(folder, two=algorithm == "lols", **changes)
    guide = guide or HFRollout(other_model(), pad_id=PAD, eos_id=EOS)
    if guide == "learner":
        guide = given[1]
    return GuidedPPO(*given, **options, algorithm=algorithm, guide=guide, rlgf=rlgf,
                     guide_sampling=sampling)  # fmt: skip


def weights(ppo):
    """Of the policy and of the learner's critic, or the only one."""
    models = ppo.models.policy, learners(ppo.models.critic)
    return [p.detach().clone() for model in models for p in model.state_dict().values()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def steps(ppo, n=2):
    """Some steps; their figures without those that plain PPO does not have."""
    found = []
    for _ in range(n):
        metrics, _ = ppo.step(ASKED)
        found.append({k: v for k, v in metrics.items() if not k.startswith("guide/")})
    return found


# Limits -------------------------------------------------------------------------------------------
def test_ppo_plus_plus_with_beta_0_is_ppo(folder):  # noqa: F811
    one, other = plain(folder), guided(folder, "ppo++", rlgf=replace(PAPER, beta=0.0))
    start = weights(one)
    assert steps(one) == steps(other)
    assert same(weights(one), weights(other)) and not same(start, weights(one))
    another = guided(folder, "ppo++")  # and with another beta it is not
    assert steps(another) != steps(one) and not same(weights(one), weights(another))


def test_aggrevated_whose_guide_is_the_learner_has_the_learners_own_values(folder):  # noqa: F811
    """Where the guide writes all of each answer, the critic learns what PPO's does while it warms
    up; and of a mixed answer rewards, values and returns are those of PPO.
    """
    config = replace(SETTINGS, critic_warmup_steps=9)
    one = plain(folder, config=config)
    alone = guided(folder, "aggrevated", "learner", replace(PAPER, beta_aggrevated=0.0))
    figures = [[{k: row[k] for k in row if k.startswith("val/") and "ratio" not in k}
                for row in steps(ppo)] for ppo in (one, alone)]  # fmt: skip
    start = weights(plain(folder))
    assert figures[0] == figures[1] and same(weights(one), weights(alone))
    assert not same(start, weights(one))
    mixed = guided(folder, "aggrevated", "learner")
    mixed.step_count = 1
    mixed.begin(1)
    rollout = mixed.sample(GROUPS)
    own, _ = mixed.score(rollout, mixed.answers(ASKED, rollout))
    ppo = plain(folder)
    rollout = rollout._replace(author=None)
    learner, _ = ppo.score(rollout, ppo.answers(ASKED, rollout))
    for name in ("rewards", "logprobs", "values", "returns"):
        assert torch.equal(getattr(own, name), getattr(learner, name)), name
    assert own.masks.critic.any() and not torch.equal(own.masks.critic, learner.masks.critic)


def test_lols_with_tau_1_is_ppo_plus_plus(folder):  # noqa: F811
    one, other = guided(folder, "ppo++"), guided(folder, "lols", rlgf=replace(PAPER, tau=1.0))
    untouched = [p.clone() for p in other.models.critic.guide.parameters()]
    assert steps(one) == steps(other) and same(weights(one), weights(other))
    assert same(untouched, other.models.critic.guide.parameters())


def test_lols_with_tau_0_is_aggrevated(folder):  # noqa: F811
    one, other = guided(folder, "aggrevated"), guided(folder, "lols", rlgf=replace(PAPER, tau=0.0))
    other.models.critic.guide.load_state_dict(one.models.critic.state_dict())
    untouched = [p.clone() for p in other.models.critic.learner.parameters()]
    assert steps(one) == steps(other)
    assert same(one.models.policy.parameters(), other.models.policy.parameters())
    assert same(one.models.critic.parameters(), other.models.critic.guide.parameters())
    assert same(untouched, other.models.critic.learner.parameters())


def test_d2lols_is_aggrevated_before_its_switch_and_ppo_plus_plus_behind(folder):  # noqa: F811
    one = guided(folder, "aggrevated")
    other = guided(folder, "d2lols", rlgf=replace(PAPER, switch_step=2))
    assert steps(one) == steps(other) and same(weights(one), weights(other))
    assert [other.kind(step) for step in (1, 2, 3, 4)] == [AGGREVATED] * 2 + [PLUS] * 2
    third = guided(folder, "ppo++")  # behind the switch, from the same state
    for name, model in other.models.trained.items():
        third.models.trained[name].load_state_dict(model.state_dict())
    third.optimizer.load_state_dict(copy.deepcopy(other.optimizer.state_dict()))
    third.step_count = other.step_count
    assert steps(third) == steps(other) and same(weights(third), weights(other))
    default = guided(folder, "d2lols")
    default.schedules.steps = 50
    assert [default.kind(step) for step in (10, 11)] == [AGGREVATED, PLUS]


def test_the_steps_of_lols_follow_from_seed_and_number(folder):  # noqa: F811
    ppo = guided(folder, "lols")
    kinds = [ppo.kind(step) for step in range(1, 1001)]
    assert kinds == [ppo.kind(step) for step in range(1, 1001)]
    assert 0.75 < kinds.count(PLUS) / 1000 < 0.85
    other = guided(folder, "lols")
    other.seed = 1
    assert kinds != [other.kind(step) for step in range(1, 1001)]


# Cuts and authors ---------------------------------------------------------------------------------
def test_an_answer_is_cut_as_the_paper_says(folder):  # noqa: F811
    """Not at all with probability 1 - beta, else at each of 1 .. T - 1 alike; what was rolled in
    stays, whoever wrote it, and the other one writes on.
    """
    guide = Ends(9, 10, 11, 12, EOS)
    ppo = guided(folder, "ppo++", guide, replace(PAPER, beta=0.6))
    ppo.begin(1)
    lengths = []
    for seed in range(40):
        rollout = ppo.mix.generate(GROUPS, Sampling(8, seed=seed))
        for row, author in zip(rollout.response_ids, rollout.author, strict=True):
            h = author.count(False)
            assert row[:h] == guide.ids[:h] and author == [t >= h for t in range(len(row))]
            assert len(row) > h and EOS not in row[:-1]
            lengths.append(h)
    n = len(lengths)
    assert set(lengths) == {0, 1, 2, 3, 4}
    assert lengths.count(0) / n == pytest.approx(0.4, abs=0.06)
    for h in (1, 2, 3, 4):
        assert lengths.count(h) / n == pytest.approx(0.15, abs=0.05)
    again = ppo.mix.generate(GROUPS, Sampling(8, seed=39))
    assert again == rollout


def test_behind_the_cut_of_aggrevated_the_guide_writes(folder):  # noqa: F811
    guide = Ends(9, 10, EOS)
    ppo = guided(folder, "aggrevated", guide)
    ppo.begin(1)
    rollout = ppo.mix.generate(GROUPS, Sampling(8, seed=1))
    cuts = set()
    for row, author in zip(rollout.response_ids, rollout.author, strict=True):
        h = author.count(True)
        assert author == [t < h for t in range(len(row))] and row[h:] == guide.ids[: 8 - h]
        cuts.add(h)
    assert 0 in cuts and len(cuts) > 2
    alone = ppo.mix.learner.generate(GROUPS, Sampling(8, seed=(1 + 15_485_863) % 2**31))
    assert {len(row) for row in alone.response_ids} != {1}
    with pytest.raises(ValueError, match="prefixes were given, expected None"):
        ppo.mix.generate(GROUPS, Sampling(8), [[]] * 16)


def test_the_guide_samples_by_its_own_temperature_and_top_p(folder):  # noqa: F811
    """With a top_p near 0 it writes its likeliest answer, and the learner does not."""
    guide = HFRollout(other_model(), pad_id=PAD, eos_id=EOS)
    ppo = guided(folder, "aggrevated", guide, sampling=Sampling(1, 1.0, top_p=1e-6))
    ppo.begin(1)
    rollout = ppo.mix.generate(GROUPS, Sampling(8, seed=2))
    for prompt, row, author in zip(GROUPS, rollout.response_ids, rollout.author, strict=True):
        h = author.count(True)
        greedy = guide.generate([prompt], Sampling(8, 0.0), [row[:h]])
        assert greedy.response_ids == [row]
    with pytest.raises(ValueError, match=r"top_p was 0, expected a share"):
        Sampling(8, top_p=0)


# Masks --------------------------------------------------------------------------------------------
def scored(ppo, step=1):
    ppo.step_count = step
    ppo.begin(step)
    rollout = ppo.sample(GROUPS)
    return ppo.score(rollout, ppo.answers(ASKED, rollout)), rollout


@pytest.mark.parametrize("algorithm", ["ppo++", "aggrevated"])
def test_masks_say_who_is_trained_where(folder, algorithm):  # noqa: F811
    ppo = guided(folder, algorithm)
    (data, metrics), rollout = scored(ppo)
    own = torch.zeros_like(data.batch.mask)
    for b, row in enumerate(rollout.author):
        own[b, : len(row)] = torch.tensor(row)
    guides = data.batch.mask & ~own
    assert own.any() and guides.any()
    assert torch.equal(data.masks.action, data.batch.mask)
    assert torch.equal(data.masks.policy, own) and torch.equal(data.masks.kl, own)
    assert torch.equal(data.masks.critic, own if algorithm == "ppo++" else guides)
    assert data.advantages[~own].abs().max() == 0 and data.advantages[own].any()
    mixed = Likes()(data.batch, None).rewards.sum(1).mean().item()  # the whole answer is paid
    assert metrics["objective/scores"] == pytest.approx(mixed)


@pytest.mark.parametrize("algorithm", ["ppo++", "aggrevated"])
@pytest.mark.parametrize("value", [NAN, 1e38])
def test_nothing_is_learnt_from_a_token_that_it_should_not_be(folder, algorithm, value):  # noqa: F811
    """Neither the log-probs of the guide's tokens nor targets of the critic where it is not
    trained: whatever stands there, every weight moves to the same bits; a minibatch with it at
    another token is skipped.
    """
    results = []
    for poison in (False, True):
        ppo = guided(folder, algorithm)
        (data, _), _ = scored(ppo)
        if poison:
            for mask, *names in ((data.masks.policy, "logprobs", "advantages"),
                                 (data.masks.critic, "values", "returns")):  # fmt: skip
                spoilt = {name: getattr(data, name).masked_fill(~mask, value) for name in names}
                data = data._replace(**spoilt)
        ppo.step_count = 2
        before = weights(ppo)
        results.append((ppo.update(data), weights(ppo)))
        assert not same(before, weights(ppo))
    (figures, clean), (others, spoilt) = results
    assert figures == others and same(clean, spoilt)
    for name, mask in (("advantages", "policy"), ("returns", "critic")):
        ppo = guided(folder, algorithm)
        (data, _), _ = scored(ppo)
        b, t = getattr(data.masks, mask).nonzero()[0].tolist()
        getattr(data, name)[b, t] = NAN
        try:
            ppo.update(data)
        except GuardError:  # at the first update, or after several in a row
            continue
        assert ppo.skips.of_step


def test_the_guides_critic_has_targets_of_the_guide_alone(folder):  # noqa: F811
    """A value of the learner's tokens, however wrong, reaches no target of the guide's critic."""
    ppo = guided(folder, "aggrevated")
    (data, _), _ = scored(ppo)
    found = []
    for wrong in (0.0, 1e6):
        values = data.values + torch.where(data.masks.policy, wrong, 0.0)
        given = data.rewards, values, data.masks, data.logprobs, data.logprobs, [0] * 16
        found.append(ppo.advantage(*given).returns[data.masks.critic])
    assert torch.equal(*found)


def test_of_two_critics_the_other_one_is_neither_read_nor_stepped_on(folder):  # noqa: F811
    """Not by the momentum that its own steps have left, either, where gradients are exchanged."""
    ppo = guided(folder, "lols", rlgf=replace(PAPER, tau=0.5))
    kinds = [ppo.kind(step) for step in range(1, 7)]
    assert {PLUS, AGGREVATED} == set(kinds)
    for kind in kinds:
        critic = ppo.models.critic
        idle = critic.guide if kind == PLUS else critic.learner
        busy = critic.learner if kind == PLUS else critic.guide
        before = [[p.clone() for p in each.parameters()] for each in (idle, busy)]
        ppo.step(ASKED)
        assert same(before[0], idle.parameters()) and not same(before[1], busy.parameters())
        assert {id(p) for p in critic.parameters()} == {id(p) for p in busy.parameters()}
    assert {name.split(".")[0] for name in ppo.models.critic.state_dict()} == {"learner", "guide"}


# What else may happen -----------------------------------------------------------------------------
class Dies(Ends):
    """A guide that gives nothing in some of its calls."""

    def __init__(self, *calls):
        super().__init__(9, EOS)
        self.calls, self.dead = 0, calls

    def generate(self, prompts, sampling, prefixes=None):
        self.calls += 1
        found = super().generate(prompts, sampling, prefixes)
        if self.calls in self.dead:
            found.finish[-1] = LOST
        return found


@pytest.mark.parametrize("algorithm", ["ppo++", "aggrevated"])
def test_a_step_without_the_guides_answers_changes_nothing(folder, algorithm, capsys):  # noqa: F811
    ppo = guided(folder, algorithm, Dies(2))
    ppo.step(ASKED)
    before, kept = weights(ppo), ppo.optimizer.state_dict()["state"][0]["step"].item()
    metrics, rollout = ppo.step(ASKED)
    assert metrics == {SKIPPED: 1.0, "policy/updates": 0.0} and rollout.response_ids == []
    assert same(before, weights(ppo)) and ppo.step_count == 2
    assert ppo.optimizer.state_dict()["state"][0]["step"].item() == kept
    assert "step 2 is skipped: the guide gave no answer" in capsys.readouterr().err
    metrics, _ = ppo.step(ASKED)
    assert metrics[SKIPPED] == 0 and not same(before, weights(ppo))


@pytest.mark.parametrize("algorithm", ["ppo++", "aggrevated"])
def test_a_guide_that_writes_nothing_more(folder, algorithm):  # noqa: F811
    """An empty continuation: the answer ends, or is cut, where the learner stood."""
    for guide in (Ends(EOS), Ends()):
        ppo = guided(folder, algorithm, guide, replace(PAPER, beta_aggrevated=1.0))
        if not guide.ids and algorithm == "ppo++":
            continue  # a whole answer of no token is none: `TextGuide` calls it lost
        metrics, rollout = ppo.step(ASKED)
        assert all(rollout.response_ids) and metrics["policy/updates"] == 4
        assert all(torch.isfinite(torch.tensor(list(metrics.values()))))


@pytest.mark.parametrize(("algorithm", "paid"), [
    ("ppo++", "sentence"), ("aggrevated", "token"), ("lols", "sentence"), ("d2lols", "token"),
])
def test_the_learner_improves_with_a_guide_of_the_liked_token(folder, algorithm, paid):  # noqa: F811
    """By rewards of tokens, and by their total at the end."""
    reward = Likes() if paid == "token" else TerminalReward(Likes())
    rlgf = replace(PAPER, switch_step=4)
    ppo = guided(folder, algorithm, Ends(20, 20, 20, 20, EOS), rlgf, reward=reward)

    def score():
        rollout = ppo.mix.learner.generate(GROUPS * 4, Sampling(8, seed=99))
        batch = Batch(rollout.prompt_ids, rollout.response_ids, PAD, CPU)
        return Likes()(batch, None).rewards.sum(1).mean().item()

    before = score()
    for _ in range(14 if algorithm == "aggrevated" else 8):  # the fewest tokens that are trained
        ppo.step(ASKED)
    assert score() > before + 0.5


def test_kl_in_the_reward_is_a_flag(folder):  # noqa: F811
    """Without it the advantage is of the raw reward, and KL is a figure as before."""
    found = []
    for rlgf in (PAPER, replace(PAPER, kl_in_reward=False)):
        ppo = guided(folder, "ppo++", rlgf=rlgf)
        ppo.models.ref.load_state_dict(other_model_like(ppo.models.ref).state_dict())
        (data, metrics), _ = scored(ppo)
        found.append((data, metrics))
    (with_kl, figures), (without, others) = found
    assert figures["objective/kl"] == others["objective/kl"] != 0
    assert not torch.equal(with_kl.returns, without.returns)
    raw = plain(folder, config=replace(SETTINGS, kl_coef=0.0)).advantage(
        without.rewards, without.values, without.masks, without.logprobs, without.logprobs, [0] * 16
    )
    assert torch.equal(raw.returns, without.returns)

    class Odd:
        needs_critic = True

    given, options = parts(folder)
    with pytest.raises(ValueError, match="expected a dataclass with the field kl_coef"):
        GuidedPPO(*given, **options, advantage=Odd(), algorithm="ppo++", guide=given[1],
                  rlgf=replace(PAPER, kl_in_reward=False), guide_sampling=OWN)  # fmt: skip


def other_model_like(model):
    torch.manual_seed(11)
    return enlarged(LlamaForCausalLM(model.config))




def test_the_true_answers_are_a_term_of_the_loss(folder, monkeypatch):  # noqa: F811
    """Its gradient is that of weight / sum |y*| sum -log pi(y*), over the rows of a minibatch."""
    targets = {tuple(p): [20, *p[:2], EOS] for p in GROUPS}
    gradients = []
    for weight in (0.0, 0.5):
        ppo = guided(folder, "ppo++", rlgf=replace(PAPER, target_nll=weight))
        monkeypatch.setattr(ppo, "targets", targets)
        given = replace(PAPER, target_nll=0.0)
        ppo.rlgf, kept = given, ppo.rlgf
        (data, _), _ = scored(ppo)
        ppo.rlgf = kept
        ppo.optimizer.zero_grad()
        halves = [data.rows(rows) for rows in (range(10), range(10, 16))]
        losses = [ppo._backward(half, data, False) for half in halves]
        gradients.append([p.grad.clone() for p in ppo.models.policy.parameters()])
        value = sum(x.target for x in losses) if weight else None
    policy = load_policy(folder, CPU)
    batch = Batch(GROUPS, [targets[tuple(p)] for p in GROUPS], PAD, CPU)
    logprobs, _ = policy_logprobs(policy, batch, 1.0)
    nll = -logprobs.sum() / batch.mask.sum()
    (0.5 * nll).backward()
    assert value == pytest.approx(nll.item(), rel=1e-5)
    for without, added, parameter in zip(*gradients, policy.parameters(), strict=True):
        torch.testing.assert_close(added - without, parameter.grad, atol=1e-6, rtol=1e-4)
