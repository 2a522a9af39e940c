"""Token-level PPO: the guards, the masks, the bootstrap, and that it raises its reward."""

from dataclasses import replace

import pytest
import torch
from _weights import enlarged
from transformers import LlamaConfig, LlamaForCausalLM

from tppo.methods.config import PPOConfig
from tppo.methods.experience import Models
from tppo.methods.guards import check_step_zero_ratio
from tppo.methods.ppo import PPO
from tppo.methods.reward_model import GuardError
from tppo.models.batch import Batch, pad_rows
from tppo.models.load import load_policy, load_reward_model
from tppo.models.policy import Critic, RewardModel, policy_logprobs
from tppo.models.rollout import HFRollout, RolloutBatch, Sampling
from tppo.rewards import Questions
from tppo.rewards.token_model import TokenModelReward

PAD, EOS = 0, 1
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [5, 5]] * 4
GROUPS = sorted(PROMPTS)  # four responses of each prompt
CONFIG = PPOConfig(lr=1e-2, critic_lr=1e-2, batch_size=16, minibatch_size=8, kl_coef=0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, attention_dropout=0.5,
        pad_token_id=PAD, eos_token_id=EOS, bos_token_id=2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model") / "sft"
    enlarged(LlamaForCausalLM(config)).save_pretrained(path)
    return path


def trainer(folder, config=CONFIG, seed=0, prefix="shared", eos_id=EOS):
    cpu = torch.device("cpu")
    torch.manual_seed(1)
    policy = load_policy(folder, cpu)
    reward = TokenModelReward(
        RewardModel(load_reward_model(folder, cpu)), mode=config.reward,
        values=config.reward_values, length_alpha=config.length_alpha,
    )  # fmt: skip
    models = Models(policy, load_policy(folder, cpu), Critic.from_policy(folder, cpu))
    rollout = HFRollout(policy, pad_id=PAD, eos_id=eos_id, prefix=prefix)
    return PPO(
        models, rollout, config, reward=reward, sampling=Sampling(8), pad_id=PAD, eos_id=eos_id,
        seed=seed, prefix=prefix,
    )  # fmt: skip


def questions(prompts, length=6.0):
    """Prompts by their ids, with the suggested length of an answer."""
    return Questions(prompts, columns={"suggested_length": [length] * len(prompts)})


def score(ppo, rollout, length=6.0):
    """A rollout scored as `step` does it."""
    return ppo.score(rollout, ppo.answers(questions(rollout.prompt_ids, length), rollout))


def parts(ppo):
    """Every model of PPO by name, the reward's included."""
    return {**ppo.models._asdict(), "reward": ppo.reward}


def test_batches_put_every_response_in_one_column():
    batch = Batch([[5, 6], [7]], [[8], [9, 1]], PAD)
    assert batch.mask.tolist() == [[True, False], [True, True]]
    assert batch.targets.tolist() == [[8, 0], [9, 1]]
    padded = batch.padded
    assert padded.input_ids.tolist() == [[5, 6, 8, 0], [0, 7, 9, 1]]
    assert padded.attention_mask.tolist() == [[1, 1, 1, 0], [0, 1, 1, 1]]
    assert padded.position_ids.tolist() == [[0, 1, 2, 2], [0, 0, 1, 2]]
    assert padded.prompt_length == 2
    assert pad_rows([[1], [2, 3]], batch.targets).tolist() == [[1, 0], [2, 3]]


def test_a_mask_comes_from_lengths_not_from_the_pad_id():
    """trl#5303: pad == eos must not drop the EOS of an answer."""
    batch = Batch([[5], [5]], [[8, EOS], [EOS]], EOS)
    assert batch.mask.tolist() == [[True, True], [True, False]]


def test_logprobs_are_those_of_each_sequence_alone(folder):
    policy = load_policy(folder, torch.device("cpu"))
    prompts, responses = [[5, 6, 7], [8]], [[9, EOS], [10, 11, 12, EOS]]
    batch = Batch(prompts, responses, PAD)
    logprobs, entropy = policy_logprobs(policy, batch, 0.7)
    for b, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        logits = policy(torch.tensor([prompt + response])).logits[0].double() / 0.7
        every = logits[len(prompt) - 1 : -1].log_softmax(-1)
        wanted = every.gather(-1, torch.tensor(response)[:, None])[:, 0]
        n = len(response)
        torch.testing.assert_close(logprobs[b, :n].double(), wanted, atol=2e-5, rtol=0)
        torch.testing.assert_close(
            entropy[b, :n].double(), -(every.exp() * every).sum(-1), atol=2e-5, rtol=0
        )
        assert not logprobs[b, n:].any()


def test_sampling_is_a_function_of_its_seed_alone(folder):
    rollout = HFRollout(
        load_policy(folder, torch.device("cpu")), pad_id=PAD, eos_id=EOS, batch_size=5
    )
    state = torch.random.get_rng_state()
    one = rollout.generate(PROMPTS, Sampling(8, seed=3))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(5)
    assert rollout.generate(PROMPTS, Sampling(8, seed=3)) == one
    assert rollout.generate(PROMPTS, Sampling(8, seed=4)) != one
    assert one.prompt_ids == PROMPTS
    for ids, reason in zip(one.response_ids, one.finish, strict=True):
        assert (ids[-1] == EOS) == (reason == "eos") and EOS not in ids[:-1]
        assert len(ids) == 8 if reason == "length" else len(ids) <= 8


def test_a_step_moves_policy_and_critic_only(folder):
    ppo = trainer(folder)
    before = {
        name: [p.clone() for p in model.parameters()]
        for name, model in parts(ppo).items()
    }
    metrics, rollout = ppo.step(questions(PROMPTS))
    moved = {
        name: any(
            not torch.equal(a, b) for a, b in zip(before[name], model.parameters(), strict=True)
        )
        for name, model in parts(ppo).items()
    }
    assert moved == {"policy": True, "ref": False, "critic": True, "reward": False}
    assert metrics["objective/kl"] == pytest.approx(0, abs=1e-4) and metrics["episode"] == 16
    for name in (
        "objective/entropy", "objective/non_score_reward", "objective/rlhf_reward",
        "objective/scores", "policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg",
        "loss/policy_avg", "loss/value_avg", "val/clipfrac_avg", "val/ratio", "val/ratio_var",
        "val/num_eos_tokens", "lr",
    ):  # fmt: skip
        assert isinstance(metrics[name], float), name
    assert metrics["val/num_eos_tokens"] == rollout.finish.count("eos")


def test_ppo_raises_the_reward_of_a_hand_made_reward_model(folder):
    """The head of the reward model is set so that one token is relevant, all others are not."""
    ppo = trainer(folder, replace(CONFIG, reward="argmax", length_alpha=None,
                                  bootstrap_truncated=False))  # fmt: skip
    reward = ppo.reward.model.model
    with torch.no_grad():
        reward.base_model.embed_tokens.weight.zero_()
        reward.base_model.embed_tokens.weight[:, 0] = -1.0
        reward.base_model.embed_tokens.weight[20, 0] = 1.0
        for layer in reward.base_model.layers:
            for parameter in (*layer.self_attn.parameters(), *layer.mlp.parameters()):
                parameter.zero_()
        reward.score.weight.zero_()
        reward.score.weight[1, 0], reward.score.weight[2, 0] = -1.0, 1.0
    scores = []
    for _ in range(8):
        metrics, rollout = ppo.step(questions(PROMPTS))
        scores.append(metrics["objective/scores"])
        hits = sum(ids.count(20) for ids in rollout.response_ids)
        total = sum(map(len, rollout.response_ids))
        assert metrics["objective/scores"] * 16 == pytest.approx(hits - 0.5 * total, abs=1e-3)
    assert sum(scores[-2:]) / 2 > scores[0] + 0.5


def test_dropout_stops_before_the_first_update(folder):
    ppo = trainer(folder, prefix="dense")
    ppo.models.policy.train()
    with pytest.raises(GuardError, match=r"max\|ratio - 1\|"):
        ppo.step(questions(PROMPTS))
    ppo = trainer(folder)
    ppo.models.policy.train()
    with pytest.raises(ValueError, match="dropout is 0.5"):  # it cannot be shared at all
        ppo.step(questions(GROUPS))


def test_the_step_zero_guard_sees_a_second_temperature(folder):
    ppo = trainer(folder)
    rollout = ppo.rollout.generate(PROMPTS, ppo.sampling)
    experience, _ = score(ppo, rollout)
    other, _ = policy_logprobs(ppo.models.policy, experience.batch, 0.9)
    mask = experience.batch.mask
    check_step_zero_ratio(experience.logprobs, experience.logprobs, mask)
    with pytest.raises(GuardError):
        check_step_zero_ratio(other, experience.logprobs, mask)
    with pytest.raises(GuardError):
        check_step_zero_ratio(other * float("nan"), experience.logprobs, mask)


def test_a_frozen_policy_stops_before_the_first_update(folder):
    ppo = trainer(folder)
    for parameter in ppo.models.policy.parameters():
        parameter.register_hook(torch.zeros_like)
    with pytest.raises(GuardError, match="policy is zero"):
        ppo.step(questions(PROMPTS))


def test_a_reward_model_that_rates_all_alike_only_warns(folder, capsys):
    ppo = trainer(folder, replace(CONFIG, reward_values=(0.0, 0.0, 0.0)))
    ppo.step(questions(PROMPTS))
    assert "rates all tokens alike" in capsys.readouterr().err


def test_the_literal_train_mask_leaves_out_class_0_but_not_eos(folder):
    batch = Batch([[5], [5]], [[8, 9, EOS], [10, 11]], PAD)
    category = torch.tensor([[0, 2, 0], [1, 0, 0]])
    literal = trainer(folder, replace(CONFIG, train_on_unlabelled=False))
    assert literal.masks(batch, category).policy.tolist() == [
        [False, True, True],
        [True, False, False],
    ]
    assert all(torch.equal(m, batch.mask) for m in trainer(folder).masks(batch, category))
    several = trainer(folder, replace(CONFIG, train_on_unlabelled=False), eos_id=[EOS, 9])
    assert several.masks(batch, category).policy.tolist() == [
        [False, True, True],
        [True, False, False],
    ]
    category[0, 1] = 0
    assert several.masks(batch, category).policy[0].tolist() == [False, True, True]
    metrics, _ = literal.step(questions(PROMPTS))
    assert torch.isfinite(torch.tensor(list(metrics.values()))).all()


def test_only_cut_answers_bootstrap_and_only_without_the_length_penalty(folder):
    after = torch.tensor([2.0, 3.0])
    finish = ["eos", "length"]
    cases = [
        (CONFIG, [0.0, 0.0]),
        (replace(CONFIG, length_alpha=None), [0.0, 3.0]),
        (replace(CONFIG, bootstrap_truncated=True), [0.0, 3.0]),
        (replace(CONFIG, length_alpha=None, bootstrap_truncated=False), [0.0, 0.0]),
    ]
    for config, wanted in cases:
        assert trainer(folder, config).bootstrap(finish, after).tolist() == wanted


def test_values_of_cut_answers_come_from_their_last_token(folder):
    critic = Critic.from_policy(folder, torch.device("cpu"))
    torch.nn.init.normal_(critic.head.weight)
    batch = Batch([[5, 6], [7]], [[8, 9, 10], [11]], PAD)
    values, after = critic(batch)
    states = critic.trunk(torch.tensor([[5, 6, 8, 9, 10]])).last_hidden_state[0]
    alone = critic.head(states)[:, 0]
    torch.testing.assert_close(values[0], alone[1:4])
    torch.testing.assert_close(after[0], alone[4])
    states = critic.trunk(torch.tensor([[7, 11]])).last_hidden_state[0]
    torch.testing.assert_close(after[1], critic.head(states)[1, 0])
    assert values[1, 1:].tolist() == [0.0, 0.0]


def test_the_length_penalty_takes_rewards_past_the_suggested_length(folder):
    ppo = trainer(folder)
    rollout = RolloutBatch([[5]], [[8, 9, 10, 11, 12, 13, 14, 15]], None, ["length"])
    short, _ = score(ppo, rollout, 2.0)
    free, _ = score(ppo, rollout, 100.0)
    position = torch.arange(1, 9)
    wanted = free.rewards * torch.sigmoid(6 - 2.0 * (position - 2.0))
    torch.testing.assert_close(short.rewards, wanted)
    assert free.rewards.any()
