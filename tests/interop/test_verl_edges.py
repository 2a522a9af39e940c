"""Calls of verl's functions that a random batch does not make: each gives what verl's own gives."""

import math

import pytest
import torch
import verl.utils.torch_functional as verl_F
from _verl_stock import MODES, STOCK, config_of
from verl.trainer.ppo import core_algos
from verl.utils.experimental.torch_functional import FusedLinearForPPO

from tppo_kernels.integrations import verl as ours

MASK = (torch.arange(12) < torch.tensor([[12], [5], [9], [2]])).long()
HALVES = torch.float16, torch.bfloat16
LAYER = FusedLinearForPPO()


@pytest.fixture(autouse=True)
def patched():
    ours.patch()
    yield
    ours.unpatch()


def function(name):
    """What stands at verl's name now: ours."""
    return {"gae": core_algos.compute_gae_advantage_return, "value": core_algos.compute_value_loss,
            "policy": core_algos.compute_policy_loss_vanilla, "kl": core_algos.kl_penalty,
            "agg": core_algos.agg_loss, "whiten": verl_F.masked_whiten,
            "logprobs": verl_F.logprobs_from_logits, "entropy": verl_F.entropy_from_logits,
            "chunked": verl_F.entropy_from_logits_with_chunking,
            "fused": FusedLinearForPPO.forward}[name]


def flat(results):
    """The numbers in what a function returns."""
    if isinstance(results, dict):
        return [torch.tensor(x, dtype=torch.float64) for x in results.values()]
    if isinstance(results, tuple):
        return [x for part in results for x in flat(part)]
    return [results.detach().double()]


def called(which, args, grad, keywords):
    """Results, and the gradients of their sum by the positions that `grad` lists."""
    args = [x.detach().requires_grad_(i in grad) if torch.is_tensor(x) and x.is_floating_point()
            else x for i, x in enumerate(args)]
    results = which(*args, **keywords)
    if grad:
        first = results if torch.is_tensor(results) else results[0]
        (first.float() * torch.linspace(1, 2, first.numel()).view(first.shape)).sum().backward()
    return flat(results) + [None if args[i].grad is None else args[i].grad.double() for i in grad]


def same(name, *args, grad=(), where=None, bound=5e-6, **keywords):
    """Ours and verl's give the same results and gradients, at the slots of `where`; how exact
    they are is what random batches show."""
    pairs = zip(called(function(name), args, grad, keywords),
                called(getattr(STOCK, name), args, grad, keywords), strict=True)
    for found, stock in pairs:
        assert (found is None) == (stock is None)
        if stock is not None:
            if where is not None and stock.shape == where.shape:
                found, stock = found[where.bool()], stock[where.bool()]
            torch.testing.assert_close(found, stock, rtol=bound, atol=bound, equal_nan=True)


