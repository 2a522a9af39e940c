"""A training stops at the step whose figures are not finite, before it spoils what it trains."""

import math

import pytest
import torch
from test_ppo import CONFIG, PROMPTS, folder, parts, questions, trainer  # noqa: F401
from test_reward_model import answers

from tppo.methods.config import RewardModelConfig, SFTConfig
from tppo.methods.reward_model import PolicyTokens, train_reward_model
from tppo.methods.sft import Examples, train_sft
from tppo.methods.spoilt import SPOILT
from tppo.models.guards import GuardError, check_step
from tppo.models.load import load_policy, load_reward_model

CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")


def spoil(parameter, value=NAN):
    with torch.no_grad():
        parameter.view(-1)[0] = value


def weights(*models):
    return [p.detach().clone() for model in models for p in model.parameters()]


def same(before, *models):
    return all(torch.equal(a, b) for a, b in zip(before, weights(*models), strict=True))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["policy", "ref", "critic", "reward"])
def test_a_model_that_is_spoilt_is_named_before_the_first_step(folder, name, value):  # noqa: F811
    """A NaN weight ended in torch's "probability tensor contains inf, nan"."""
    ppo = trainer(folder)
    spoilt = parts(ppo)[name]
    parameter, weight = next(iter(spoilt.named_parameters()))
    spoil(weight, value)
    with pytest.raises(GuardError, match=rf"before ppo step 1: the norm of the {name}'s weights is "
                                         rf".*the {name}'s weight '{parameter}' is not finite"):
        ppo.step(questions(PROMPTS))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("critic", INF,
         "not finite: values of the critic, values of the critic after .*, advantages"),
        ("critic", NAN, "not finite: values of the critic,"),
        ("ref", NAN, "not finite: log-probs of the reference, advantages"),
        ("reward", NAN, "not finite: class logits of the reward model"),
        ("policy", NAN, r"while sampling: .*the model's weight 'model.embed_tokens.weight' is not"),
    ],
)
def test_what_is_spoilt_between_two_steps_does_not_reach_the_policy(
    folder, name, value, said  # noqa: F811
):
    """An infinite critic gave NaN advantages, and those a NaN policy one step later."""
    ppo = trainer(folder)
    ppo.step(questions(PROMPTS))
    model = parts(ppo)[name]
    spoil(model.head.weight if name == "critic" else next(iter(model.parameters())), value)
    if name == "reward":
        spoil(model.model.model.score.weight, value)
    before = weights(ppo.models.policy, ppo.models.critic)
    with pytest.raises(GuardError, match=said) as caught:
        ppo.step(questions(PROMPTS))
    assert name == "policy" or "ppo step 2" in str(caught.value)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in
               zip(before, weights(ppo.models.policy, ppo.models.critic), strict=True))  # fmt: skip


@pytest.mark.parametrize("name", ["policy", "critic"])
def test_a_minibatch_whose_gradient_is_not_finite_is_skipped(
    folder, name, monkeypatch, capsys  # noqa: F811
):
    """The third of four: the weights are those after the second, and the fourth is trained on."""
    ppo = trainer(folder)
    ppo.step(questions(PROMPTS))
    seen, kept = [], []

    def hook(gradient):
        seen.append(1)
        if len(seen) == 3:
            kept.extend(weights(ppo.models.policy, ppo.models.critic))
            return gradient * NAN
        return gradient

    model = getattr(ppo.models, name)
    parameter, weight = next(iter(model.named_parameters()))
    weight.register_hook(hook)
    real, after = ppo.skips.add, []

    def add(*args, **rest):
        real(*args, **rest)
        after.append(same(kept, ppo.models.policy, ppo.models.critic))

    monkeypatch.setattr(ppo.skips, "add", add)
    metrics, _ = ppo.step(questions(PROMPTS))
    said = (f"WARNING: ppo step 2: gradient norm of the {name} is nan (the {name}'s gradient "
            f"'{parameter}' is not finite). The minibatch is skipped (1 in a row)")
    assert said in capsys.readouterr().err
    assert len(seen) == 4 and after == [True]
    assert not same(kept, ppo.models.policy, ppo.models.critic)  # the fourth was trained on
    assert metrics[SPOILT] == 1 and metrics["policy/updates"] == 3
    assert ppo.skips.in_row == 0 and all(math.isfinite(x) for x in metrics.values())


