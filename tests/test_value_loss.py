"""`value_loss` against the textbook formula, at its edges, and as a citizen of PyTorch."""

import math

import _emulated
import pytest
import torch
from _loss_cases import (
    check_layouts,
    check_long_sequences,
    check_mixed_dtypes_and_nan,
    check_nothing_but_kernels,
    check_packed,
    check_poison,
    critic_eager,
    flat,
    hold_to_fp64,
    numbers,
)
from _loss_cases import critic_run as run
from _loss_cases import critic_sample as sample
from _matrix import third
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import tppo_kernels as tk
from tppo_kernels._core import record
from tppo_kernels._core.check import REDUCTIONS, Reduction
from tppo_kernels.ops.value_loss import reference
from tppo_kernels.ops.value_loss.reference import ValueLossCall, ValueLossGradient
from tppo_kernels.testing import (
    DTYPES,
    MASKS,
    POISONS,
    assert_accurate,
    assert_same_bits,
    count_graphs,
    pack,
    poisoned,
    sample_mask,
    strided,
)

_bwd = torch.ops.tppo_kernels.value_loss_bwd.default
_fwd = torch.ops.tppo_kernels.value_loss_fwd.default

SIZES = (1, 7, 63, 64, 65, 1000)


def textbook(x, mask, clip, reduction):
    """The formula token by token in fp64 scalars; the gradient is autograd's."""
    batch, tokens = x["values"].shape
    x = {name: value.double().requires_grad_(name == "values") for name, value in x.items()}
    sums, lengths = [], []
    for b in range(batch):
        terms = []
        for t in range(tokens):
            if mask is None or mask[b, t]:
                v, r, old = (x[name][b, t] for name in ("values", "returns", "old_values"))
                term = (v - r) ** 2
                if clip is not None:
                    term = torch.max(term, (old + (v - old).clamp(-clip, clip) - r) ** 2)
                terms.append(term / 2)
        sums.append(sum(terms))
        lengths.append(len(terms))
    sequences = max(1, sum(n > 0 for n in lengths))
    loss = {"token-mean": sum(sums) / max(1, sum(lengths)), "token-sum": sum(sums),
            "seq-mean-token-sum": sum(sums) / sequences,
            "seq-mean-token-mean": sum(s / max(1, n) for s, n in zip(
                sums, lengths, strict=True)) / sequences,
            "seq-mean-token-sum-norm": sum(sums) / max(1, tokens) / sequences}[reduction]
    loss = loss + 0 * x["values"].sum()
    loss.backward()
    return loss.detach(), x["values"].grad


def test_by_hand():
    """V = 1, 3, 1, 0 and R = 0, 0, 3, 1 from V_old = 0 with clip 0.5: V_clip = .5, .5, .5, 0.

    The losses are .5 max(1, .25), .5 max(9, .25), .5 max(4, 6.25), .5 * 1; the third is clipped.
    """
    values = torch.tensor([[1.0, 3.0, 1.0, 0.0]], requires_grad=True)
    returns, old = torch.tensor([[0.0, 0.0, 3.0, 1.0]]), torch.zeros(1, 4)
    loss, m = tk.value_loss(values, returns, old_values=old, clip=0.5)
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor((1 + 9 + 6.25 + 1) / 8))
    torch.testing.assert_close(values.grad, torch.tensor([[0.25, 0.75, 0.0, -0.25]]))
    assert float(m.clip_fraction) == 0.25 and float(m.tokens) == 4
    unclipped = tk.value_loss(values, returns, old_values=old).loss
    torch.testing.assert_close(unclipped, torch.tensor((1 + 9 + 4 + 1) / 8.0))
    variance = (returns - values.detach()).var() / returns.var()
    torch.testing.assert_close(m.explained_variance, 1 - variance)


@pytest.mark.parametrize("clip, reduction, kind", [
    (c, r, k) for c in (None, 0.0, 0.2) for r in REDUCTIONS for k in MASKS])
