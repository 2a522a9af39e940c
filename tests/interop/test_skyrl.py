"""SkyRL from the index: its functions against ours, its registries, and its trainer's own steps."""

from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from skyrl.backends.skyrl_train.utils import ppo_utils, torch_utils
from skyrl.backends.skyrl_train.workers import worker
from skyrl.train.config import AlgorithmConfig, OffPolicyCorrectionConfig

import tppo_kernels as tk
from tppo_kernels.integrations import _peer, skyrl

EXAMPLES = Path(__file__).parents[2] / "examples/integrations"
CASES = range(500)
CLOSE = 1e-6  # of the larger of 1 and the largest number at a valid slot, in fp32


def batch(seed):
    """Random rewards, values and a mask of one of the kinds that trainers meet: [B, T]."""
    g = torch.Generator().manual_seed(seed)
    B, T = (int(torch.randint(1, high, (), generator=g)) for high in (9, 65))
    rewards, values = torch.randn(2, B, T, generator=g)
    mask = torch.rand(B, T, generator=g) < 0.7  # gaps
    kind = seed % 8
    if kind == 1:
        mask[0] = False  # an empty row
    if kind == 2:  # padding on the left, as SkyRL aligns responses
        mask = torch.arange(T) >= torch.randint(T, (B, 1), generator=g)
    if kind == 3:
        mask = ~(torch.arange(T) >= torch.randint(1, T + 1, (B, 1), generator=g))
    if kind == 4:
        mask[:] = True
    if kind == 5:  # one valid token a row
        mask = torch.arange(T) == torch.randint(T, (B, 1), generator=g)
    if kind == 6:
        values[:] = 3.0  # a critic that knows nothing
    mask = [mask, mask.int(), mask.long(), mask.float()][seed // 8 % 4]
    return g, rewards, values, mask


def difference(found, expected, mask=None):
    """The largest, at valid slots, as a share of the larger of 1 and the largest number there."""
    found, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (found, expected))
    if mask is not None:
        found, expected = found[mask > 0], expected[mask > 0]
    if not found.numel():
        return 0.0
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1))


def test_gae_is_theirs():
    """In a few cases whitening divides by next to nothing, and theirs in fp32 is 2e-6 from theirs
    in fp64: ours is as near to that.  Fewer than two valid tokens stop SkyRL; ours are 0 there."""
    stopped = differ = 0
    for seed in CASES:
        _, rewards, values, mask = batch(seed)
        given = (rewards, values, mask, 0.99, 0.95)
        found = skyrl.compute_gae_advantage_return(*given)
        if mask.sum() < 2:
            with pytest.raises(ValueError):
                ppo_utils.compute_gae_advantage_return(*given)
            assert not found[0].any()
            stopped += 1
            continue
        theirs = ppo_utils.compute_gae_advantage_return(*given)
        exact = ppo_utils.compute_gae_advantage_return(rewards.double(), values.double(),
                                                       *given[2:])
        own = difference(theirs[0], exact[0], mask)
        assert difference(found[0], exact[0], mask) < max(CLOSE, 2 * own), seed
        assert difference(found[1], theirs[1]) < CLOSE, seed
        differ += difference(found[0], theirs[0], mask) > CLOSE
    assert 0 < stopped < 60 and differ < 5


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_is_theirs(shift_mean):
    for seed in CASES:
        _, rewards, _, mask = batch(seed)
        if mask.sum() >= 2:
            found, theirs = (f(rewards, mask, shift_mean) for f in (skyrl.masked_whiten,
                                                                    ppo_utils.masked_whiten))
            exact = ppo_utils.masked_whiten(rewards.double(), mask, shift_mean)
            own = difference(theirs, exact, mask)
            assert difference(found, exact, mask) < max(CLOSE, 2 * own), seed


def loss_case(seed):
    """Log-probs of three policies around each other, some far apart, and scaled advantages."""
    g, rewards, _, mask = batch(seed)
    logprobs = -3 * torch.rand(rewards.shape, generator=g)
    old = logprobs + 0.4 * torch.randn(rewards.shape, generator=g)
    old += 30 * (torch.rand(rewards.shape, generator=g) < 0.05)  # beyond the clamp at 20
    old -= 30 * (torch.rand(rewards.shape, generator=g) < 0.05)
    rollout = old + 0.3 * torch.randn(rewards.shape, generator=g)
    return logprobs.requires_grad_(), old, rewards / rewards.numel(), mask, rollout