def arguments(dtype=torch.float32, mask=MASK):
    """Positional arguments of each function, and which of them have gradients."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, *mask.shape, generator=g).to(dtype)
    logits = 3 * torch.randn(6, 50, generator=g).to(dtype)
    labels = torch.randint(0, 50, (6,), generator=g)
    hidden, weight = (torch.randn(n, 8, generator=g).to(dtype) for n in (6, 50))
    return {"gae": ((x[0], x[1], mask, 0.99, 0.95), ()), "whiten": ((x[0], mask), ()),
            "value": ((*x[:3], mask, 0.3), (0,)),
            "policy": ((*x[:3], mask, "token-mean", config_of(1, {})), (1,)),
            "agg": ((x[0], mask, "seq-mean-token-mean"), (0,)), "kl": ((x[0], x[1], "k3"), (0, 1)),
            "logprobs": ((logits, labels), (0,)), "entropy": ((logits,), (0,)),
            "chunked": ((logits, 4), (0,)), "fused": ((LAYER, hidden, weight, labels), (1, 2))}


NAMES = sorted(arguments())


@pytest.mark.parametrize("name", NAMES)
def test_strided_inputs(name):
    args, grad = arguments()[name]
    strided = [x.mT.contiguous().mT if torch.is_tensor(x) and x.dim() > 1 else x for x in args]
    assert not any(x.is_contiguous() for x in strided if torch.is_tensor(x) and x.dim() > 1)
    same(name, *strided, grad=grad, where=MASK)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_nearer_to_the_truth_than_verls(name, dtype):
    args, grad = arguments(dtype)[name]
    exact = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in args]
    truth = called(getattr(STOCK, name), exact, grad, {})
    for found, stock, true in zip(called(function(name), args, grad, {}),
                                  called(getattr(STOCK, name), args, grad, {}), truth, strict=True):
        where = MASK.bool() if true.shape == MASK.shape else ...
        error, theirs = ((x[where] - true[where]).abs().max() for x in (found, stock))
        assert error <= theirs + 1e-6 * true[where].abs().max().clamp(min=1)


@pytest.mark.parametrize(("name", "grad"), [("gae", ()), ("whiten", (0,)), ("value", (0, 1, 2)),
                                            ("policy", (0, 1, 2)), ("policy", (1, 6))])
def test_gradients_with_respect_to_what_is_data_to_us(name, grad):
    args, _ = arguments()[name]
    if 6 in grad:
        args = (*args, torch.rand(MASK.shape))
    same(name, *args, grad=grad, where=MASK)


def test_gae_of_tensors_with_gradients_has_none():
    rewards, values = (torch.randn(MASK.shape, requires_grad=True) for _ in range(2))
    found = core_algos.compute_gae_advantage_return(rewards, values, MASK, 1.0, 0.95)
    assert not any(x.requires_grad for x in found)


@pytest.mark.parametrize("weighting", [2 * MASK, 0.5 * MASK, MASK + (torch.arange(12) == 1)])
@pytest.mark.parametrize("name", ["gae", "whiten", "value", "policy", "agg"])
def test_a_mask_that_weights_is_verls(name, weighting):
    args, grad = arguments(mask=weighting)[name]
    same(name, *args, grad=grad, bound=0)


def test_tensors_that_broadcast():
    x = torch.randn(4, 4, 12)
    config = config_of(1, {})
    same("kl", x[0], x[1][:, :1], "k3", grad=(0,))
    same("value", *x[:3], MASK[:1], 0.2, grad=(0,))
    same("whiten", x[0], MASK[:1])
    same("agg", x[0], MASK[:, :1], "token-mean", grad=(0,))
    same("policy", x[0], x[1], x[2][:, :1], MASK, "token-mean", config, grad=(1,))
    same("policy", x[0], x[1], x[2][:1], MASK, "token-mean", config, grad=(1,))
    same("policy", *x[:3], MASK, "token-mean", config, x[3][:, :1].exp(), grad=(1,))
    same("gae", (3 * x[0]).long(), x[1], MASK, 0.9, 0.8, where=MASK)
    same("gae", *x[:2], MASK, torch.tensor(0.9), torch.tensor(0.8), where=MASK)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", [
    dict(batch_num_tokens=0.5, global_batch_size=0.25), dict(batch_num_tokens=0,
                                                             global_batch_size=0),
    dict(batch_num_tokens=torch.tensor(7), global_batch_size=torch.tensor(0.5), dp_size=2),
    dict(batch_num_tokens=9, global_batch_size=3, loss_scale_factor=0.1),
    dict(global_batch_size=3, loss_scale_factor=0), dict(loss_scale_factor=torch.tensor(3.0))])
def test_counts_of_the_batch_whatever_they_are(mode, batch):
    x = torch.randn(4, 4, 12)
    same("agg", x[0], MASK, mode, grad=(0,), where=MASK, **batch)
    same("value", *x[:3], MASK, 0.3, mode, grad=(0,), where=MASK, **batch)
    same("policy", *x[:3], MASK, mode, config_of(1, batch), grad=(1,), where=MASK)


def test_counts_by_position():
    x = torch.randn(3, 4, 12)
    same("agg", x[0], MASK, "token-mean", 2, 50, grad=(0,))
    same("value", *x, MASK, 0.3, "seq-mean-token-sum-norm", 2, 50, 8, 100, grad=(0,))


@pytest.mark.parametrize("names", [
    dict(clip_ratio=0.0), dict(clip_ratio_low=0.0, clip_ratio_high=0.0), dict(clip_ratio_low=1.5),
    dict(clip_ratio_high=5.0), dict(clip_ratio_c=1.01), dict(clip_ratio_c=math.inf)])
def test_clips_at_the_ends_of_their_range(names):
    config = config_of(1, {})
    for name, value in names.items():
        object.__setattr__(config, name, value)
    x = torch.randn(3, 4, 12)
    same("policy", *x, MASK, "token-mean", config, grad=(1,))


def test_a_dual_clip_of_one_raises_verls_words():
    config = config_of(1, {})
    object.__setattr__(config, "clip_ratio_c", 1.0)
    with pytest.raises(AssertionError, match="clip_ratio_c for dual-clip PPO should be greater"):
        core_algos.compute_policy_loss_vanilla(*torch.randn(3, 4, 12), MASK, "token-mean", config)


@pytest.mark.parametrize("kind", [x + plus for x in ("kl", "k1", "abs", "mse", "k2", "low_var_kl",
                                                     "k3") for plus in ("", "+")])
def test_every_penalty_far_out_too(kind):
    x = torch.tensor([0.0, 1e-3, 1.0, -1.0, 3.0, -3.0, 30.0, -30.0, 1e4, -1e4])
    same("kl", x, torch.zeros(10), kind, grad=(0, 1))
    same("kl", torch.tensor([0.0, -math.inf]), torch.tensor([-math.inf, 0.0]), kind)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_an_empty_batch_is_no_error_and_no_nan(shape):
    x, mask = torch.zeros(4, *shape), torch.zeros(shape, dtype=torch.int64)
    assert core_algos.compute_value_loss(*x[:3], mask, 0.2)[0] == 0
    loss, metrics = core_algos.compute_policy_loss_vanilla(*x[:3], mask, "token-mean",
                                                           config_of(1, {}))
    assert loss == 0 and set(metrics.values()) == {0.0}
    for mode in MODES:
        assert core_algos.agg_loss(x[0], mask, mode) == 0
    assert core_algos.kl_penalty(x[0], x[1], "k3").shape == shape
    if shape[0] == 0:
        labels = torch.zeros(0, dtype=torch.int64)
        assert verl_F.logprobs_from_logits(x[0], labels).shape == (0,)
        assert verl_F.entropy_from_logits(x[0]).shape == (0,)
        assert FusedLinearForPPO.forward(LAYER, x[0], torch.ones(9, 5), labels)[0].shape == (0,)


def test_a_head_under_autocast_computes_in_its_dtype():
    """An fp32 head on bf16 states: autocast rounds the head for verl's product, and for ours."""
    (_, hidden, weight, labels), _ = arguments()["fused"]
    for given in (hidden, hidden.bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            found = called(FusedLinearForPPO.forward, (LAYER, given, weight, labels), (1, 2), {})
        exact = hidden.bfloat16().double(), weight.bfloat16().double()
        truth = called(STOCK.fused, (LAYER, *exact, labels), (1, 2), {})
        for x, true in zip(found[:2], truth[:2], strict=True):
            assert (x - true).abs().max() < 2e-5 * true.abs().max()
        for x, true in zip(found[2:], truth[2:], strict=True):
            assert (x - true).abs().max() < 0.02 * true.abs().max()


@pytest.mark.parametrize("name", ["entropy", "chunked"])
def test_the_entropy_is_compiled_and_checkpointed_as_verls_engine_does_it(name):
    logits = 3 * torch.randn(6, 50, requires_grad=True)
    compiled = torch.compile(function(name), dynamic=True, fullgraph=True, backend="aot_eager")
    for call in (compiled, lambda x: torch.utils.checkpoint.checkpoint(
            function(name), x, use_reentrant=False)):
        found, stock = call(logits), getattr(STOCK, name)(logits)
        torch.testing.assert_close(found, stock)
        for pair in zip(*(torch.autograd.grad(x.sum(), logits) for x in (found, stock)),
                        strict=True):
            torch.testing.assert_close(*pair)


def test_an_entropy_where_a_logit_is_minus_infinity():
    """verl's is NaN: 0 times infinity."""
    logits = torch.tensor([[0.0, -math.inf, 0.0]])
    assert STOCK.entropy(logits).isnan()
    assert verl_F.entropy_from_logits(logits).item() == pytest.approx(math.log(2))
