"""Weights of 16 bits: small updates are kept, the guards hold, learning is as in float32."""

import copy
import io
from dataclasses import replace

import pytest
import torch
from _weights import enlarged
from test_ppo import CONFIG, EOS, GROUPS, PAD, PROMPTS, folder, questions, score  # noqa: F401
from transformers import LlamaConfig, LlamaForCausalLM

from tppo.methods.experience import Models
from tppo.methods.guards import check_step_zero
from tppo.methods.optimizer import AdamW
from tppo.methods.ppo import PPO
from tppo.models.batch import Batch
from tppo.models.guards import GuardError
from tppo.models.load import load_policy, load_reward_model
from tppo.models.policy import Critic, RewardModel, policy_logprobs
from tppo.models.precision import relative_rms, rounding_error
from tppo.models.rollout import HFRollout, Sampling
from tppo.rewards import TokenReward
from tppo.rewards.token_model import TokenModelReward

CPU, BF16 = torch.device("cpu"), torch.bfloat16


class LikesToken:
    """Pays 1 for every token 20 of an answer."""

    def __call__(self, batch, answers):
        return TokenReward((batch.targets == 20).float() * batch.mask, None)


def trainer(folder, dtype="bfloat16", config=CONFIG, reward=None, seed=0):  # noqa: F811
    torch.manual_seed(1)
    policy = load_policy(folder, CPU, dtype)
    models = Models(policy, load_policy(folder, CPU, dtype),
                    Critic.from_policy(folder, CPU, dtype))  # fmt: skip
    if reward is None:
        classifier = RewardModel(load_reward_model(folder, CPU, dtype))
        reward = TokenModelReward(classifier, mode=config.reward, values=config.reward_values,
                                  length_alpha=config.length_alpha)  # fmt: skip
    rollout = HFRollout(policy, pad_id=PAD, eos_id=EOS)
    return PPO(models, rollout, config, reward=reward, sampling=Sampling(8), pad_id=PAD,
               eos_id=EOS, seed=seed)  # fmt: skip


def adam(optimizer, parameters, steps, gradient):
    for step in range(steps):
        for parameter in parameters:
            parameter.grad = gradient(step).to(parameter.dtype)
        optimizer.step()
        optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in parameters)


def test_in_float32_it_is_torchs():
    start = torch.randn(50)
    found, expected = start.clone().requires_grad_(), start.clone().requires_grad_()
    for parameter, kind in ((found, AdamW), (expected, torch.optim.AdamW)):
        torch.manual_seed(0)
        adam(kind([parameter], lr=1e-2, weight_decay=0.1), [parameter], 20,
             lambda step: torch.randn(50))  # fmt: skip
    assert torch.equal(found, expected) and not torch.equal(found, start)


def test_in_16_bits_it_is_torchs_of_float32_rounded():
    torch.manual_seed(0)
    start = torch.randn(50).to(BF16)
    gradients = [torch.randn(50).to(BF16).float() for _ in range(40)]
    half, single = start.clone().requires_grad_(), start.float().requires_grad_()
    adam(AdamW([half], lr=1e-3, weight_decay=0.1), [half], 40, gradients.__getitem__)
    plain = torch.optim.AdamW([single], lr=1e-3, weight_decay=0.1)
    adam(plain, [single], 40, gradients.__getitem__)
    assert half.dtype == BF16
    # A float32 weight beside a rounding boundary may fall on either side of it.
    assert (half != single.to(BF16)).sum() <= 1
    assert (half != start).sum() > 25


def test_updates_of_1e5_of_a_weight_add_up():
    """100 of them are 1e-3; bfloat16 alone has nothing between 1 and .996, and loses every one."""
    kept, lost = (torch.ones(8, dtype=BF16, requires_grad=True) for _ in range(2))
    own, plain = AdamW([kept], lr=1e-5), torch.optim.AdamW([lost], lr=1e-5, weight_decay=0.0)
    for parameter, optimizer in ((kept, own), (lost, plain)):
        adam(optimizer, [parameter], 100, lambda step: torch.ones(8))
    (weight,) = own.state_dict()["weights"]
    torch.testing.assert_close(weight, torch.full((8,), 1 - 1e-3), rtol=0, atol=2e-6)
    for parameter, optimizer in ((kept, own), (lost, plain)):
        adam(optimizer, [parameter], 300, lambda step: torch.ones(8))
    assert (lost == 1).all()
    assert (kept == torch.tensor(1 - 4e-3).to(BF16)).all()


def test_a_state_that_is_saved_goes_on_to_the_same_bits():
    torch.manual_seed(0)
    gradients = [torch.randn(30) for _ in range(20)]

    def begun(steps):
        torch.manual_seed(1)
        parameters = [torch.randn(30).to(BF16), torch.randn(30)]
        rates = zip(parameters, (1e-3, 1e-4), strict=True)
        optimizer = AdamW([{"params": [p], "lr": lr} for p, lr in rates], lr=1e-3)
        adam(optimizer, parameters, steps, gradients.__getitem__)
        return parameters, optimizer

    whole, _ = begun(20)
    half, optimizer = begun(10)
    kept = io.BytesIO()
    torch.save(optimizer.state_dict(), kept)
    kept.seek(0)
    again, other = begun(0)
    for parameter, saved in zip(again, half, strict=True):
        parameter.copy_(saved)
    other.load_state_dict(torch.load(kept, weights_only=True))
    adam(other, again, 10, lambda step: gradients[10 + step])
    assert all(torch.equal(a, b) for a, b in zip(again, whole, strict=True))
    with pytest.raises(ValueError, match="has 1 weights .* expected 0; .*--model.dtype"):
        AdamW([torch.zeros(30)], lr=1.0).load_state_dict(optimizer.state_dict())


