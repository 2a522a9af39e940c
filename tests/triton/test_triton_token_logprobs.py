"""`token_logprobs` in Triton against fp64, interpreted."""

import itertools
import math

import numpy as np
import pytest
import torch
from _matrix import third
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

import tppo_kernels as tk
from tppo_kernels._math.linear import Scaling
from tppo_kernels.ops.token_logprobs import _triton
from tppo_kernels.ops.token_logprobs.reference import TokenLogprobsCall, TokenLogprobsGradient
from tppo_kernels.testing import (
    DTYPES,
    MASKS,
    POISONS,
    assert_accurate,
    assert_same_bits,
    poisoned,
    sample_mask,
    strided,
)

INF = float("inf")
# numpy speaks of infinities in lanes whose results are selected away
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def _one_rounding(monkeypatch):
    """A fused multiply-add rounds once, which the interpreter's does not."""
    def fma(self, x, y, z):
        wide = x.data.astype(np.float64) * y.data + z.data
        return TensorHandle(wide.astype(x.data.dtype), x.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fma", fma)


@pytest.fixture
def small(monkeypatch):
    """Tiles of 512 columns in 16 bits, 256 in 32, so that few columns are several tiles."""
    monkeypatch.setattr(_triton, "WARPS", 1)
    monkeypatch.setattr(_triton, "UNROLL", 2)


def sample(shape, V, dtype=torch.float32, seed=0, kind="none"):
    g = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(*shape, V, generator=g, dtype=torch.float64)).to(dtype)
    mask = sample_mask(kind, 1, math.prod(shape), seed)
    g_lp, g_ent = torch.randn(2, *shape, generator=g)
    targets = torch.randint(0, V, shape, generator=g)
    return logits, targets, mask if mask is None else mask.reshape(shape), g_lp, g_ent


def run(backend, logits, targets, mask, g_lp, g_ent, **kwargs):
    """(logprobs, entropy, gradient)."""
    leaf = logits.detach().requires_grad_()
    with tk.use_backend(backend):
        out = tk.token_logprobs(leaf, targets, mask, **kwargs)
        chosen = [(x, g) for x, g in zip(out, (g_lp, g_ent), strict=True) if g is not None]
        grad = torch.autograd.grad([x for x, _ in chosen], leaf, [g for _, g in chosen])
    return *(x.detach() for x in out), grad[0]


