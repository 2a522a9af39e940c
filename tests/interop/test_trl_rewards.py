"""TokenGRPOTrainer: rewards and advantages of tokens in trainings by TRL, and what they buy."""

import re
import statistics

import datasets
import pytest
import torch
from _trl_runs import (
    LETTERS,
    VOWELS,
    alphabet,
    count_vowels,
    logged,
    made,
    pay_vowels,
    saved_model,
)
from transformers import MixtralConfig, MixtralForCausalLM
from trl import GRPOTrainer

from tppo_kernels.integrations.trl import TokenGRPOTrainer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("model"))


def advantages(model, folder, **settings):
    """The trainer after one batch, and what it made of it."""
    trainer = made(TokenGRPOTrainer, model, folder, **settings)
    trainer.model.train()
    inputs = [{"prompt": p} for p in ("ab", "cd") for _ in range(4)]
    trainer.current_gradient_accumulation_steps = 1
    output = trainer._generate_and_score_completions(inputs)
    return trainer, output


def span_vowels(completions, **_):
    """`pay_vowels`, as spans of characters."""
    return [[(i, i + 1, 1.0) for i, c in enumerate(text) if c in VOWELS] for text in completions]


async def pay_vowels_later(completion_ids, **_):
    return pay_vowels(completion_ids)


def returns_of(output, gamma=1.0):
    """Reward-to-go of `pay_vowels`, written out."""
    found = torch.zeros(output["completion_ids"].shape)
    paid = [LETTERS.index(c) + 2 for c in VOWELS]
    for b, (ids, mask) in enumerate(zip(output["completion_ids"].tolist(),
                                        output["completion_mask"].tolist(), strict=True)):
        total = 0.0
        for t in range(sum(mask) - 1, -1, -1):
            total = float(ids[t] in paid) + gamma * total
            found[b, t] = total
    return found


def against_the_group(output, gamma=1.0, others=False):
    """G - the mean of the group, an answer that has ended standing with its last token."""
    returns, lengths = returns_of(output, gamma), output["completion_mask"].sum(1).tolist()
    expected, (rows, width) = torch.zeros_like(returns), returns.shape
    for b in range(rows):
        group = [g for g in range(b - b % 4, b - b % 4 + 4) if not (others and g == b)]
        for t in range(width):
            mean = statistics.mean(float(returns[g, min(t, lengths[g] - 1)]) for g in group)
            expected[b, t] = returns[b, t] - mean
    return expected * output["completion_mask"]


@pytest.mark.parametrize("reward", [pay_vowels, span_vowels, pay_vowels_later],
                         ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["group", "rloo"])
def test_advantages_are_the_documented_formula(model, tmp_path, reward, name):
    _, output = advantages(model, tmp_path, reward=reward, token_advantages=name, gamma=0.9,
                           scale_rewards="none")
    expected = against_the_group(output, 0.9, others=name == "rloo")
    assert expected.abs().max() > 0.5 and len(set(output["completion_mask"].sum(1).tolist())) > 1
    torch.testing.assert_close(output["advantages"] * output["completion_mask"], expected,
                               rtol=0, atol=2e-6)


def test_the_deviation_is_that_of_the_totals(model, tmp_path):
    _, output = advantages(model, tmp_path, reward=pay_vowels, scale_rewards="group")
    totals = returns_of(output)[:, 0].view(2, 4)
    expected = against_the_group(output) / (totals.std(1).repeat_interleave(4)[:, None] + 1e-4)
    torch.testing.assert_close(output["advantages"] * output["completion_mask"], expected,
                               rtol=1e-5, atol=1e-5)


