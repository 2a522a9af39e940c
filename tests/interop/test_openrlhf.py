"""OpenRLHF from the index against `tppo_kernels.integrations.openrlhf`.

vllm, flash-attn and deepspeed are compiled for a GPU, and OpenRLHF imports them: empty modules
stand for them, which no function that is compared here touches.
"""

import subprocess
import sys
import time
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

ABSENT = ("vllm", "vllm.inputs", "vllm.utils", "flash_attn", "flash_attn.bert_padding",
          "flash_attn.utils", "flash_attn.utils.distributed", "deepspeed", "deepspeed.ops",
          "deepspeed.ops.adam", "deepspeed.runtime", "deepspeed.runtime.zero",
          "deepspeed.runtime.zero.partition_parameters", "deepspeed.utils", "deepspeed.checkpoint",
          "deepspeed.checkpoint.utils", "deepspeed.runtime.zero.offload_config")
for name in ABSENT:
    sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None))

from openrlhf.models import PolicyLoss, ValueLoss, actor, utils  # noqa: E402
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker  # noqa: E402

from tppo_kernels.integrations import openrlhf as ours  # noqa: E402

CASES = 500
STOCK = SimpleNamespace(gae=RemoteExperienceMaker.get_advantages_and_returns,
                        policy=PolicyLoss.forward, value=ValueLoss.forward,
                        logprobs=utils.log_probs_from_logits)


@pytest.fixture(autouse=True)
def patched():
    ours.patch()
    yield
    ours.unpatch()
    assert RemoteExperienceMaker.get_advantages_and_returns is STOCK.gae
    assert PolicyLoss.forward is STOCK.policy and actor.log_probs_from_logits is STOCK.logprobs


def test_the_environment_holds_the_version_that_it_is_named_for():
    assert version("openrlhf") == "0.11.2"


