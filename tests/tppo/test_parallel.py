"""Several processes train one model: balanced shares, and the step of one process."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from _processes import two_processes
from hypothesis import given, settings
from hypothesis import strategies as st
from test_shared_prefix import EOS, PAD, models, new_trainer, questions, score

from tppo.methods.config import PPOConfig, RLGFConfig
from tppo.methods.critic_fit import fit_critic
from tppo.methods.ppo import PPO
from tppo.methods.rlgf import GuidedPPO
from tppo.models.batch import Batch
from tppo.models.guards import GuardError
from tppo.models.parallel import ALONE, World
from tppo.models.policy import TwoCritics
from tppo.models.rollout import LOST, HFRollout, RolloutBatch, Sampling

PROMPTS = [p for p in ([5, 6, 7], [8, 9, 4], [10, 11], [12]) for _ in range(3)]
CONFIG = PPOConfig(
    lr=1e-3, critic_lr=1e-3, minibatch_size=6, epochs=2, responses_per_prompt=3, value_clip=0.1
)
ALL_SCHEDULES = {  # each of which decides something within three steps
    "lr_schedule": "cosine", "final_lr_share": 0.1, "lr_warmup_steps": 1,
    "critic_lr_warmup_steps": 2, "critic_warmup_steps": 1, "adaptive_kl": 0.05,
    "adaptive_kl_horizon": 200.0, "target_kl": 1e-3,
}  # fmt: skip
FAST = {"lr": 3e-2, "critic_lr": 1e-2}  # so that a step goes far enough to be stopped


def tokens_of(batch, part):
    prompts = {tuple(batch.prompt_ids[i]) for i in part}
    return sum(map(len, prompts)) + sum(len(batch.response_ids[i]) for i in part)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.lists(st.integers(1, 9), min_size=1, max_size=8)),
             min_size=1, max_size=8),
    st.integers(1, 5), st.integers(1, 200),
)  # fmt: skip
def test_shares_hold_every_response_once_and_are_balanced(groups, ranks, budget):
    prompts = [[g] * p for g, (p, lengths) in enumerate(groups, 3) for _ in lengths]
    responses = [[2] * n for _, lengths in groups for n in lengths]
    batch = Batch(prompts, responses, PAD)
    shares = batch.parts(budget, ranks)
    assert len(shares) == ranks
    assert sorted(i for share in shares for part in share for i in part) == [*range(len(prompts))]
    for part in (part for share in shares for part in share):
        assert tokens_of(batch, part) <= budget or len(part) == 1
    loads = [sum(tokens_of(batch, part) for part in share) for share in shares]
    alone = sum(tokens_of(batch, part) for part in batch.parts(budget)[0])
    largest = max(p + sum(lengths) for p, lengths in groups)
    assert max(loads) <= min(alone, alone / ranks + largest)


def test_one_prompt_is_split_only_where_that_is_less_to_wait_for():
    short = Batch([[5] * 4] * 8, [[6] * 10] * 8, PAD)
    assert [[*map(len, share)] for share in short.parts(1000, 4)] == [[2]] * 4
    two = Batch([[5] * 90] * 4 + [[6] * 90] * 4, [[7]] * 8, PAD)
    assert two.parts(1000, 2) == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]


def run_steps(world, answers=None):
    """Two updates on given answers, or two whole steps; metrics, and the weights afterwards."""
    ppo = new_trainer("shared", CONFIG, 6)
    ppo.world = world
    metrics = []
    for step in range(2):
        if answers is None:
            metrics.append(ppo.step(questions(PROMPTS))[0])
        else:
            ppo.step_count = step + 1
            experience, found = score(ppo, answers)
            metrics.append(found | ppo.update(experience))
    weights = [p.detach() for model in (ppo.models.policy, ppo.models.critic)
               for p in model.parameters()]  # fmt: skip
    return metrics, weights


def sampled(world):
    """Answers, figures and weights of steps whose answers the processes sample together: in batches
    that no number of processes divides, beside greedy ones, and with a guide.
    """
    found = {}
    remax = replace(CONFIG, advantage="remax")
    for name, config, batch in (("fives", CONFIG, 5), ("greedy", remax, 7)):
        plain = new_trainer("shared", CONFIG, 6)
        plain.rollout.batch_size, critic = batch, plain.models.critic
        found[name] = _two_steps(PPO(
            plain.models._replace(critic=critic if config is CONFIG else None), plain.rollout,
            config, reward=plain.reward, sampling=plain.sampling, pad_id=PAD, eos_id=EOS, seed=0,
            world=world,
        ))  # fmt: skip
    guide = HFRollout(models(seed=4)[0].policy, pad_id=PAD, eos_id=EOS, batch_size=4)
    found["guide"] = _two_steps(by_lols(world, guide))
    return found


def _two_steps(ppo):
    steps = [ppo.step(questions(PROMPTS)) for _ in range(2)]
    weights = [p.detach().numpy() for model in ppo.models.trained.values()
               for p in model.parameters()]  # fmt: skip
    return [rollout.response_ids for _, rollout in steps], [row for row, _ in steps], weights


def scheduled(world):
    """Figures and weights of three steps with every schedule at work."""
    ppo = new_trainer("shared", replace(CONFIG, batch_size=4, **FAST, **ALL_SCHEDULES), 6)
    ppo.world = world
    metrics = [ppo.step(questions(PROMPTS))[0] for _ in range(3)]
    return metrics, [p.detach() for p in ppo.models.policy.parameters()]


def fitted(world):
    """What the critic's fit on given answers found, and the critic afterwards."""
    ppo = new_trainer("shared", CONFIG, 6)
    ppo.world = world
    fit = fit_critic(ppo, questions(PROMPTS), given_answers())
    return fit, [p.detach() for p in ppo.models.critic.parameters()]


