"""DPO, the token reward it stands for, and best of n."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from test_sentence_model import paired
from test_shared_prefix import CPU, EOS, PAD, models, questions

from tppo.methods.best_of_n import best_of_n, kl_bound
from tppo.methods.config import PPOConfig, RewardModelConfig
from tppo.methods.dpo import preferences, train_dpo
from tppo.methods.ppo import PPO
from tppo.methods.sentence_model import SentenceReader, pair_loss, train_sentence_model
from tppo.models.adapters import add_adapter, shared_copy
from tppo.models.batch import Batch
from tppo.models.config import AdapterConfig
from tppo.models.guards import trainable
from tppo.models.rollout import HFRollout, Sampling
from tppo.rewards import TokenReward
from tppo.rewards.implicit import ImplicitReward, ImplicitScore
from tppo.rewards.sentence_model import SentenceModel

CONFIG = RewardModelConfig(epochs=4, batch_size=16, lr=3e-3)


def logprobs(model, prompt, response):
    """Of each response token, from the model's own logits, in double precision."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0].double()
    every = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return every.gather(-1, torch.tensor(response)[:, None])[:, 0].tolist()


def two_policies():
    return models(seed=0)[0].policy, models(seed=5)[0].policy


def test_scores_loss_and_token_rewards_are_the_formulas():
    policy, ref = two_policies()
    pairs = paired(5, 3)
    reader = SentenceReader(ImplicitScore(policy, ref, beta=0.3), PAD)
    slow, totals = 0.0, []
    for pair in pairs:
        sides = [
            [0.3 * (a - b) for a, b in zip(logprobs(policy, pair.prompt_ids, ids),
                                           logprobs(ref, pair.prompt_ids, ids), strict=True)]
            for ids in (pair.chosen_ids, pair.rejected_ids)
        ]  # fmt: skip
        totals += sides
        slow += math.log(1 + math.exp(sum(sides[1]) - sum(sides[0]))) / len(pairs)
    scores = reader.scores(pairs)
    assert scores.tolist() == pytest.approx([sum(side) for side in totals], abs=1e-4)
    loss = reader.backward(reader.batch(pairs), pair_loss)
    assert loss.item() == pytest.approx(slow, abs=1e-4)
    assert not any(p.requires_grad for p in ref.parameters())
    batch = reader.batch(pairs)
    for max_tokens in (65_536, 20):
        paid = ImplicitReward(reader.model, max_tokens=max_tokens)(batch, None).rewards
        for row, side in zip(paid.tolist(), totals, strict=True):
            assert row[: len(side)] == pytest.approx(side, abs=1e-4)
            assert not any(row[len(side) :])
    names = {name.split(".")[0] for name in reader.model.state_dict()}
    assert names == {"policy"}, "the reference is none of the weights that are kept"


def test_the_gradient_at_the_reference_is_half_of_that_of_the_margin():
    """Where policy = ref, d loss = -beta / 2 d mean(log policy(chosen) - log policy(rejected))."""
    policy = two_policies()[0]
    pairs, beta = paired(4, 1), 0.2
    reader = SentenceReader(ImplicitScore(policy, copy.deepcopy(policy), beta), PAD)
    assert reader.backward(reader.batch(pairs), pair_loss).item() == pytest.approx(math.log(2))
    found = policy.model.embed_tokens.weight.grad.clone()
    policy.zero_grad()
    margin = 0.0
    for pair in pairs:
        for sign, ids in ((1, pair.chosen_ids), (-1, pair.rejected_ids)):
            logits = policy(torch.tensor([[*pair.prompt_ids, *ids]])).logits[0]
            every = logits[len(pair.prompt_ids) - 1 : -1].log_softmax(-1)
            margin += sign * every.gather(-1, torch.tensor(ids)[:, None]).sum() / len(pairs)
    (-beta / 2 * margin).backward()
    torch.testing.assert_close(found, policy.model.embed_tokens.weight.grad, atol=1e-5, rtol=1e-3)


def test_dpo_learns_what_is_better_and_its_reward_teaches_ppo():
    policy = two_policies()[0]
    ref = copy.deepcopy(policy)
    before = [p.clone() for p in ref.parameters()]
    train, held = paired(96, 1), paired(32, 2)
    history = train_dpo(policy, ref, train, held, CONFIG, pad_id=PAD, seed=0, beta=0.5)
    assert history[0] == {"epoch": 0, "heldout_loss": pytest.approx(math.log(2), abs=1e-5)}
    assert min(row["heldout_loss"] for row in history) < 0.2
    assert all((a == b).all() for a, b in zip(before, ref.parameters(), strict=True))
    score = ImplicitScore(policy, ref, 0.5)
    scores = SentenceReader(score, PAD).scores(paired(64, 9))
    assert (scores[::2] > scores[1::2]).float().mean() > 0.9
    used = models(seed=0)[0]
    config = PPOConfig(lr=1e-3, critic_lr=1e-3, minibatch_size=32, kl_coef=0.0, length_alpha=None)
    engine = HFRollout(used.policy, pad_id=PAD, eos_id=EOS)
    ppo = PPO(used, engine, config, reward=ImplicitReward(score), sampling=Sampling(6), pad_id=PAD,
              eos_id=EOS, seed=0)  # fmt: skip
    asked = questions([[5, 6, n] for n in (9, 10, 11) for _ in range(16)])
    paid = [ppo.step(asked)[0]["objective/scores"] for _ in range(6)]
    assert sum(paid[-2:]) > sum(paid[:2]) + 0.5, paid
    assert not any(p.requires_grad for p in policy.parameters())  # frozen as a reward