CORRECTIONS = [
    {}, {"tis_ratio_type": "token", "token_tis_ratio_clip_high": 1.2},
    {"tis_ratio_type": "sequence"}, {"sequence_mask_metric": "geometric"},
    {"token_mask_is_threshold_low": 0.7, "token_mask_is_threshold_high": 1.4,
     "tis_ratio_type": "token"}, {"outlier_token_is_threshold_high": 1.6}]


@pytest.mark.parametrize("kind", ["regular", "dual_clip"])
def test_policy_losses_their_gradients_and_metrics_are_theirs(kind):
    clipped = 0
    for seed in CASES:
        logprobs, old, advantages, mask, rollout = loss_case(seed)
        correction = OffPolicyCorrectionConfig(**CORRECTIONS[seed % len(CORRECTIONS)])
        config = AlgorithmConfig(policy_loss_type=kind, clip_ratio_c=1.5,
                                 off_policy_correction=correction)
        given = (logprobs, old, advantages, config, mask, rollout if seed % 7 else None)
        (loss, metrics), (ours, own) = (f(*given) for f in (ppo_utils.ppo_policy_loss,
                                                            skyrl.ppo_policy_loss))
        gradient, = torch.autograd.grad(loss, logprobs)
        assert difference(ours.detach(), loss.detach()) < CLOSE, seed
        assert difference(torch.autograd.grad(ours, logprobs)[0], gradient) < CLOSE, seed
        assert own == pytest.approx(metrics, abs=1e-6, nan_ok=True), seed
        clipped += metrics["clip_ratio"] > 0
    assert clipped > 300
    with pytest.raises(ValueError, match="policy_loss_type is 'gspo', expected one of regular, du"):
        skyrl.ppo_policy_loss(*given[:3], AlgorithmConfig(policy_loss_type="gspo"))


@pytest.mark.parametrize("clip", [None, 0.2])
def test_the_critics_loss_is_theirs(clip):
    """Their clip fraction counts tokens within the clip as well, where rounding makes the clipped
    branch the larger one."""
    config = AlgorithmConfig(value_clip=clip)
    for seed in CASES:
        g, returns, values, mask = batch(seed)
        old = values + 0.3 * torch.randn(values.shape, generator=g)
        values.requires_grad_()
        given = (values, old, returns, config, mask)
        loss, fraction = ppo_utils.ppo_critic_loss(*given)
        ours, own = skyrl.ppo_critic_loss(*given)
        gradient, = torch.autograd.grad(loss, values)
        assert difference(ours.detach(), loss.detach()) < CLOSE, seed
        assert difference(torch.autograd.grad(ours, values)[0], gradient) < CLOSE, seed
        assert (own is None) == (fraction is None)
        if clip is not None:
            stepped = (values - old).detach()
            other = (old + stepped.clamp(-clip, clip) - returns).square()
            larger = (other > (values - returns).square()) & (stepped.abs() > clip)
            expected = torch_utils.masked_mean(larger.float(), mask)
            assert own == pytest.approx(float(expected), abs=1e-6), seed
            assert own <= fraction + 1e-6


def test_log_probs_are_theirs_with_their_gradient():
    for seed in CASES:
        g = torch.Generator().manual_seed(seed)
        B, T, V = (int(torch.randint(1, high, (), generator=g)) for high in (5, 17, 60))
        logits = (4 * torch.randn(B, T, V, generator=g)).requires_grad_()
        labels = torch.randint(V, (B, T), generator=g)
        weight = torch.randn(B, T, generator=g)
        found, expected = (f(logits, labels) for f in (skyrl.logprobs_from_logits,
                                                       torch_utils.logprobs_from_logits))
        assert difference(found.detach(), expected.detach()) < CLOSE, seed
        gradients = [torch.autograd.grad((weight * x).sum(), logits)[0] for x in (found, expected)]
        assert difference(*gradients) < CLOSE, seed


