"""TokenGRPOTrainer: rewards and advantages of tokens in trainings by TRL, and what they buy."""

import re
import statistics

import pytest
import torch
from _trl_runs import LETTERS, VOWELS, count_vowels, logged, made, pay_vowels, saved_model
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