def test_weights_that_a_step_makes_infinite_are_not_handed_on(folder):  # noqa: F811
    """Their checkpoint would be written, or they would be kept as the best."""
    ppo = trainer(folder)
    ppo.schedules.rates = lambda step: {"policy": 1e-2, "critic": INF}
    with pytest.raises(GuardError, match=r"ppo step 1: |after ppo step 1: the norm of the critic"):
        ppo.step(questions(PROMPTS))


def test_a_healthy_step_costs_one_read_of_the_device(monkeypatch):
    model = torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(9)))
    reads = []
    for name in ("item", "tolist", "__bool__", "__float__"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, real=real, name=name: reads.append(name) or real(self)
        )
    losses = {"loss": torch.tensor(2.0), "other": torch.tensor(3.0)}
    assert check_step("step 1", {"m": model}, losses, {"m": torch.tensor(1.0)}, "") == [2.0, 3.0]
    assert reads == ["tolist"]


def sft(folder, **settings):  # noqa: F811
    model = load_policy(folder, CPU)
    data = Examples([[5, 6, 7], [8, 9]] * 8, [[10, 11, 1], [12, 1]] * 8)
    config = SFTConfig(**{"lr": 1e-2, "max_steps": 6, "eval_every": 3, **settings})
    return model, lambda: train_sft(model, data, data, config, pad_id=0, seed=0)


def test_sft_stops_at_its_first_step_from_a_spoilt_model(folder):  # noqa: F811
    model, run = sft(folder)
    spoil(model.model.norm.weight)
    before = weights(model)
    said = r"before sft step 1: .* is nan \(the model's weight 'model.norm.weight' is not finite"
    with pytest.raises(GuardError, match=said):
        run()
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num())
               for a, b in zip(before, weights(model), strict=True))


def test_sft_stops_where_its_learning_rate_spoils_the_model(folder):  # noqa: F811
    _, run = sft(folder, lr=1e30)
    with pytest.raises(GuardError, match=r"sft step 2: .*usually a smaller --sft.lr helps"):
        run()
    _, run = sft(folder, lr=1e30, eval_every=1)  # seen when the held-out loss is taken
    with pytest.raises(GuardError, match=r"sft step 1: the held-out loss|after sft step 1: "):
        run()


def test_the_reward_model_does_not_start_from_a_spoilt_trunk(folder):  # noqa: F811
    model = load_reward_model(folder, CPU)
    spoil(model.model.norm.weight, INF)
    config = RewardModelConfig(lr=1.0)
    said = r"before train-rm step 1: .*\(the reward model's weight 'model.norm.weight' is not fin"
    with pytest.raises(GuardError, match=said):
        train_reward_model(PolicyTokens(model, 0), answers(16, 0), config, seed=0)


def test_the_reward_model_stops_at_the_step_that_would_spoil_it(folder):  # noqa: F811
    config = RewardModelConfig(epochs=2, batch_size=16, lr=1e-3)
    model = load_reward_model(folder, CPU)
    seen, kept = [], []

    def hook(gradient):
        seen.append(1)
        if len(seen) == 3:
            kept.extend(weights(model))
            return gradient * INF
        return gradient

    model.score.weight.register_hook(hook)
    with pytest.raises(GuardError, match=r"train-rm step 3: gradient norm of the reward model is "
                                         r".*'score.weight' is not finite.*--reward-model.lr"):
        train_reward_model(PolicyTokens(model, 0), answers(64, 0), config, seed=0)
    assert same(kept, model)
    model = load_reward_model(folder, CPU)
    config = RewardModelConfig(epochs=1, batch_size=64, lr=1e30)  # its one step is its last
    with pytest.raises(GuardError, match="after train-rm step 1: the norm of the reward model"):
        train_reward_model(PolicyTokens(model, 0), answers(64, 0), config, seed=0)