def test_textbook(clip, reduction, kind):
    x, mask = sample(3, 5, torch.float64, seed=len(reduction)), sample_mask(kind, 3, 5, seed=4)
    expected = textbook(x, mask, clip, reduction)
    got = run(x, mask, clip=clip, reduction=reduction)
    torch.testing.assert_close(got[:2], expected, rtol=1e-12, atol=1e-12)
    packed = {k: v.flatten() for k, v in x.items()}
    got = run(packed, None if mask is None else mask.flatten(), clip=clip, reduction=reduction,
              norm_length=5, cu_seqlens=torch.tensor([0, 5, 10, 15]).int())
    torch.testing.assert_close((got[0], got[1].reshape(3, 5)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction):
    x, mask = sample(3, 4, torch.float64, seed=1), sample_mask("interior", 3, 4)
    values = x.pop("values").requires_grad_()
    for clip in (None, 0.2):
        assert torch.autograd.gradcheck(lambda v, clip=clip: tk.value_loss(
            v, mask=mask, **x, clip=clip, reduction=reduction).loss, values)


@pytest.mark.parametrize("dtype, tokens, kind, layout", third(
    [(d, t, k, s) for d in DTYPES for t in SIZES for k in MASKS
     for s in ("contiguous", "strided")]))
def test_accuracy(dtype, tokens, kind, layout):
    """Against fp64 from the same inputs, judged by plain PyTorch in their own dtype."""
    x, mask = sample(4, tokens, dtype, seed=tokens), sample_mask(kind, 4, tokens)
    given_x = {k: strided(v) for k, v in x.items()} if layout == "strided" else x
    actual = run(given_x, mask, clip=0.2)
    exact = run({k: v.double() for k, v in x.items()}, mask, clip=0.2)
    eager = critic_eager(x, mask)
    assert_accurate(actual[0], exact[0], eager[0], name="loss")
    assert_accurate(actual[1], exact[1], eager[1], name="dvalues")
    assert actual[0].dtype == torch.float32 and actual[1].dtype == dtype


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("kind", ["left", "right", "interior", "row", "all-false"])
def test_poison(kind, poison):
    """Padding leaked into means and statistics: verl#3805."""
    x, mask = sample(4, 9, seed=3), sample_mask(kind, 4, 9, seed=2)
    for clip in (None, 0.2):
        clean, dirty = (run({k: poisoned(v, mask, p) for k, v in x.items()}, mask, clip=clip)
                        for p in (0.0, poison))
        assert_same_bits(tuple(dirty), tuple(clean))
        assert not dirty[1][~mask].any()
        assert all(v.isfinite().all() for v in (*dirty[:2], *dirty[2]))
    assert not run(x, mask, scale=math.inf)[1][~mask].any()


@pytest.mark.parametrize("name", ["values", "returns", "old_values"])
def test_nan_at_a_valid_token_shows(name):
    x = sample(2, 3)
    x[name][1, 1] = math.nan
    loss, gradient, m = run(x, clip=0.2)
    assert loss.isnan() and gradient[1, 1].isnan() and gradient[0].isfinite().all()
    assert name == "old_values" or m.explained_variance.isnan()


def test_where_the_branches_meet():
    """Within the clip V_clip is V: the clipped branch is never taken there by rounding."""
    x = sample(50, 200, seed=5)
    x["old_values"] = 100 * x["old_values"]  # V_old + (V - V_old) is not V
    got = run(x, clip=1e6)
    assert_same_bits(got[:2], run(x)[:2])
    assert not got[2].clip_count
    edge = {"values": torch.tensor([[1.0]]), "returns": torch.tensor([[3.0]]),
            "old_values": torch.tensor([[0.5]])}
    assert float(run(edge, clip=0.5)[1]) == -2.0 and float(run(edge, clip=0.25)[1]) == 0.0


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_micro_batches_add_up(reduction):
    """The mean of means is not the mean: trl#5375, verl#6957."""
    x, mask = sample(8, 11, seed=7), sample_mask("row", 8, 11, seed=7)
    counts = {"num_tokens": mask.sum(), "num_sequences": int(mask.any(1).sum()), "norm_length": 11}
    options = {"clip": torch.tensor(0.2), "reduction": reduction}
    whole = run(x, mask, **options)
    parts = [run({k: v[b:b + 1] for k, v in x.items()}, mask[b:b + 1], **counts, **options)
             for b in range(8)]
    torch.testing.assert_close((sum(p[0] for p in parts), torch.cat([p[1] for p in parts])),
                               whole[:2], rtol=1e-6, atol=1e-6)
    metrics = parts[0][2]
    for part in parts[1:]:
        metrics = metrics.merged(part[2])
    torch.testing.assert_close(tuple(metrics), tuple(whole[2]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics.explained_variance, whole[2].explained_variance)


def test_explained_variance():
    """Of the valid tokens only; far from 0; and 0, not noise, where the returns do not vary."""
    x, mask = sample(4, 50, seed=2), sample_mask("interior", 4, 50)
    r, v = x["returns"] + 1000, x["values"] + 1000
    exact = 1 - (r - v)[mask].double().var() / r[mask].double().var()
    got = tk.value_loss(v, r, mask).metrics.explained_variance
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=0)
    constant = torch.full((4, 50), 0.1)
    constant[2, 7] += 1e-8  # one bit of rounding is not variance
    assert constant.unique().numel() == 2
    assert tk.value_loss(v, constant).metrics.explained_variance == 0


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (3, 5)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_empty(shape, reduction):
    """Zero, attached, no NaN; requires_grad was lost in fused functions: verl#6913, Liger#968."""
    x, mask = sample(*shape), torch.zeros(shape, dtype=torch.bool)
    cu = (torch.arange(shape[0] + 1) * shape[1]).int()
    packed = {k: v.flatten() for k, v in x.items()}
    options = {"clip": 0.2, "reduction": reduction, "norm_length": 4}
    for loss, gradient, m in (run(x, mask, **options),
                              run(packed, mask.flatten(), cu_seqlens=cu, **options)):
        assert not loss and not gradient.any()
        assert not any(v.any() for v in (*m, m.explained_variance, m.clip_fraction))
        assert not any(v.any() for v in (*m.merged(m), m.merged(m).explained_variance))
    assert tk.value_loss(x["values"].requires_grad_(), x["returns"], mask).loss.requires_grad


def test_only_values_get_a_gradient():
    x = sample(2, 3)
    returns, old = x["returns"].clone().requires_grad_(), x["old_values"].clone().requires_grad_()
    out = tk.value_loss(x["values"], returns, old_values=old, clip=0.2)
    assert not out.loss.requires_grad
    values = x["values"].bfloat16().requires_grad_()
    out = tk.value_loss(values, returns, old_values=old, clip=0.2)
    out.loss.backward()
    assert values.grad.dtype == torch.bfloat16 and returns.grad is None and old.grad is None
    assert not any(m.requires_grad for m in out.metrics)
    with torch.no_grad():
        assert not tk.value_loss(values, returns).loss.requires_grad
    raw = ValueLossCall(x["values"], returns.detach(), None, None, None,
                        Reduction(None, None, None, "token-mean"), None, False)
    assert [t.numel() for t in _fwd(*record.flat(raw))] == [1, 0, 6, 1]
    expected = run(x, clip=0.2)
    with torch.inference_mode():
        assert_same_bits(tk.value_loss(**x, clip=0.2).loss, expected[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(run(x, clip=0.2), expected)


def test_a_derivative_that_is_not_computed_is_refused():
    """A second one, forward mode, a gradient through vmap: 0 or none would be taken for the truth.
    """
    x = sample(2, 3)

    def loss(values):
        return tk.value_loss(**{**x, "values": values}).loss

    leaf = x["values"].clone().requires_grad_()
    gradient, = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gradient.square().sum() + leaf.sum(), leaf)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        loss(forward_ad.make_dual(leaf.detach(), torch.ones(2, 3)))
    with pytest.raises(RuntimeError, match="autograd.Function with functorch"):
        torch.vmap(loss)(torch.stack([leaf, leaf]))


def test_scaled_strided_and_repeated_backward():
    """Strided gradients were read as contiguous: verl#6960."""
    x = sample(4, 6)
    base = torch.zeros(6, 8)
    base[:, ::2] = x["values"].T
    leaf = base.requires_grad_()
    loss = tk.value_loss(leaf[:, ::2].T, x["returns"]).loss
    (3.0 * loss).backward(retain_graph=True)
    expected = run(x)[1]
    torch.testing.assert_close(leaf.grad[:, ::2].T, 3 * expected)
    assert not leaf.grad[:, 1::2].any()
    loss.backward()
    torch.testing.assert_close(leaf.grad[:, ::2].T, 4 * expected)


def test_run_twice_and_layouts():
    x, lengths = sample(5, 13, seed=9), [13, 1, 0, 7, 12]
    mask = torch.arange(13) < torch.tensor(lengths)[:, None]
    options = {"clip": 0.2, "reduction": "seq-mean-token-mean"}
    padded = run(x, mask, **options)
    assert_same_bits(run(x, mask, **options), padded)
    got = run({k: pack(v, lengths)[0] for k, v in x.items()}, cu_seqlens=pack(mask, lengths)[1],
              **options)
    torch.testing.assert_close((*got[:2], tuple(got[2])), (
        padded[0], pack(padded[1], lengths)[0], tuple(padded[2])), rtol=1e-5, atol=1e-6)
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = run({k: v[order] for k, v in x.items()}, mask[order], **options)
    torch.testing.assert_close(shuffled[:2], (padded[0], padded[1][order]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("clip", [None, torch.tensor(0.2)])
def test_opcheck_and_no_host_read(clip, packed):
    x, mask = sample(3, 4), sample_mask("interior", 3, 4)
    cu = torch.tensor([0, 4, 8, 12]).int() if packed else None
    if packed:
        x, mask = {k: v.flatten() for k, v in x.items()}, mask.flatten()
    else:  # dense, but not in the order that the results have
        x, mask = {k: v.T.contiguous().T for k, v in x.items()}, mask.T.contiguous().T
    call = ValueLossCall(
        x["values"], x["returns"], mask, x["old_values"], clip,
        Reduction(torch.tensor(9), None, torch.tensor(3.0), "seq-mean-token-sum-norm"), cu, True)
    torch.library.opcheck(_fwd, record.flat(call))
    torch.library.opcheck(_fwd, record.flat(call._replace(grad=False)))
    torch.library.opcheck(_bwd, [torch.tensor(2.0), torch.tensor(0.5), x["values"],
                                 torch.float16])
    if not packed:  # a fake tensor raises where its value is read; segment_reduce has no fake
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = (mode.from_tensor(a) if isinstance(a, torch.Tensor) else a
                     for a in record.flat(call))
            assert reference.fwd(record.build(ValueLossCall, fakes))[1].shape == x["values"].shape


def test_compile_recompilation_and_export():
    """One graph for every length or clip: Liger#146, fla#533."""
    def loss(values, returns, mask, old_values, clip):
        return tk.value_loss(values, returns, mask, old_values=old_values, clip=clip)
    x, mask = sample(3, 6), sample_mask("interior", 3, 6)
    results = []
    for f in (loss, torch.compile(loss, fullgraph=True)):
        values = x["values"].bfloat16().requires_grad_()
        out = f(values, x["returns"], mask, x["old_values"], torch.tensor(0.2))
        out.loss.backward()
        results.append((out.loss.detach(), values.grad, tuple(out.metrics)))
    assert_same_bits(results[1], results[0])
    twice = torch.compile(lambda v, r: loss(v, r, mask, r, torch.tensor(0.2)), fullgraph=True)
    assert twice(x["values"].requires_grad_(), x["returns"]).loss.requires_grad
    calls = []
    for t in range(2, 52):
        x = sample(3, t)
        calls.append((x["values"].requires_grad_(), x["returns"], torch.ones(3, t).bool(),
                      x["old_values"], torch.tensor(t / 100)))
    assert count_graphs(loss, calls) <= 2

    class Loss(torch.nn.Module):
        def forward(self, values, returns):
            return tk.value_loss(values, returns).loss
    arguments = (x["values"].detach(), x["returns"])
    assert_same_bits(torch.export.export(Loss(), arguments).module()(*arguments),
                     Loss()(*arguments))


ONES = torch.ones(2, 3)
PACKED = {"values": torch.ones(6), "returns": torch.ones(6)}


@pytest.mark.parametrize("change, error, words", [
    ({"values": 1.0}, TypeError, "values is float 1.0, expected a tensor"),
    ({"values": torch.ones(6)}, ValueError, r"values .*\[6\]"),
    ({"returns": torch.ones(2)}, ValueError, r"returns .*\[2\].*\[2, 3\]"),
    ({"returns": torch.ones(2, 3).long()}, TypeError, "returns .*int64"),
    ({"mask": torch.ones(2, 3)}, TypeError, "mask .*float32.*bool"),
    ({"old_values": torch.ones(3, 2), "clip": 0.2}, ValueError, r"old_values .*\[3, 2\]"),
    ({"clip": 0.2}, ValueError, "old_values is None.*clip"),
    ({"clip": -0.2, "old_values": ONES}, ValueError, "clip is -0.2.*>= 0"),
    ({"clip": torch.tensor(-0.5), "old_values": ONES}, ValueError, "clip holds -0.5"),
    ({"clip": torch.ones(2), "old_values": ONES}, ValueError, "clip .*0-d"),
    ({"reduction": "sum"}, ValueError, "reduction is 'sum'.*'token-sum'"),
    ({"num_tokens": True}, TypeError, "num_tokens is bool True"),
    ({**PACKED, "cu_seqlens": torch.tensor([0, 6]).int(), "reduction": "seq-mean-token-sum-norm"},
     ValueError, "norm_length is None"),
    ({**PACKED, "cu_seqlens": torch.tensor([0, 4, 5]).int()}, ValueError, "cu_seqlens .*N = 6"),
    ({"cliprange": 0.2}, TypeError, "cliprange"),
])
def test_bad_input(change, error, words):
    with pytest.raises(error, match=words):
        tk.value_loss(**{"values": ONES, "returns": ONES, **change})


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 4), st.integers(0, 99),
       st.sampled_from([None, 0.2]))
def test_padding_and_shift_invariance(batch, tokens, more, seed, clip):
    x, mask = sample(batch, tokens, seed=seed), sample_mask("interior", batch, tokens, seed)
    got = run(x, mask, clip=clip)
    wide = {k: torch.cat([torch.full((batch, more), math.nan), v], 1) for k, v in x.items()}
    padded = run(wide, torch.cat([torch.zeros(batch, more).bool(), mask], 1), clip=clip)
    torch.testing.assert_close((padded[0], padded[1][:, more:]), got[:2], rtol=1e-5, atol=1e-6)
    x = {k: v.double() for k, v in x.items()}
    torch.testing.assert_close(run({k: v + 5 for k, v in x.items()}, mask, clip=clip)[:2],
                               run(x, mask, clip=clip)[:2], rtol=1e-9, atol=1e-9)


def check_compiled(shapes):
    cases = [(DTYPES[i % 3], t, MASKS[i % len(MASKS)], i % 2 == 1,
              (REDUCTIONS[i % 5], (None, 0.2, 0.0)[i % 3])) for i, t in enumerate(3 * shapes)]
    check_layouts(run, sample, cases, lambda v: {"reduction": v[0], "clip": v[1]})
    for reduction in REDUCTIONS:
        check_packed(run, sample, {"clip": 0.2, "reduction": reduction, "norm_length": 70})
    for poison in POISONS:
        check_poison(run, sample, poison, {"clip": 0.2})
    check_mixed_dtypes_and_nan(run, sample, {"clip": 0.2}, "values")
    hold_to_fp64(run, {k: v + 1000 for k, v in sample(4, 50).items()}, None, clip=0.2)


def test_cpp_holds_to_the_formula_of_the_reference():
    """Two writings of one formula would drift (Liger#1082, trl#7063); blocks are of 256 tokens."""
    with tk.use_backend("cpp"):
        check_compiled((1, 255, 256, 257, 700, 1000, 24, 64))


def test_cuda_kernel_emulated(monkeypatch):
    """csrc/value_loss.cu run on the CPU by a grid of four blocks: several sequences for each."""
    backend = _emulated.on_the_cpu(monkeypatch, "value_loss", "loss", "ppo_loss", "value_loss")
    x = sample(3, 5, torch.bfloat16)
    check_nothing_but_kernels(
        backend, ValueLossCall(
            x["values"], x["returns"], sample_mask("row", 3, 5), x["old_values"], *numbers(0.2),
            Reduction(None, None, None, "seq-mean-token-mean"), None, True),
        lambda *results: ValueLossGradient(*results, torch.bfloat16))
    check_compiled((1, 255, 256, 257, 1030, 24, 64))
    hold_to_fp64(run, sample(11, 600, seed=1), sample_mask("row", 11, 600), clip=0.2)
    check_long_sequences(monkeypatch, backend, run, sample, {"clip": 0.2})
    options = {"clip": 0.2, "num_tokens": torch.tensor(20)}
    expected = flat(run(sample(3, 9), **options))
    monkeypatch.setattr("tppo_kernels._kernels.losses.on_host", lambda x: False)
    torch.testing.assert_close(flat(run(sample(3, 9), **options)), expected)  # read by pointer