def test_adapters_over_one_base_are_trained_alone():
    """Of DPO's policy and of a sentence model: the reference is the base, which stays as it is."""
    ref, lora = two_policies()[0], AdapterConfig(rank=4)
    before = [p.clone() for p in ref.parameters()]
    policy = add_adapter(shared_copy(ref), lora, seed=1)
    trunk = add_adapter(shared_copy(ref.base_model), lora, seed=2)
    settings = replace(CONFIG, lr=2e-2, epochs=3)
    history = train_dpo(policy, ref, paired(96, 1), [], settings, pad_id=PAD, seed=0, beta=0.5)
    assert history[-1]["loss"] < history[0]["loss"] < math.log(2)
    reader = SentenceReader(SentenceModel(trunk, 16, "mean"), PAD)
    history = train_sentence_model(reader, paired(96, 1), paired(32, 2), settings, seed=0)
    assert min(row["heldout_loss"] for row in history) < 0.8 * history[0]["heldout_loss"]
    assert all((a == b).all() for a, b in zip(before, ref.parameters(), strict=True))
    trained = sum(p.numel() for p in trainable(reader.model))
    assert trained < 0.6 * sum(p.numel() for p in ref.parameters())


def test_pairs_that_are_alike_are_left_out():
    pairs = preferences([[5], [6]], [(7, EOS), [8, EOS]], [[7, EOS], [9, EOS]])
    assert pairs == [([6], [8, EOS], [9, EOS])]


class Length:
    """Pays .5 a token, and at the first token one that a prompt decides."""

    def __call__(self, batch, answers):
        assert len(answers.response_ids) == len(batch.mask)
        rewards = 0.5 * batch.mask
        rewards[:, 0] += torch.tensor([float(p[-1]) for p in batch.prompt_ids])
        return TokenReward(rewards)


def test_the_best_of_n_is_the_one_that_is_paid_most():
    policy = two_policies()[0]
    rollout = HFRollout(policy, pad_id=PAD, eos_id=EOS)
    asked = questions([[5, 6, 9], [5, 6, 10], [8, 3]])
    how = Sampling(6, seed=4)
    settings = {"tokenizer": None, "pad_id": PAD, "eos_ids": [EOS], "device": CPU}
    found = best_of_n(rollout, Length(), asked, 8, how, **settings)
    again = rollout.generate([prompt for prompt in asked.ids for _ in range(8)], how)
    for k, prompt in enumerate(asked.ids):
        samples = again.response_ids[8 * k : 8 * k + 8]
        assert found.totals[k] == [prompt[-1] + 0.5 * len(ids) for ids in samples]
        longest = max(map(len, samples))
        assert len({*map(len, samples)}) > 1
        assert found.answers.response_ids[k] == next(x for x in samples if len(x) == longest)
    assert found.answers.groups == [0, 1, 2]
    one = best_of_n(rollout, Length(), asked, 1, how, **settings)
    assert one.answers.response_ids == rollout.generate(asked.ids, how).response_ids
    assert kl_bound(1) == 0 and kl_bound(4) == pytest.approx(math.log(4) - 0.75)
    with pytest.raises(ValueError, match="n was 0, expected at least 1"):
        best_of_n(rollout, Length(), asked, 0, how, **settings)
    with pytest.raises(ValueError, match="paid inf for sample 0 of question 0"):
        best_of_n(rollout, lambda batch, _: TokenReward(batch.mask / 0.0), asked, 2, how,
                  **settings)  # fmt: skip


def test_the_kl_of_best_of_n_is_its_bound_where_no_rewards_are_equal():
    """The best of n draws from equal chances, ranked: P(rank k) = (k^n - (k - 1)^n) / m^n."""
    m, n = 4000, 5
    chances = [(k**n - (k - 1) ** n) / m**n for k in range(1, m + 1)]
    kl = sum(p * math.log(p * m) for p in chances)
    assert kl == pytest.approx(kl_bound(n), abs=1e-3)


def test_a_batch_reads_a_prompt_once_for_both_answers():
    reader = SentenceReader(ImplicitScore(*two_policies()), PAD)
    batch = reader.batch(paired(3, 1))
    assert batch.shares and isinstance(batch, Batch) and len(batch.response_ids) == 6