def rated(world):
    """The prompts whose responses the reward of a process gets, where those of one are much longer:
    in a step, and in the fit of the critic.
    """
    ppo, seen = new_trainer("shared", CONFIG, 6), []
    ppo.world, real = world, ppo.reward

    def reward(batch, answers):
        seen.append((list(answers.groups), list(answers.response_ids)))
        return real(batch, answers)

    ppo.reward = reward
    rollout = RolloutBatch([[5] * 40] * 3 + [[6]] * 3, [[7]] * 6, None, ["length"] * 6)
    score(ppo, rollout)
    answers = RolloutBatch([[5]] * 3 + [[6]] * 3, [[7] * 9] * 3 + [[7]] * 3, None, ["length"] * 6)
    fit_critic(ppo, questions(answers.prompt_ids), answers)
    return seen


class Away:
    """A guide that one process cannot reach in some of the steps."""

    def __init__(self, guide, away):
        self.guide, self.away = guide, away

    def generate(self, prompts, sampling, prefixes=None):
        found = self.guide.generate(prompts, sampling, prefixes)
        return found._replace(finish=[LOST] * len(prompts)) if self.away else found


def guided(world):
    """Steps of LOLS, of both kinds, and one whose guide is away for the second process alone.

    Which tokens are the guide's, as every process has it; figures, and the weights afterwards.
    """
    guide = Away(HFRollout(models(seed=4)[0].policy, pad_id=PAD, eos_id=EOS), False)
    ppo = by_lols(world, guide)
    used, metrics, authors = ppo.models, [], []
    for step in range(4):
        guide.away = step == 2 and world.rank == 1
        figures, rollout = ppo.step(questions(PROMPTS))
        metrics.append(figures)
        authors.append(rollout.author)
    weights = [p.detach() for model in (used.policy, *used.critic.children())
               for p in model.parameters()]  # fmt: skip
    return metrics, weights, authors


def by_lols(world, guide):
    plain = new_trainer("shared", CONFIG, 6)
    used = plain.models
    used = used._replace(critic=TwoCritics(used.critic, copy.deepcopy(used.critic)))
    ppo = GuidedPPO(
        used, plain.rollout, CONFIG, reward=plain.reward, sampling=plain.sampling, pad_id=PAD,
        eos_id=EOS, seed=0, algorithm="lols", guide=guide,
        rlgf=RLGFConfig(tau=0.5), guide_sampling=Sampling(6),
    )  # fmt: skip
    ppo.world = world
    return ppo


def given_answers():
    ppo = new_trainer("shared", CONFIG, 6)
    return ppo.rollout.generate(PROMPTS, ppo.sampling)


def spoilt_gradient(world):
    """What a process says where a gradient of the second one alone is not finite."""
    ppo = new_trainer("shared", CONFIG, 6)
    ppo.world = world
    ppo.step(questions(PROMPTS))
    if world.rank == 1:
        ppo.models.critic.head.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(GuardError) as caught:
        ppo.step(questions(PROMPTS))
    return str(caught.value)


def spoilt_loss(world):
    """The same for a loss that is not finite though its gradients are."""
    ppo = new_trainer("shared", CONFIG, 6)
    ppo.world, real = world, ppo._backward
    ppo._backward = lambda *part: (
        real(*part)._replace(value=torch.tensor(float("inf"))) if world.rank == 1 else real(*part)
    )
    with pytest.raises(GuardError) as caught:
        ppo.step(questions(PROMPTS))
    return str(caught.value)


def without_memory(world):
    """Gradients of an update, by its losses, where the second process has less memory."""
    ppo = new_trainer("shared", CONFIG, 6)
    ppo.world = world
    if world.rank == 1:
        ppo.part_size.tokens = 12
    ppo.step_count = 1
    experience, figures = score(ppo, given_answers())
    return figures | ppo.update(experience)


