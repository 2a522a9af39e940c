"""OpenRLHF from the index against `tppo_kernels.integrations.openrlhf`.

vllm, flash-attn and deepspeed are compiled for a GPU, and OpenRLHF imports them: empty modules
stand for them, which no function that is compared here touches.
"""

import os
import re
import subprocess
import sys
from importlib.machinery import ModuleSpec
from importlib.metadata import files, version
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from _speed import compared, with_backward

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


HALVES = torch.float16, torch.bfloat16
MASK = (torch.arange(12) < torch.tensor([[12], [5], [9], [2]])).long()


def called(function, args, grad):
    """Results, and gradients of the first with respect to the arguments that `grad` lists."""
    args = [x.detach().requires_grad_(i in grad) if torch.is_tensor(x) and x.is_floating_point()
            else x for i, x in enumerate(args)]
    results = function(*args)
    results = [x for x in (results if isinstance(results, tuple) else (results,)) if x is not None]
    if grad:
        first = results[0].float()
        (first * torch.linspace(1, 2, first.numel()).view(first.shape)).sum().backward()
    return [x.detach().double() for x in results] + [args[i].grad for i in grad]


def arguments(dtype=torch.float32, mask=MASK):
    """Each function by the name in STOCK: ours, positional arguments, those with gradients."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, *mask.shape, generator=g).to(dtype)
    logits = 3 * torch.randn(6, 50, generator=g).to(dtype)
    labels = torch.randint(0, 50, (6,), generator=g)
    return {
        "gae": (ours.get_advantages_and_returns, (None, x[0], x[1], mask, 0.99, 0.95), ()),
        "policy": (ours.policy_loss_forward, (PolicyLoss(dual_clip=3.0), *x, mask), (1,)),
        "value": (ours.value_loss_forward, (ValueLoss(0.3), *x, mask), (1,)),
        "logprobs": (ours.log_probs_from_logits, (logits, labels), (0,))}


def same(name, function, args, grad, bound=5e-6):
    for found, stock in zip(called(function, args, grad),
                            called(getattr(STOCK, name), args, grad), strict=True):
        torch.testing.assert_close(found, stock, rtol=bound, atol=bound)


@pytest.mark.parametrize("name", sorted(arguments()))
def test_strided_inputs(name):
    function, args, grad = arguments()[name]
    same(name, function, [x.mT.contiguous().mT if torch.is_tensor(x) and x.dim() > 1 else x
                          for x in args], grad)


@pytest.mark.parametrize("name", sorted(arguments()))
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_nearer_to_the_truth_than_openrlhfs(name, dtype):
    function, args, grad = arguments(dtype)[name]
    exact = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in args]
    for found, stock, true in zip(called(function, args, grad),
                                  called(getattr(STOCK, name), args, grad),
                                  called(getattr(STOCK, name), exact, grad), strict=True):
        error, theirs = ((x.double() - true).abs().max() for x in (found, stock))
        assert error <= theirs + 1e-6 * true.abs().max().clamp(min=1)


@pytest.mark.parametrize("name", ["policy", "value"])
def test_gradients_with_respect_to_what_is_data_to_us(name):
    function, args, _ = arguments()[name]
    same(name, function, args, (1, 2, 3))


@pytest.mark.parametrize("weighting", [2 * MASK, 0.5 * MASK, MASK + (torch.arange(12) == 1)])
@pytest.mark.parametrize("name", ["gae", "policy", "value"])
def test_a_mask_that_weights_is_openrlhfs(name, weighting):
    function, args, grad = arguments(mask=weighting)[name]
    same(name, function, args, grad, bound=0)


def test_tensors_that_broadcast_and_counts_by_position():
    x = torch.randn(3, 4, 12)
    policy, value = PolicyLoss(), ValueLoss(0.3)
    same("policy", ours.policy_loss_forward, (policy, x[0], x[1], x[2][:, :1], MASK), (1,))
    same("value", ours.value_loss_forward, (value, *x, MASK[:1]), (1,))
    same("gae", ours.get_advantages_and_returns, (None, x[0], x[1], MASK[:1], 0.9, 0.8), ())
    same("gae", ours.get_advantages_and_returns, (None, x[0], x[1].long(), MASK, 0.9, 0.8), ())
    same("policy", ours.policy_loss_forward, (policy, *x, MASK, None, 2, 0.5), (1,))
    same("value", ours.value_loss_forward, (value, *x, MASK, 2, torch.tensor(9.0)), (1,))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_an_empty_batch_is_no_error_and_no_nan(shape):
    x, mask = torch.zeros(3, *shape), torch.zeros(shape, dtype=torch.int64)
    assert ValueLoss()(*x, mask) == 0 and PolicyLoss()(*x, mask)[0] == 0
    for found in ours.get_advantages_and_returns(None, *x[:2], mask, 1.0, 0.95):
        assert found.shape == shape
    if shape[0] == 0:
        assert utils.log_probs_from_logits(x[0], torch.zeros(0, dtype=torch.int64)).shape == (0,)


SIZES = {"64 x 2048": (64, 2048, 256, 32000), "8 x 256": (8, 256, 64, 1000)}


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", sorted(arguments()))
def test_nothing_is_slower_than_openrlhfs(capsys, name, size):
    b, t, rows, v = SIZES[size]
    mask = (torch.arange(t) < torch.randint(2, t, (b, 1))).long()
    function, args, grad = arguments(mask=mask)[name]
    if name == "logprobs":
        args = torch.randn(rows, v), torch.randint(0, v, (rows,))
    at = grad[0] if grad else None

    def call(which):
        def of(*leaf):
            found = which(*(leaf[0] if i == at else x for i, x in enumerate(args)))
            return found[0] if name == "policy" else found  # beside its figures
        return with_backward(of, *([] if at is None else [args[at]]))

    times = compared(capsys, f"{name}, {size}", call(getattr(STOCK, name)), call(function),
                     seconds=4.0 if name == "gae" else 1.0)  # one call of theirs takes 40 ms
    if name == "gae" and size == "64 x 2048":
        assert times >= 50


# OpenRLHF's own tests that reach these functions, which its wheel brings. They load its files under
# names of their own; as soon as such a file has run, ours stand in it.
OWN = ["test_loss_aggregation.py", "test_reward_shaping.py", "test_actor_entropy_temperature.py",
       "test_kl_estimator_gradient.py"]
COUNTS = """
import functools, importlib.machinery, sys
from unittest.mock import MagicMock
how, *arguments = sys.argv[1:]
def stand_ins(names):
    for name in names:
        sys.modules[name] = MagicMock(__spec__=importlib.machinery.ModuleSpec(name, None))