def plain(logits, targets, mask, g_lp, g_ent, *, temperature=1.0, softcap=None, logit_scale=1.0,
          valid_vocab=None):
    """What users write, in fp32; the gradient in the dtype of the logits."""
    leaf = logits.float().requires_grad_()
    z = leaf[..., :valid_vocab] * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    if isinstance(temperature, torch.Tensor) and temperature.dim():
        temperature = temperature[..., None]
    log_p = (z / temperature).log_softmax(-1)
    logprobs = log_p.gather(-1, targets[..., None].long())[..., 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    if mask is not None:
        logprobs, entropy = (torch.where(mask, x, 0) for x in (logprobs, entropy))
    total = (0 if g_lp is None else (logprobs * g_lp).sum()) + (
        0 if g_ent is None else (entropy * g_ent).sum())
    grad = torch.autograd.grad(total, leaf)[0]
    return logprobs.detach(), entropy.detach(), grad.to(logits.dtype)


def hold(logits, *arguments, layout=lambda x: x, name="", **kwargs):
    exact = run("reference", logits.double(), *arguments, **kwargs)
    actual = run("triton", layout(logits), *arguments, **kwargs)
    for what, a, x, e in zip(("logprobs", "entropy", "gradient"), actual, exact,
                             plain(logits, *arguments, **kwargs), strict=True):
        assert a.dtype == (logits.dtype if what == "gradient" else torch.float32)
        assert_accurate(a, x, e, name=f"{what} {name}")
    return actual


def sliced(x):
    """As full[:, P - 1:-1]: with an odd V, it begins at no address divisible by 16."""
    if x.dim() < 2:
        return x
    wide = torch.full((*x.shape[:-2], x.shape[-2] + 3, x.shape[-1]), 9.0, dtype=x.dtype)
    wide[..., 1:1 + x.shape[-2], :] = x
    return wide[..., 1:1 + x.shape[-2], :]


def foreign(x):
    """Memory that is not torch's, from an odd address on."""
    flat = torch.zeros(x.numel() + 1, dtype=x.dtype).numpy() if x.dtype != torch.bfloat16 else None
    if flat is None:
        return x
    out = torch.from_numpy(flat[1:]).view(x.shape)
    return out.copy_(x)


LAYOUTS = (lambda x: x, strided, sliced, foreign,
           lambda x: x.transpose(0, -1).contiguous().transpose(0, -1))
SHAPES = ((), (1,), (7,), (2, 3), (2, 1, 3), (0,), (2, 0))
CASES = third(itertools.product(DTYPES, SHAPES, (1, 7, 63, 64, 65, 1000), range(len(LAYOUTS))),
              seed=3)[::3]


def test_accuracy_over_dtypes_shapes_masks_strides(small):
    for case, (dtype, shape, V, layout) in enumerate(CASES):
        logits, targets, mask, g_lp, g_ent = sample(shape, V, dtype, case, MASKS[case % len(MASKS)])
        targets = (targets.int() if case % 2 else targets) % max(1, V - 2)
        kwargs = [{}, {"temperature": 0.7, "valid_vocab": max(1, V - 2)},
                  {"temperature": torch.rand(shape) + 0.5, "softcap": 5.0},
                  {"logit_scale": torch.tensor(-1.5)},
                  {"softcap": 2.0, "valid_vocab": max(1, V // 2), "logit_scale": -0.3}][case % 5]
        targets = targets % kwargs.get("valid_vocab", V)
        actual = hold(logits, targets, mask, g_lp, g_ent, layout=LAYOUTS[layout],
                      name=str(CASES[case]), **kwargs)
        assert not actual[2][..., kwargs.get("valid_vocab", V):].any()
        if mask is not None:
            assert not any(x[~mask].any() for x in actual)


@pytest.mark.parametrize("V", (4093, 4104))
def test_rows_begin_anywhere(V):
    """The shipped tiles: a whole one, a cut one, both edges."""
    for dtype in DTYPES:
        hold(*sample((2,), V, dtype))
        hold(*sample((2, 1), V, dtype), layout=sliced, temperature=0.7, softcap=4.0)


ROWS = {
    "ordinary": lambda x: 3 * x,
    "+-1e4": lambda x: torch.where(x > 0, 1e4, -1e4) + 3 * x,
    "all negative": lambda x: 3 * x - 1e4,
    "large": lambda x: 1e30 * x,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", ROWS)
def test_accuracy_line(small, row, dtype):
    """|error of logprob| <= 1e-5 + 2.4e-7 max|z| of the row."""
    for seed, kwargs in enumerate(({}, {"temperature": 0.7}, {"temperature": 0.6,
                                   "logit_scale": 1.7}, {"softcap": 30.0, "temperature": 0.9})):
        x = ROWS[row](torch.randn(4, 701, generator=torch.Generator().manual_seed(seed)))
        logits = (x.clamp(-6e4, 6e4) if dtype == torch.float16 else x).to(dtype)
        targets = torch.randint(0, 701, (4,))
        with tk.use_backend("reference"):
            exact = tk.token_logprobs(logits.double(), targets, **kwargs)
        with tk.use_backend("triton"):
            actual = tk.token_logprobs(logits, targets, **kwargs)
        z = logits.double() * kwargs.get("logit_scale", 1.0)
        z = (30 * torch.tanh(z / 30) if "softcap" in kwargs else z) / kwargs.get("temperature", 1.0)
        allowed = 1e-5 + 2.4e-7 * z.abs().amax(-1)
        assert bool(((actual.logprobs - exact.logprobs).abs() <= allowed).all()), kwargs
        eager = plain(logits, targets, None, torch.ones(4), None, **kwargs)
        assert_accurate(actual.entropy, exact.entropy, eager[1])


@pytest.mark.parametrize("busy", (1, 64))
def test_minus_infinity(small, monkeypatch, busy):
    monkeypatch.setattr(_triton, "BUSY", busy)
    V = 1100
    one = torch.full((3, V), -INF)
    one[:, 821] = torch.tensor([7.0, -1e4, 0.0])
    targets, g = torch.tensor([821, 821, 17]), torch.tensor([2.0, 3.0, 5.0])
    logprobs, entropy, grad = run("triton", one, targets, None, g, g)
    assert logprobs.tolist() == [0.0, 0.0, -INF] and entropy.tolist() == [0.0, 0.0, 0.0]
    assert not grad[:2].any()
    assert grad[2, 17] == 5.0 and grad[2, 821] == -5.0 and grad[2].count_nonzero() == 2
    for hopeless in (-INF, INF, float("nan")):
        row = torch.randn(2, V)
        row[0] = hopeless if hopeless == -INF else row[0].index_fill(
            0, torch.tensor(1050), hopeless)
        for g_ent in (g[:2], None):
            logprobs, entropy, grad = run("triton", row, targets[:2], None, g[:2], g_ent)
            assert logprobs.isnan().tolist() == entropy.isnan().tolist() == [True, False]
            assert bool(grad[0].isnan().any()) and bool(grad[1].isfinite().all())


@pytest.mark.parametrize("busy", (1, 64))
def test_poison_changes_no_bit(small, monkeypatch, busy):
    monkeypatch.setattr(_triton, "BUSY", busy)
    logits, targets, *_ = sample((2, 3), 805)
    for kind, poison in zip(("left", "right", "interior", "row"), POISONS, strict=True):
        mask = sample_mask(kind, 2, 3)
        rows = torch.stack([torch.linspace(0.5, 2, 6).reshape(2, 3)] * 3)

        def call(fill, target, mask=mask, rows=rows):
            wide = poisoned(logits, mask, fill)
            wide[..., 793:] = fill
            temperature, g_lp, g_ent = (poisoned(x, mask, fill) for x in rows)
            return run("triton", wide, torch.where(mask, targets % 793, target), mask, g_lp,
                       g_ent, temperature=temperature, valid_vocab=793)

        out = call(poison, -100)
        assert_same_bits(out, call(0.0, 0))
        assert not any(x[~mask].any() for x in out) and not out[2][..., 793:].any()


@pytest.mark.parametrize("softcap", (None, 6.0))
def test_parts_of_a_row(small, monkeypatch, softcap):
    """Few rows are shared by several programs; the same numbers, twice the same bits."""
    arguments = sample((5,), 2300, torch.bfloat16, kind="interior")
    arguments[1].remainder_(2201)
    whole = hold(*arguments, softcap=softcap, valid_vocab=2201)
    monkeypatch.setattr(_triton, "BUSY", 20)
    parts = hold(*arguments, softcap=softcap, valid_vocab=2201)
    assert_same_bits(hold(*arguments, softcap=softcap, valid_vocab=2201), parts)
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2 if a.dtype == torch.bfloat16 else 1e-6,
                                   atol=1e-6)


def test_each_result_alone_has_its_gradient(small):
    logits, targets, mask, g_lp, g_ent = sample((2, 3), 300, kind="interior")
    hold(logits, targets, mask, g_lp, None)
    hold(logits, targets, mask, None, g_ent)
    one = torch.ones(()).expand(2, 3)  # as from sum().backward(): a stride of 0
    hold(logits, targets, mask, one, 2 * g_ent.t().contiguous().t())


def test_gradient_of_large_logits(small):
    """At |z| = 1e4 the rounding of z is 5e-4: logsumexp comes in two parts."""
    logits, targets, _, g_lp, g_ent = sample((4,), 700)
    for kwargs in ({}, {"temperature": 0.7}):
        hold(logits + 1e4, targets, None, g_lp, g_ent, **kwargs)


def test_bad_targets_are_never_plausible(small, monkeypatch):
    logits, *_ = sample((5,), 1030)
    targets = torch.tensor([3, 1030, -1, 2**40, 8])
    one = torch.tensor(1.0)
    call = TokenLogprobsCall(logits, targets, None, Scaling(one, None, one), None)
    for busy in (1, 64):
        monkeypatch.setattr(_triton, "BUSY", busy)
        logprobs, *kept = _triton.fwd(call)
        grad = _triton.bwd(TokenLogprobsGradient(torch.ones(5), None, call, *kept))
        for x in (logprobs, kept[0], grad.sum(-1)):
            assert x.isnan().tolist() == [False, True, True, True, False]


def test_scalars_on_a_gpu(small, scalars_on_a_gpu):
    arguments = sample((3,), 50)
    kwargs = {"temperature": 0.5, "softcap": 4.0, "logit_scale": -1.5}
    expected = run("triton", *arguments, **kwargs)
    scalars_on_a_gpu(_triton)
    assert_same_bits(run("triton", *arguments, **kwargs), expected)


def test_who_runs():
    logits, targets, *_ = sample((3,), 50)
    with tk.use_backend("triton"):
        assert tk.explain(tk.token_logprobs, logits, targets).backend == "triton"
        with pytest.raises(tk.BackendError, match="fp64"):
            tk.token_logprobs(logits.double(), targets)