def worker(rank, meeting, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    world = World(rank, 2)
    found = (run_steps(world, given_answers()), run_steps(world), scheduled(world), fitted(world))
    results = [(m, [w.numpy() for w in ws]) for m, ws in found]
    metrics, weights, authors = guided(world)
    guide = metrics, [w.numpy() for w in weights], authors
    queue.put((rank, [*results, spoilt_gradient(world), spoilt_loss(world), rated(world), guide,
                      sampled(world), without_memory(world)]))  # fmt: skip
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_take_the_step_of_one():
    results = two_processes(worker)
    for first, second in zip(results[0][:4], results[1][:4], strict=True):
        assert first[0] == second[0], "the processes log different figures"
        for a, b in zip(first[1], second[1], strict=True):
            assert (a == b).all(), "the processes hold different weights"
    assert results[0][4:6] == results[1][4:6], "the processes stop for different reasons"
    assert results[0][4].startswith("ppo step 2: gradient norm of the critic is nan (the critic's")
    assert results[0][5].startswith("ppo step 1: value loss is inf. 3 batches in a row had")
    # A reward gets all responses to a prompt, however the models share them.
    assert results[0][6] == [([0, 0, 0], [[7]] * 3), ([0, 0, 0], [[7] * 9] * 3)]
    assert results[1][6] == [([1, 1, 1], [[7]] * 3), ([1, 1, 1], [[7]] * 3)]
    one, other = results[0][7], results[1][7]
    assert one[0] == other[0] and one[2] == other[2], "the processes guide differently"
    assert all((a == b).all() for a, b in zip(one[1], other[1], strict=True))
    assert [row["guide/skipped"] for row in one[0]] == [0, 0, 1, 0]
    assert {row.get("guide/aggrevated") for row in one[0]} == {0.0, 1.0, None}
    for authors in (one[2][0], one[2][1], one[2][3]):  # of each process's prompts some are cut
        for first in (0, 3):
            rows = authors[first : first + 3]
            assert {True, False} <= {mine for row in rows for mine in row}
    _same_answers(sampled(ALONE), results[0][8])
    alone = without_memory(ALONE)
    assert results[0][9] == results[1][9] == pytest.approx(alone, rel=1e-4, abs=1e-5)
    rows = results[0][2][0]
    assert rows[0]["policy/updates"] == 0 and len({row["objective/kl_coef"] for row in rows}) > 1
    assert any(0 < row["policy/updates"] < 4 for row in rows), "no step was stopped"
    fit, critic = fitted(ALONE)
    assert fit == pytest.approx(results[0][3][0], rel=1e-3, abs=1e-3) and fit.best_epoch > 0
    for a, b in zip(critic, results[0][3][1], strict=True):
        torch.testing.assert_close(torch.from_numpy(b), a, atol=1e-4, rtol=1e-3)
    for answers, found in ((given_answers(), results[0][0]), (None, results[0][1])):
        metrics, weights = run_steps(ALONE, answers)
        for alone, shared in zip(metrics, found[0], strict=True):
            for name, value in alone.items():
                assert abs(shared[name] - value) <= 1e-4 * abs(value) + 1e-5, name
        for alone, shared in zip(weights, found[1], strict=True):
            torch.testing.assert_close(torch.from_numpy(shared), alone, atol=2e-5, rtol=1e-4)


def _same_answers(alone, shared):
    """Several processes draw what one draws; their figures and weights differ by rounding."""
    assert alone.keys() == shared.keys()
    for name, (answers, metrics, weights) in alone.items():
        assert shared[name][0] == answers, name
        assert len({tuple(row) for row in answers[1]}) > 3, "too few answers to tell them apart"
        for row, other in zip(metrics, shared[name][1], strict=True):
            assert other == pytest.approx(row, rel=1e-4, abs=1e-5), name
        for a, b in zip(weights, shared[name][2], strict=True):
            assert abs(a - b).max() <= 2e-6, name


def test_who_reads_what_does_not_depend_on_what_the_memory_of_one_holds():
    """A process that halves its parts keeps its responses, and so do the others."""
    batch = Batch([[g] * 9 for g in range(3, 8) for _ in range(4)], [[2] * n for n in range(1, 21)],
                  PAD)  # fmt: skip
    shares = []
    for rank, tokens in enumerate((65_536, 20, 33)):
        ppo = new_trainer("shared", CONFIG, 6)
        ppo.world = World(rank, 3)
        shares.append(ppo.share(batch, tokens))
        assert all(tokens_of(batch, part) <= tokens or len(part) == 1 for part in shares[-1])
    assert sorted(i for share in shares for part in share for i in part) == [*range(20)]