def test_whitened_advantages_have_mean_0_and_deviation_1(model, tmp_path):
    _, output = advantages(model, tmp_path, reward=pay_vowels, token_advantages="whitened")
    valid = output["advantages"][output["completion_mask"].bool()]
    assert abs(float(valid.mean())) < 1e-6 and float(valid.std()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_numbers_for_answers_give_trls_advantages(model, tmp_path, monkeypatch, scale):
    kept = {}
    stock = GRPOTrainer._generate_and_score_completions

    def keep(self, inputs):
        output = stock(self, inputs)
        kept["advantages"] = output["advantages"].clone()
        return output

    def sometimes(completions, **_):
        return [None if b == 5 else v for b, v in enumerate(count_vowels(completions))]

    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", keep)
    _, output = advantages(model, tmp_path, reward=sometimes, scale_rewards=scale)
    assert torch.equal(output["advantages"], kept["advantages"])
    assert kept["advantages"].abs().max() > 0.1 and kept["advantages"][5] == 0


def test_functions_of_several_kinds_add_up_by_their_weights(model, tmp_path):
    trainer, output = advantages(model, tmp_path, reward=[pay_vowels, count_vowels],
                                 reward_weights=[1.0, 0.5], scale_rewards="none")
    returns = returns_of(output)
    returns = returns + 0.5 * returns[:, :1]  # the number stands at the last token
    output = {**output, "advantages": output["advantages"]}
    mean = returns[:4, 0].mean()
    assert output["advantages"][:4, 0].tolist() == pytest.approx(
        (returns[:4, 0] - mean).tolist(), abs=1e-5)
    assert trainer._metrics["train"]["reward"][-1] == pytest.approx(
        float(returns[:, 0].mean()), abs=1e-5)
    assert trainer._metrics["train"]["rewards/pay_vowels/mean"][-1] == pytest.approx(
        float(returns_of(output)[:, 0].mean()), abs=1e-5)


def test_tokens_of_tools_are_no_actions(model, tmp_path):
    """A reward there goes to the action before it, and gamma does not count them."""
    trainer, output = advantages(model, tmp_path, reward=pay_vowels, scale_rewards="none")
    width = output["completion_ids"].shape[1]
    trainer._paid[0].tokens = [[0.0, 0.0, 4.0, 1.0]] * 8
    trainer._scored = torch.full((8, 1), 5.0), [4] * 8
    trainer.gamma = 0.5
    tools = torch.ones(8, width, dtype=torch.int64)
    tools[0, 1:3] = 0
    found = trainer._advantages_of_tokens({**output, "tool_mask": tools, "completion_mask":
                                           (torch.arange(width) < 4).expand(8, width)})
    first, others = 4 + 0.5 * 1, 0.5 * (0.5 * (4 + 0.5))  # reward-to-go at token 0
    assert float(found[0, 0]) == pytest.approx(first - (first + 3 * others) / 4)
    assert float(found[0, 3]) == pytest.approx(0)


def test_none_numbers_and_tokens_share_a_group(model, tmp_path):
    """An answer to which nothing was said is in no mean; a number stands at its last token."""
    def mixed(completions, completion_ids, **_):
        dense, totals = pay_vowels(completion_ids), count_vowels(completions)
        return [None, totals[1], dense[2], dense[3], *totals[4:7], None]

    _, output = advantages(model, tmp_path, reward=mixed, scale_rewards="none")
    returns, lengths = returns_of(output), output["completion_mask"].sum(1).tolist()
    returns[[1, 4, 5, 6]] = returns[[1, 4, 5, 6], :1]
    for group in ((1, 2, 3), (4, 5, 6)):
        for b in group:
            for t in range(lengths[b]):
                mean = statistics.mean(float(returns[g, min(t, lengths[g] - 1)]) for g in group)
                assert float(output["advantages"][b, t]) == pytest.approx(
                    float(returns[b, t]) - mean, abs=1e-5)
    assert not output["advantages"][[0, 7]].any() and output["advantages"][2].any()


def test_answers_without_a_token_and_truncated_ones_stay_in_the_groups_mean(model, tmp_path):
    trainer, output = advantages(model, tmp_path, reward=pay_vowels, scale_rewards="none")
    width = output["completion_ids"].shape[1]
    assert width >= 3
    lengths = [0, 2, 3, 3, 3, 3, 3, 3]
    trainer._paid[0].tokens = [[], [1.0, 1.0], [0.0, 0.0, 3.0], *[[0.0] * 3] * 5]
    trainer._scored = torch.tensor([[0.0], [2.0], [3.0], *[[0.0]] * 5]), lengths
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    mask[2] = 0  # TRL's mask_truncated_completions
    tools = mask.clone()
    found = trainer._advantages_of_tokens({**output, "completion_mask": mask, "tool_mask": tools})
    means = [(0 + 2 + 3 + 0) / 4, (0 + 1 + 3 + 0) / 4]  # the first answer stands with its total
    assert found[1, :2].tolist() == pytest.approx([2 - means[0], 1 - means[1]])
    assert found.isfinite().all()


def test_a_streamed_dataset_trains(model, tmp_path):
    prompts = datasets.IterableDataset.from_generator(
        lambda: ({"prompt": p} for p in ["ab", "cd", "ef", "gh"] * 20))
    log = logged(TokenGRPOTrainer, model, tmp_path, reward=pay_vowels, prompts=prompts, max_steps=2)
    assert len(log) == 3 and log[0]["grad_norm"] > 0


def test_an_evaluation_is_trls_and_has_groups_of_its_own_size(model, tmp_path):
    def evaluated(kind, reward):
        trainer = made(kind, model, tmp_path, reward=reward, beta=0.1, num_generations_eval=2,
                       per_device_eval_batch_size=4)
        trainer.eval_dataset = datasets.Dataset.from_dict({"prompt": ["ab", "cd", "ef", "gh"]})
        torch.manual_seed(3)
        return {name: x for name, x in trainer.evaluate().items()
                if "runtime" not in name and "per_second" not in name}

    theirs = evaluated(GRPOTrainer, count_vowels)
    assert evaluated(TokenGRPOTrainer, count_vowels) == pytest.approx(theirs, abs=1e-6)
    dense = evaluated(TokenGRPOTrainer, pay_vowels)
    assert dense["eval_reward"] == pytest.approx(theirs["eval_reward"])
    assert abs(dense["eval_loss"] - theirs["eval_loss"]) > 1e-4  # paid elsewhere


def test_generations_that_do_not_divide_the_batch_are_refused_by_trl(model, tmp_path):
    with pytest.raises(ValueError, match="num_generations|divisible"):
        made(TokenGRPOTrainer, model, tmp_path, num_generations=3)


def test_a_model_of_experts_trains_on_trls_auxiliary_loss_too(tmp_path):
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(LETTERS) + 2, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        output_router_logits=True, router_aux_loss_coef=0.5, pad_token_id=0, eos_token_id=1,
        bos_token_id=None, initializer_range=0.3, max_position_embeddings=64)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "experts")
    alphabet().save_pretrained(tmp_path / "experts")
    theirs, mine = (logged(kind, str(tmp_path / "experts"), tmp_path / "out", max_steps=3,
                           num_iterations=2) for kind in (GRPOTrainer, TokenGRPOTrainer))
    for expected, actual in zip(theirs[:3], mine[:3], strict=True):
        assert actual.keys() == expected.keys() and expected["aux_loss"] > 0.1
        for name in ("loss", "aux_loss", "grad_norm"):
            assert actual[name] == pytest.approx(expected[name], abs=2e-6, rel=1e-5), name


