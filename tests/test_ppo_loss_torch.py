"""`ppo_loss` as a citizen of PyTorch: autograd, the compiler, export, bad arguments."""

import math

import pytest
import torch
from _loss_cases import ALL_TERMS, terms_of
from _loss_cases import policy_run as run
from _loss_cases import policy_sample as sample
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import tppo_kernels as tk
from tppo_kernels._core import record
from tppo_kernels.ops.ppo_loss import reference
from tppo_kernels.ops.ppo_loss.reference import PolicyLossCall, PolicyLossGradient
from tppo_kernels.testing import assert_same_bits, count_graphs, sample_mask

_bwd = torch.ops.tppo_kernels.ppo_loss_bwd.default
_fwd = torch.ops.tppo_kernels.ppo_loss_fwd.default
RATIOS = ("token", "sequence")


def test_only_what_is_asked_for_gets_a_gradient():
    """A detached input costs nothing; entropy alone, and its bf16 gradient, are not dropped."""
    x = sample(2, 3)
    entropy = x["entropy"].bfloat16().requires_grad_()
    loss = tk.ppo_loss(x["logprobs"], x["old_logprobs"], x["advantages"], entropy=entropy,
                       entropy_coef=0.5).loss
    loss.backward()
    assert not any(m.requires_grad for m in run(x)[3])
    assert entropy.grad.dtype == torch.bfloat16
    torch.testing.assert_close(entropy.grad.float(), torch.full((2, 3), -0.5 / 6), rtol=4e-3,
                               atol=0)
    with torch.no_grad():
        assert not tk.ppo_loss(**{**x, "entropy": entropy}).loss.requires_grad
    call = PolicyLossCall(x["logprobs"], None, None, terms_of(x["old_logprobs"], x["advantages"]),
                          False, False)
    assert [t.numel() for t in _fwd(*record.flat(call))] == [1, 0, 0, 11, 1]
    old = x["old_logprobs"].requires_grad_()
    assert not tk.ppo_loss(x["logprobs"], old, x["advantages"]).loss.requires_grad
    expected = run(sample(2, 3), **ALL_TERMS)
    with torch.inference_mode():
        assert_same_bits(tk.ppo_loss(**sample(2, 3), **ALL_TERMS).loss, expected[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(run(sample(2, 3), **ALL_TERMS), expected)
    rollout = {}
    with torch.inference_mode():
        rollout.update(sample(2, 3), mask=torch.ones(2, 3, dtype=torch.bool))
    lp = torch.zeros(2, 3, requires_grad=True)
    tk.ppo_loss(**{**rollout, "logprobs": lp}).loss.backward()
    assert lp.grad.any()


def test_a_derivative_that_is_not_computed_is_refused():
    """A second one, forward mode, a gradient through vmap: 0 or none would be taken for the truth.
    """
    x = sample(2, 3)

    def loss(logprobs):
        return tk.ppo_loss(**{**x, "logprobs": logprobs}).loss

    leaf = x["logprobs"].clone().requires_grad_()
    gradient, = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    assert_same_bits(gradient.detach(), run(x)[1])
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gradient.square().sum() + leaf.sum(), leaf)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.functional.hessian(loss, leaf.detach())
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        loss(forward_ad.make_dual(leaf.detach(), torch.ones(2, 3)))
    both = torch.stack([leaf.detach(), 2 * leaf.detach()])
    for call in (lambda: torch.vmap(loss)(both.requires_grad_()),
                 lambda: torch.func.grad(loss)(leaf.detach()),
                 lambda: torch.func.jvp(loss, (leaf.detach(),), (torch.ones(2, 3),))):
        with pytest.raises(RuntimeError, match="autograd.Function with functorch"):
            call()
    assert_same_bits(torch.vmap(loss)(both.detach()), torch.stack([loss(b) for b in both.detach()]))


def test_scaled_strided_and_repeated_backward():
    """Strided gradients were read as contiguous: verl#6960."""
    x = sample(4, 6)
    base = torch.zeros(6, 8)
    base[:, ::2] = x["logprobs"].T
    leaf = base.requires_grad_()
    loss = tk.ppo_loss(**{**x, "logprobs": leaf[:, ::2].T}, entropy_coef=0.1).loss
    (3.0 * loss).backward(retain_graph=True)
    expected = run(x, entropy_coef=0.1)[1]
    torch.testing.assert_close(leaf.grad[:, ::2].T, 3 * expected)
    assert not leaf.grad[:, 1::2].any()
    loss.backward()
    torch.testing.assert_close(leaf.grad[:, ::2].T, 4 * expected)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ratio", RATIOS)
def test_opcheck_and_no_host_read(ratio, packed):
    x, mask = sample(3, 4), sample_mask("interior", 3, 4)
    cu = torch.tensor([0, 4, 8, 12]).int() if packed else None
    if packed:
        x, mask = {k: v.flatten() for k, v in x.items()}, mask.flatten()
    else:  # dense, but not in the order that the results have
        x, mask = {k: v.T.contiguous().T for k, v in x.items()}, mask.T.contiguous().T
    terms = terms_of(x["old_logprobs"], x["advantages"], x["ref_logprobs"], x["weights"],
                     dual_clip=2.0, num_tokens=9, cu_seqlens=cu, ratio=ratio, kl_estimator="k3+",
                     reduction="seq-mean-token-mean")
    call = PolicyLossCall(x["logprobs"], x["entropy"], mask, terms, True, True)
    arguments = record.flat(call)
    torch.library.opcheck(_fwd, arguments)
    torch.library.opcheck(_fwd, (*arguments[:-2], False, False))
    torch.library.opcheck(_bwd, record.flat(PolicyLossGradient(
        torch.tensor(2.0), torch.tensor(0.5), x["logprobs"], x["entropy"], torch.bfloat16,
        torch.float32)))
    if not packed:  # a fake tensor raises where its value is read; segment_reduce has no fake
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
            fake = record.build(PolicyLossCall, fakes)
            assert reference.fwd(fake)[1].shape == x["logprobs"].shape


def test_compile_fullgraph_forward_and_backward():
    """Inputs that are one tensor (old = reference, advantages = weights) included."""
    x, mask, clip = sample(3, 6), sample_mask("interior", 3, 6), torch.tensor(0.2)

    def loss(logprobs, entropy, old, advantages):
        return tk.ppo_loss(logprobs * 1.0, old, advantages, mask, entropy=entropy,
                           weights=advantages, ref_logprobs=old, clip_low=clip,
                           clip_high=clip, **ALL_TERMS)
    results = []
    for f in (loss, torch.compile(loss, fullgraph=True)):
        lp, h = x["logprobs"].bfloat16().requires_grad_(), x["entropy"].clone().requires_grad_()
        out = f(lp, h, x["old_logprobs"], x["advantages"])
        out.loss.backward()
        results.append((out.loss.detach(), lp.grad, h.grad, tuple(out.metrics)))
    assert_same_bits(results[1], results[0])


def test_recompilation():
    """One graph for every length or coefficient: Liger#146, fla#533."""
    def loss(x, mask, clip, coef, count):
        return tk.ppo_loss(mask=mask, **x, clip_low=clip, clip_high=clip, entropy_coef=coef,
                           num_tokens=count).loss
    calls = [({k: v.requires_grad_(k == "logprobs") for k, v in sample(3, t).items()},
              torch.ones(3, t, dtype=torch.bool), torch.tensor(0.1 + t / 100),
              torch.tensor(t / 100), torch.tensor(t)) for t in range(2, 52)]
    assert count_graphs(loss, calls) <= 2
    assert count_graphs(loss, [(*c[:4], 3 + i) for i, c in enumerate(calls)]) <= 3


def test_export():
    class Loss(torch.nn.Module):
        def forward(self, logprobs, old, advantages, mask):
            return tk.ppo_loss(logprobs, old, advantages, mask).loss
    x = sample(3, 4)
    arguments = (x["logprobs"], x["old_logprobs"], x["advantages"], torch.ones(3, 4) > 0)
    exported = torch.export.export(Loss(), arguments).module()
    assert_same_bits(exported(*arguments), Loss()(*arguments))
ONES = torch.ones(2, 3)
CU = torch.tensor([0, 2, 6]).int()
PACKED = {"logprobs": torch.ones(6), "old_logprobs": torch.ones(6), "advantages": torch.ones(6)}


@pytest.mark.parametrize("change, error, words", [
    ({"logprobs": [1.0]}, TypeError, "logprobs .*list.* expected a tensor"),
    ({"logprobs": torch.ones(2, 3, 1)}, ValueError, r"logprobs .*\[2, 3, 1\]"),
    ({"old_logprobs": torch.ones(2, 4)}, ValueError, r"old_logprobs .*\[2, 4\].*\[2, 3\]"),
    ({"old_logprobs": torch.ones(2, 3).int()}, TypeError, "old_logprobs .*int32"),
    ({"advantages": torch.ones(3)}, ValueError, r"advantages .*\[3\].*B = 2|advantages .*\[3\]"),
    ({"advantages": torch.ones(2, 2)}, ValueError, r"advantages .*\[2, 2\]"),
    ({"mask": torch.ones(2, 3)}, TypeError, "mask .*float32.*bool"),
    ({"mask": torch.ones(2, 2).bool()}, ValueError, r"mask .*\[2, 2\]"),
    ({"entropy": torch.ones(2)}, ValueError, r"entropy .*\[2\]"),
    ({"ref_logprobs": torch.ones(3, 2)}, ValueError, r"ref_logprobs .*\[3, 2\]"),
    ({"weights": torch.ones(4)}, ValueError, r"weights .*\[4\]"),
    ({"clip_low": -0.1}, ValueError, "clip_low is -0.1.*>= 0"),
    ({"clip_high": math.nan}, ValueError, "clip_high is nan"),
    ({"clip_high": torch.tensor(-1.0)}, ValueError, "clip_high holds -1"),
    ({"clip_low": "x"}, TypeError, "clip_low .*'x'"),
    ({"dual_clip": 1.0}, ValueError, "dual_clip is 1.0.*> 1"),
    ({"dual_clip": torch.tensor(0.5)}, ValueError, "dual_clip holds 0.5"),
    ({"max_log_ratio": 0.0}, ValueError, "max_log_ratio is 0.0.*> 0"),
    ({"ratio": "tokens"}, ValueError, "ratio is 'tokens'.*'sequence'"),
    ({"kl_estimator": "k4"}, ValueError, "kl_estimator is 'k4'.*'k3\\+'"),
    ({"reduction": "mean"}, ValueError, "reduction is 'mean'.*'token-mean'"),
    ({"entropy_coef": 0.1}, ValueError, "entropy is None.*entropy_coef is 0.1"),
    ({"kl_coef": 0.1}, ValueError, "ref_logprobs is None.*kl_coef is 0.1"),
    ({"kl_coef": torch.tensor(0.1)}, ValueError, "ref_logprobs is None.*kl_coef is 0.1"),
    ({"kl_coef": None}, TypeError, "kl_coef is NoneType"),
    ({"num_tokens": 1.5}, TypeError, "num_tokens is float 1.5.*whole"),
    ({"num_tokens": -1}, ValueError, "num_tokens is -1"),
    ({"num_sequences": torch.ones(2)}, ValueError, "num_sequences .*0-d"),
    ({**PACKED, "cu_seqlens": CU, "reduction": "seq-mean-token-sum-norm"}, ValueError,
     "norm_length is None"),
    ({**PACKED, "cu_seqlens": CU[:2]}, ValueError, "cu_seqlens .*N = 6"),
    ({**PACKED, "cu_seqlens": CU.long()}, TypeError, "cu_seqlens .*int64"),
    ({"clip": 0.2}, TypeError, "clip"),
])
def test_bad_input(change, error, words):
    arguments = {"logprobs": ONES, "old_logprobs": ONES, "advantages": ONES, **change}
    with pytest.raises(error, match=words):
        tk.ppo_loss(**arguments)