def test_our_estimator_steps_over_what_the_policy_has_not_written():
    """As if the gap were cut out, and what stands in it is not read; SkyRL's is .1 away."""
    _, rewards, values, _ = batch(4)
    rewards, values = rewards[:, :10].clone(), values[:, :10].clone()
    mask = torch.ones_like(rewards)
    mask[:, 3:7] = 0
    rewards[:, 3:7] = 0
    kept = [x[mask > 0].view(len(x), 6) for x in (rewards, values, mask)]
    registered = ppo_utils.AdvantageEstimatorRegistry.get("tppo_gae")
    given = {"gamma": 0.99, "lambd": 0.95, "index": np.zeros(len(rewards)), "config": None}
    poisoned = values.masked_fill(mask == 0, torch.nan)
    found = registered(token_level_rewards=rewards, values=poisoned, response_mask=mask, **given)
    short = registered(token_level_rewards=kept[0], values=kept[1], response_mask=kept[2], **given)
    for long, cut in zip(found, short, strict=True):
        torch.testing.assert_close(long[mask > 0].view(len(long), 6), cut)
        assert not long[mask == 0].any()
    theirs = ppo_utils.compute_gae_advantage_return(rewards, values, mask, 0.99, 0.95)
    assert ((found[0] - theirs[0]) * mask).abs().max() > 0.1


def test_our_loss_is_registered_and_ignores_what_a_mask_hides():
    logprobs, old, advantages, mask, _ = loss_case(0)
    registered = ppo_utils.PolicyLossRegistry.get("tppo")
    config = AlgorithmConfig(policy_loss_type="tppo", clip_ratio_c=None)
    loss, metrics = registered(logprobs, old, advantages, config=config, loss_mask=mask)
    expected, _ = ppo_utils.ppo_policy_loss(logprobs, old, advantages, AlgorithmConfig(), mask)
    assert difference(loss.detach(), expected.detach()) < CLOSE
    assert metrics["clip_ratio"] > 0 and all(type(x) is float for x in metrics.values())
    means = tk.ppo_loss(logprobs, old, advantages, mask > 0).metrics.means()
    named = {"clip_ratio": "clip_fraction", **{name: name for name in metrics.keys()
                                               - {"clip_ratio"}}}
    assert len(metrics) == 7 and metrics == pytest.approx(
        {name: means[given] for name, given in named.items()}, rel=1e-6)
    hidden = old.masked_fill(mask == 0, torch.nan)
    assert registered(logprobs, hidden, advantages, config=config, loss_mask=mask)[0] == loss
    assert ppo_utils.ppo_policy_loss(logprobs, hidden, advantages, AlgorithmConfig(),
                                     mask)[0].isnan()


def test_patching_replaces_their_names_everywhere_and_unpatching_gives_them_back(capsys):
    names = {ppo_utils: ("compute_gae_advantage_return", "masked_whiten", "ppo_policy_loss",
                         "ppo_critic_loss"),
             torch_utils: ("logprobs_from_logits",), worker: ("ppo_critic_loss",)}
    before = {(m, n): getattr(m, n) for m, listed in names.items() for n in listed}
    registries = (ppo_utils.PolicyLossRegistry, ppo_utils.AdvantageEstimatorRegistry)
    kept = [dict(registry._functions) for registry in registries]
    skyrl.patch()
    skyrl.patch()
    try:
        assert all(getattr(m, n) is getattr(skyrl, n) for m, n in before)
        g, rewards, values, mask = batch(8)
        called = ppo_utils.compute_advantages_and_returns(
            rewards, mask, np.zeros(len(rewards)), "gae", AlgorithmConfig(), values=values)
        assert not called[0][mask == 0].any()  # theirs are not 0 there
        for name in ("regular", "dual_clip"):
            assert ppo_utils.PolicyLossRegistry.get(name).__module__ == skyrl.__name__
    finally:
        skyrl.unpatch()
    assert all(getattr(m, n) is f for (m, n), f in before.items())
    assert [dict(registry._functions) for registry in registries] == kept
    said = capsys.readouterr().err
    assert said.count("tppo_kernels in skyrl 0.4.0: ours are compute_gae_advantage_return, ") == 1


def test_the_self_check_finds_what_the_integration_needs():
    found = {each["trainer"]: each for each in _peer.states(probe=True)}["skyrl"]
    assert found["state"] == "works" and found["installed"] == version("skyrl")