@pytest.mark.parametrize(("settings", "words"), [
    ({"loss_type": "vespo"}, "loss_type='vespo', expected one of grpo"),
    ({"multi_objective_aggregation": "normalize_then_sum"}, "expected 'sum_then_normalize'"),
    ({"loss_type": "cispo"}, r"epsilon_high=0\.2 with cispo, expected at least 1"),
    ({"delta": 1.0}, "delta=1, expected more than 1"),
    ({"token_advantages": "gae"}, "token_advantages was 'gae', expected one of group, rloo"),
    ({"gamma": 1.5}, r"gamma was 1\.5"),
])
def test_what_is_not_supported_is_refused_in_one_sentence(model, tmp_path, settings, words):
    with pytest.raises(ValueError, match=words) as caught:
        made(TokenGRPOTrainer, model, tmp_path, **settings)
    assert "\n" not in str(caught.value)


def test_an_entry_that_fits_no_form_names_its_function(model, tmp_path):
    def short(completions, **_):
        return [[1.0] * 99 for _ in completions]

    with pytest.raises(ValueError, match=re.escape("short: entry 0 was")):
        advantages(model, tmp_path, reward=short)


def learned(kind, model, folder, reward, seed, steps):
    """The mean reward of the last quarter of the steps, and the reward of every step."""
    log = logged(kind, model, folder, reward=reward, seed=seed, max_steps=steps,
                 num_generations=8, max_completion_length=16, scale_rewards="none")
    course = [line["reward"] for line in log if "reward" in line]
    return statistics.mean(course[-steps // 4:]), course


@pytest.mark.slow
def test_rewards_of_tokens_teach_faster_than_their_sum(tmp_path, capsys):
    """A toy: a vowel pays 1; the same samples, seeds and settings, the sum for TRL's trainer."""
    found = []
    for seed in range(3):
        model = saved_model(tmp_path / f"model-{seed}", seed)
        start = learned(GRPOTrainer, model, tmp_path / "a", count_vowels, seed, 60)
        tokens = learned(TokenGRPOTrainer, model, tmp_path / "b", pay_vowels, seed, 60)
        found.append((start[0], tokens[0]))
        with capsys.disabled():
            print(f"seed {seed}: reward of the last 15 of 60 steps {start[0]:.2f} by the sum, "
                  f"{tokens[0]:.2f} by tokens; at first {start[1][0]:.2f}")
    sums, tokens = (statistics.mean(x) for x in zip(*found, strict=True))
    assert tokens > sums and all(b > a for a, b in found)
