"""Forced beginnings of responses: what is sampled behind them, and that none is learnt from."""

from dataclasses import replace

import pytest
import torch
from test_advantages import FOUR, Likes, trainer
from test_ppo import GROUPS, folder  # noqa: F401
from test_reading import FAMILIES, models

from tppo.models.rollout import HFRollout, RolloutBatch, Sampling
from tppo.rewards import Questions

PAD, EOS, NAN = 0, 1, float("nan")
PROMPTS = [[5, 6, 7, 12]] * 3 + [[8, 9]] * 2 + [[10, 3, 3]]
SAMPLING = Sampling(8, seed=3)


def engine(used, prefix="shared", eos_id=EOS, **settings):
    return HFRollout(used.policy, pad_id=PAD, eos_id=eos_id, prefix=prefix, **settings)


@pytest.mark.parametrize("way", ["dense", "shared"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_behind_a_prefix_is_what_the_model_writes_there(family, way):
    """The likeliest answer, its first tokens forced, as many as there are or none of them."""
    used, greedy = models(family), Sampling(8, temperature=1e-4)
    whole = engine(used, way, eos_id=[]).generate(PROMPTS, greedy)
    assert whole.author is None and len({tuple(row) for row in whole.response_ids}) == 3
    lengths = [0, 3, 3, 1, 8, 5]
    prefixes = [row[:n] for row, n in zip(whole.response_ids, lengths, strict=True)]
    forced = engine(used, way, eos_id=[]).generate(PROMPTS, greedy, prefixes)
    assert forced.response_ids == whole.response_ids and forced.finish == whole.finish
    assert forced.author == [[False] * n + [True] * (8 - n) for n in lengths]
    prefixes[1] = [whole.response_ids[1][0] + 1, *prefixes[1][1:]]  # the model did not write it
    other = engine(used, way, eos_id=[]).generate(PROMPTS, greedy, prefixes)
    assert other.response_ids[1][:3] == prefixes[1]
    alone = engine(used, way, eos_id=[]).generate([PROMPTS[1] + prefixes[1]], Sampling(5, 1e-4))
    assert other.response_ids[1][3:] == alone.response_ids[0]
    assert other.response_ids[2:] == whole.response_ids[2:]


@pytest.mark.parametrize("batch_size", [2, 256])
def test_without_a_prefix_every_draw_is_as_before(batch_size):
    rollout = engine(models("llama"), batch_size=batch_size)
    plain = rollout.generate(PROMPTS, SAMPLING)
    empty = rollout.generate(PROMPTS, SAMPLING, [[] for _ in PROMPTS])
    assert empty._replace(author=None) == plain
    assert empty.author == [[True] * len(row) for row in plain.response_ids]


def test_an_eos_ends_the_answer_wherever_it_comes_from():
    """In a prefix nothing is written behind it; the cap counts the prefix."""
    rollout = engine(models("llama"), eos_id=[EOS, 9])
    prefixes = [[4, EOS], [9], [], [6] * 8, [6] * 7, [3, 4]]
    for seed in range(8):
        found = rollout.generate(PROMPTS, Sampling(8, seed=seed), prefixes)
        assert found.response_ids[0] == [4, EOS] and found.response_ids[1] == [9]
        assert found.author[:2] == [[False] * 2, [False]]
        assert found.response_ids[3] == [6] * 8 and found.finish[3] == "length"
        for row, author, finish, prefix in zip(
            found.response_ids, found.author, found.finish, prefixes, strict=True
        ):
            assert row[: len(prefix)] == prefix and len(row) <= 8
            assert author == [t >= len(prefix) for t in range(len(row))]
            assert not {EOS, 9} & set(row[:-1])
            assert finish == ("eos" if row[-1] in (EOS, 9) else "length")
            assert finish == "eos" or len(row) == 8
    done = rollout.generate(PROMPTS[:2], SAMPLING, prefixes[:2])  # nothing left to sample
    assert done.response_ids == prefixes[:2] and done.finish == ["eos", "eos"]


@pytest.mark.parametrize(
    ("prefixes", "said"),
    [
        ([[4], [4]], "prefixes had 2 rows, expected one a prompt, 6"),
        ([[4]] * 5 + [[4] * 9], "prefix of row 5 had 9 tokens, expected at most max_new_tokens, 8"),
        ([[]] * 4 + [[4, EOS, 5], []], r"prefix of row 4 had an EOS \(1\) at token 1 of 3"),
    ],
)
def test_a_prefix_that_cannot_be_is_refused(prefixes, said):
    with pytest.raises(ValueError, match=said):
        engine(models("llama")).generate(PROMPTS, SAMPLING, prefixes)


# Learning -----------------------------------------------------------------------------------------
FORCED = [[20, 8], [], [4], [20] * 8, [7, EOS], [11, 12, 13], [20], []] * 2


def forced_rollout(ppo):
    ppo.step_count = 1
    return ppo.sample(GROUPS, FORCED)


def scored(ppo, rollout):
    return ppo.score(rollout, ppo.answers(Questions(GROUPS), rollout))


def weights(ppo):
    return [p.detach().clone() for model in ppo.models.trained.values() for p in model.parameters()]


def poisoned(data, value):
    """The experience with `value` wherever the masks say that nothing is looked at."""

    def outside(mask, *names):
        return {name: getattr(data, name).masked_fill(~mask, value)
                for name in names if getattr(data, name) is not None}  # fmt: skip

    return data._replace(
        **outside(data.masks.policy, "logprobs", "advantages"),
        **outside(data.masks.critic, "values", "returns"),
    )


@pytest.mark.parametrize("name", ["gae", "grpo"])
def test_no_gradient_comes_from_a_forced_token(folder, name):  # noqa: F811
    """NaN at every figure of a forced token changes no weight; at one other token it stops."""
    config = replace(FOUR, advantage=name, value_clip=0.2)
    results = []
    for value in (None, NAN):
        ppo = trainer(folder, config)
        data, _ = scored(ppo, forced_rollout(ppo))
        before = weights(ppo)
        ppo.step_count = 2
        metrics = ppo.update(data if value is None else poisoned(data, value))
        moved = [not torch.equal(a, b) for a, b in zip(before, weights(ppo), strict=True)]
        assert any(moved)
        results.append((weights(ppo), metrics))
    (clean, figures), (spoilt, others) = results
    assert all(torch.equal(a, b) for a, b in zip(clean, spoilt, strict=True)) and figures == others
    ppo = trainer(folder, config)
    data, _ = scored(ppo, forced_rollout(ppo))
    b, t = data.masks.policy.nonzero()[0].tolist()
    data.advantages[b, t] = NAN
    with pytest.raises(RuntimeError, match="not finite|is nan"):
        ppo.update(data)


def test_masks_say_what_a_forced_token_is_used_for(folder):  # noqa: F811
    """It is a step of the MDP, pays no KL, and trains neither policy nor critic."""
    ppo = trainer(folder, FOUR)
    rollout = forced_rollout(ppo)
    assert [row[: len(p)] for row, p in zip(rollout.response_ids, FORCED, strict=True)] == FORCED
    data, metrics = scored(ppo, rollout)
    own = torch.zeros_like(data.batch.mask)
    for b, row in enumerate(rollout.author):
        own[b, : len(row)] = torch.tensor(row)
    assert own.any() and not own.all(1).all()
    assert torch.equal(data.masks.action, data.batch.mask)
    for mask in (data.masks.policy, data.masks.critic, data.masks.kl):
        assert torch.equal(mask, own)
    assert data.advantages[~own].abs().max() == 0 and data.advantages[own].any()
    entropy = -(data.logprobs * own).sum(1).mean().item()
    assert metrics["objective/entropy"] == pytest.approx(entropy, rel=1e-5)
    assert data.rewards[3].tolist() == [0.5] * 8  # it is paid
    with pytest.raises(ValueError, match="author had rows of .*expected one entry a response"):
        scored(ppo, rollout._replace(author=[[True]] * 16))


def test_a_forced_token_is_not_trained_though_its_class_would_be(folder):  # noqa: F811
    ppo = trainer(folder, replace(FOUR, train_on_unlabelled=False))
    rollout = RolloutBatch([[5]], [[8, 9, 20, EOS]], None, ["eos"], [[False, False, True, True]])
    experience, _ = ppo.score(rollout, ppo.answers(Questions([[5]]), rollout))
    category = torch.tensor([[2, 0, 0, 0]])
    masks = ppo.masks(experience.batch, category, rollout.author)
    assert masks.policy.tolist() == [[False, False, False, True]]
    assert masks.critic.tolist() == masks.kl.tolist() == [[False, False, True, True]]


def test_the_learner_improves_behind_a_prefix(folder):  # noqa: F811
    """And the reward of its own tokens rises, while the forced ones stay what they are."""
    ppo = trainer(folder, FOUR, Likes())
    prefixes, scores = [[4, 5]] * 16, []
    for step in range(8):
        ppo.step_count = step + 1
        rollout = ppo.sample(GROUPS, prefixes)
        assert all(row[:2] == [4, 5] for row in rollout.response_ids)
        data, metrics = scored(ppo, rollout)
        scores.append(metrics["objective/scores"])
        ppo.update(data)
    assert sum(scores[-2:]) / 2 > scores[0] + 0.5, scores