absent = """ + repr(ABSENT) + """
stand_ins(absent)
import pytest
from tppo_kernels.integrations import openrlhf as ours
ours.patch()
for name in [n for n in sys.modules if n in absent or n.split(".")[0] == "openrlhf"]:
    del sys.modules[name]
stand_ins(["deepspeed"])
calls = {}
def counted(f):
    @functools.wraps(f)
    def call(*args, **kwargs):
        calls[f.__name__] = calls.get(f.__name__, 0) + 1
        return f(*args, **kwargs)
    return call
places = {"/".join(name.split(":")[0].split(".")[1:]) + ".py": [] for part in ours._PARTS.values()
          for name in part.ours}
for part in ours._PARTS.values():
    for name, f in part.ours.items():
        module, path = name.split(":")
        places["/".join(module.split(".")[1:]) + ".py"].append((path.split("."), counted(f)))
execute = importlib.machinery.SourceFileLoader.exec_module
def exec_module(self, module):
    execute(self, module)
    for file, names in places.items():
        if how == "patched" and str(module.__file__).endswith("openrlhf/" + file):
            for path, f in names:
                setattr(functools.reduce(getattr, path[:-1], module), path[-1], f)
importlib.machinery.SourceFileLoader.exec_module = exec_module
code = pytest.main(["-q", "-p", "no:cacheprovider", *arguments])
print("CALLS", calls)
sys.exit(code)
"""


@pytest.mark.slow
def test_openrlhfs_own_tests_pass_stock_and_patched(tmp_path):
    (tmp_path / "tests").mkdir()
    brought = {Path(str(f)).name: f.locate() for f in files("openrlhf")
               if str(f).startswith("tests/") and str(f).endswith(".py")}
    for name, path in brought.items():
        (tmp_path / "tests" / name).write_text(Path(path).read_text())
    (tmp_path / "openrlhf").symlink_to(Path(utils.__file__).parents[1])
    totals, own = {}, [str(tmp_path / "tests" / name) for name in OWN]
    for how in ("stock", "patched"):
        done = subprocess.run([sys.executable, "-c", COUNTS, how, f"--rootdir={tmp_path}", *own],
                              cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ))
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        totals[how] = re.search(r"\d+ passed", done.stdout)[0]
        calls = next(x for x in done.stdout.splitlines() if x.startswith("CALLS"))
        print(how, totals[how], calls)
        for function in ("get_advantages_and_returns", "policy_loss_forward",
                         "log_probs_from_logits"):
            assert (function in calls) is (how == "patched"), calls
    assert totals["stock"] == totals["patched"]


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