def cases():
    """Gaps, empty rows, padding on both sides, one valid token in all; bool, int64, fp32 masks."""
    for case in range(CASES):
        g = torch.Generator().manual_seed(case)
        b, t = (int(torch.randint(1, 7, (), generator=g)),
                int(torch.randint(2, 40, (), generator=g)))
        kind = case % 5
        mask = torch.rand(b, t, generator=g) < 0.6
        if kind in (1, 3):
            mask = torch.arange(t) < torch.randint(1, t + 1, (b, 1), generator=g)
        if kind == 2:
            mask = torch.arange(t) >= torch.randint(0, t, (b, 1), generator=g)
        if kind == 3 and b > 1:
            mask[::2] = False
        if kind == 4:
            mask[:] = False
        mask[-1, t // 2] = True
        yield case, mask.to((torch.int64, torch.bool, torch.float32)[case // 5 % 3]), g


def near(found, stock, truth):
    """Within 1e-6, of the larger of 1 and the largest stock value, and of OpenRLHF's own error in
    fp32, which is its distance from itself in fp64."""
    found, stock, truth = (torch.as_tensor(x).double() for x in (found, stock, truth))
    if stock.numel():
        beyond = (found - stock).abs() - (stock - truth).abs().max()
        assert beyond.max() <= 1e-6 * stock.abs().max().clamp(min=1)


def test_gae_equals_openrlhfs_at_every_slot():
    for case, mask, g in cases():
        x = torch.randn(2, *mask.shape, generator=g)
        rest = [None if case % 11 == 0 else mask, (1.0, 0.99)[case % 2], (0.95, 1.0, 0.0)[case % 3]]
        found = RemoteExperienceMaker.get_advantages_and_returns(None, *x, *rest)
        stock, truth = STOCK.gae(None, *x, *rest), STOCK.gae(None, *x.double(), *rest)
        for triple in zip(found, stock, truth, strict=True):
            near(*triple)


def batch_of(case, mask):
    """None; counts of the whole batch; and those of two ranks and four steps, below 1 too."""
    if case % 3 == 0:
        return {}
    tokens, rows = float(mask.sum()), float((mask.sum(1) > 0).sum())
    if case % 3 == 1:
        return dict(batch_num_tokens=torch.tensor(tokens + 3), global_batch_size=torch.tensor(rows))
    return dict(dp_size=2, batch_num_tokens=torch.tensor(tokens / 4),
                global_batch_size=torch.tensor(rows / 4))


def three(found, stock, leaf, *args, **kwargs):
    """Results and the gradient of the first, by ours, theirs, and theirs in fp64."""
    results = []
    for function, dtype in ((found, torch.float32), (stock, torch.float32),
                            (stock, torch.float64)):
        x = leaf.to(dtype, copy=True).requires_grad_()
        out = function(x, *[a.to(dtype) if torch.is_tensor(a) else a for a in args], **kwargs)
        out = [o for o in (out if isinstance(out, tuple) else (out,)) if o is not None]
        out[0].backward()
        results.append([o.detach() for o in out] + [x.grad])
    assert len({len(r) for r in results}) == 1
    for triple in zip(*results, strict=True):
        near(*triple)


@pytest.mark.parametrize("token_level", [True, False])
def test_the_policy_loss_its_gradient_and_its_figures_equal_openrlhfs(token_level):
    for case, mask, g in cases():
        old = -2 * torch.rand(mask.shape, generator=g)
        new = old + (20 if case % 50 == 0 else 0.5) * torch.randn(mask.shape, generator=g)
        layer = PolicyLoss(0.2, (0.2, 0.3)[case % 2], (None, 1.5)[case // 2 % 2], token_level)
        three(layer.forward, lambda *a, s=layer, **k: STOCK.policy(s, *a, **k), new, old,
              torch.randn(mask.shape, generator=g), action_mask=mask, **batch_of(case, mask))


@pytest.mark.parametrize("token_level", [True, False])
def test_the_value_loss_and_its_gradient_equal_openrlhfs(token_level):
    for case, mask, g in cases():
        old, returns, step = torch.randn(3, *mask.shape, generator=g)
        layer = ValueLoss((None, 0.3)[case % 2], token_level)
        three(layer.forward, lambda *a, s=layer, **k: STOCK.value(s, *a, **k), old + 0.5 * step,
              old, returns, action_mask=mask, **batch_of(case, mask))


def test_log_probs_equal_openrlhfs():
    assert actor.log_probs_from_logits is ours.log_probs_from_logits
    for case in range(CASES):
        g = torch.Generator().manual_seed(case)
        shape = [(7, 33), (2, 5, 33), (1, 1, 2), (3, 1000)][case % 4]
        labels = torch.randint(0, shape[-1], shape[:-1], generator=g)
        weights = torch.randn(shape[:-1], generator=g)

        def total(f, x, labels=labels, weights=weights, t=(1.0, 0.7)[case % 2]):
            kept = f(x * 1.0, labels, t)  # a temperature divides what it is given in place
            return (kept.double() * weights).mean(), kept  # the mean's rounding is neither's

        three(lambda x, f=total: f(utils.log_probs_from_logits, x),
              lambda x, f=total: f(STOCK.logprobs, x), 3 * torch.randn(shape, generator=g))
    logits = torch.ones(1, 3)
    utils.log_probs_from_logits(logits, torch.zeros(1, dtype=torch.int64), 2.0)
    assert logits.tolist() == [[0.5, 0.5, 0.5]]


def test_what_is_not_ours_to_answer_is_openrlhfs():
    x = torch.randn(4, 2, 5)
    for layer, mask in ((PolicyLoss(policy_loss_type="gspo"), torch.ones(2, 5)),
                        (PolicyLoss(is_correction_level="token"), torch.ones(2, 5)),
                        (PolicyLoss(), torch.full((2, 5), 0.5)), (PolicyLoss(), None)):
        found = layer(*x[:3], action_mask=mask, rollout_log_probs=x[3])
        stock = STOCK.policy(layer, *x[:3], action_mask=mask, rollout_log_probs=x[3])
        assert all(a is b or torch.equal(a, b) for a, b in zip(found, stock, strict=True))
    assert torch.equal(ValueLoss()(*x[:3]), STOCK.value(ValueLoss(), *x[:3]))


def test_a_batch_without_a_token_gives_no_nan():
    x, mask = torch.randn(3, 2, 5), torch.zeros(2, 5, dtype=torch.int64)
    assert STOCK.value(ValueLoss(), *x, mask).isnan() and ValueLoss()(*x, mask) == 0


def test_gae_is_fifty_times_faster():
    b, t = 64, 2048
    values, rewards = torch.randn(2, b, t)
    mask = (torch.arange(t) < torch.randint(2, t, (b, 1))).long()
    times = {}
    for _ in range(5):  # interleaved
        for name, function in (("stock", STOCK.gae), ("ours", ours.get_advantages_and_returns)):
            start = time.perf_counter()
            function(None, values, rewards, mask, 1.0, 0.95)
            times.setdefault(name, []).append(time.perf_counter() - start)
    stock, found = (sorted(x)[2] for x in times.values())
    print(f"GAE {b} x {t}: {1e3 * stock:.1f} ms stock, {1e3 * found:.2f} ms ours")
    assert stock > 50 * found


def test_the_hook_of_ray_patches_what_a_new_process_imports():
    code = ("import sys\nfrom importlib.machinery import ModuleSpec\n"
            "from unittest.mock import MagicMock\n"
            f"for n in {ABSENT}:\n"
            "    sys.modules[n] = MagicMock(__spec__=ModuleSpec(n, None))\n"
            f"import importlib\nmodule, _, name = {ours.HOOK!r}.rpartition('.')\n"
            "getattr(importlib.import_module(module), name)()\n"
            "from openrlhf.models import PolicyLoss\nprint(PolicyLoss.forward.__module__)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().endswith("tppo_kernels.integrations.openrlhf"), done.stderr
    assert "PolicyLoss, ValueLoss and log_probs_from_logits are ours" in done.stderr