def test_a_step_in_16_bits_passes_its_guards(folder):  # noqa: F811
    """With shared and dense prefixes compared first; scored in one batch, trained in halves."""
    ppo = trainer(folder, config=replace(CONFIG, verify_prefix=True))
    critic = ppo.models.critic
    assert {p.dtype for p in critic.trunk.parameters()} == {BF16}
    assert critic.head.weight.dtype == torch.float32  # values are sums of many small steps
    before = copy.deepcopy(ppo.models.policy.state_dict())
    metrics, _ = ppo.step(questions(GROUPS))
    assert metrics["val/ratio"] == pytest.approx(1, abs=0.1)
    after = ppo.models.policy.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert {tensor.dtype for tensor in after.values()} == {BF16}


def experience_of(ppo):
    rollout = ppo.rollout.generate(PROMPTS, ppo.sampling)
    return score(ppo, rollout)[0]


def loss_logprobs(ppo, part, temperature=1.0):
    return policy_logprobs(ppo.models.policy, part.batch, temperature)[0].detach()


def test_the_guard_of_16_bits_sees_what_that_of_float32_sees(folder):  # noqa: F811
    ppo = trainer(folder)
    policy, whole = ppo.models.policy, experience_of(ppo)
    part = whole.rows(range(3, 9))
    check_step_zero(policy, part, loss_logprobs(ppo, part), 1.0)
    with pytest.raises(GuardError, match=r"max\|ratio - 1\|"):  # of the loss alone
        check_step_zero(policy, part, loss_logprobs(ppo, part, 0.999), 1.0)
    wrong = {
        "scored at another temperature": loss_logprobs(ppo, part, 0.9),
        "answers in another order": part.logprobs.roll(1, 0),
        "not finite": part.logprobs * float("nan"),
    }
    for name, old in wrong.items():
        with pytest.raises(GuardError, match="of the update differ from those of scoring"):
            check_step_zero(policy, part._replace(logprobs=old), loss_logprobs(ppo, part), 1.0)
            raise AssertionError(name)


def test_dropout_in_16_bits_stops_before_the_first_update(folder):  # noqa: F811
    ppo = trainer(folder)
    ppo.prefix = ppo.rollout.prefix = "dense"
    ppo.models.policy.train()
    with pytest.raises(GuardError, match="step 0: "):
        ppo.step(questions(PROMPTS))


def of_depth(layers, std):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=300, num_hidden_layers=layers, max_position_embeddings=64,
                         **sizes)  # fmt: skip
    model = enlarged(LlamaForCausalLM(config), std).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(BF16)
    return model


@pytest.mark.parametrize(("layers", "std"), [(2, 0.3), (8, 0.1), (8, 0.3), (24, 0.1)])
def test_the_bound_of_roundings_holds_and_is_no_mile_wide(layers, std):
    """Readings of one shape are equal to the bit; of two shapes within the bound, not far below.

    The control: log-probs at half the temperature, and those of another answer, are beyond it.
    """
    model, generator = of_depth(layers, std), torch.Generator().manual_seed(0)
    ids = torch.randint(3, 300, (24, 24), generator=generator).tolist()
    prompts = [row[: 6 + i // 2 % 6] for i, row in enumerate(ids) for _ in range(2)]
    answers = [row[12 : 16 + i % 8] for i, row in enumerate(ids + ids)]
    batch = Batch(prompts, answers, 0)
    with torch.no_grad():
        found, again = (policy_logprobs(model, batch, 1.0)[0] for _ in range(2))
        dense, _ = policy_logprobs(model, batch.dense(), 1.0)
        hot, _ = policy_logprobs(model, batch, 0.5)
    assert torch.equal(found, again)
    error, limit = relative_rms(dense[batch.mask], found[batch.mask]), rounding_error(model)
    assert limit / 100 < error < limit
    for other in (hot, found.roll(1, 0)):
        assert relative_rms(other[batch.mask], found[batch.mask]) > 1.5 * limit


def test_ppo_in_16_bits_learns_as_in_float32(folder):  # noqa: F811
    """A token that is liked is written; seeds spread the end, and the type is one of them."""
    config = replace(CONFIG, lr=5e-3, length_alpha=None)
    ends = {}
    for dtype in ("float32", "bfloat16"):
        for seed in range(3):
            ppo = trainer(folder, dtype, config, LikesToken(), seed)
            scores = [ppo.step(questions(GROUPS))[0]["objective/scores"] for _ in range(6)]
            ends[dtype, seed] = sum(scores[-2:]) / 2
            assert ends[dtype, seed] > scores[0] + 0.5
    single, half = ([ends[d, seed] for seed in range(3)] for d in ("float32", "bfloat16"))
    spread = max(single) - min(single)
    assert abs(sum(half) - sum(single)) / 3 < spread, ends
