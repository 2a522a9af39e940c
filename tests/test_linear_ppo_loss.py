"""`linear_ppo_loss` against `ppo_loss(linear_logprobs(...))` and against logits in fp64."""

import contextlib
import itertools

import pytest
import torch
from _linear_cases import (
    LIMIT,
    ROWS,
    SHAPED,
    Largest,
    Planned,
    as_on_a_gpu,
    choose,
    distance,
    halves,
    inputs_of,
    sample,
)
from _linear_cases import textbook as textbook_logprobs
from _loss_cases import terms_of
from _matrix import third
from test_linear_memory import BACKENDS, REAL, STEPS, real_inputs
from torch.utils.flop_counter import FlopCounterMode

import tppo_kernels as tk
from tppo_kernels._core.check import REDUCTIONS
from tppo_kernels._core.record import flat
from tppo_kernels._kernels import chunks as _linear
from tppo_kernels._math.sequence import KL_ESTIMATORS
from tppo_kernels.ops.linear_logprobs import _chunked as linear
from tppo_kernels.ops.linear_ppo_loss import _chunked
from tppo_kernels.ops.linear_ppo_loss.reference import (
    LinearPolicyLossCall,
    LinearPolicyLossGradient,
)
from tppo_kernels.testing import (
    DTYPES,
    MASKS,
    POISONS,
    assert_same_bits,
    count_graphs,
    poisoned,
    sample_mask,
    strided,
)

_bwd = torch.ops.tppo_kernels.linear_ppo_loss_bwd.default
_fwd = torch.ops.tppo_kernels.linear_ppo_loss_fwd.default

TERMS = {"dual_clip": 1.5, "entropy_coef": 0.1, "kl_coef": 0.3, "kl_estimator": "k3"}


def batch(tokens=23, sequences=3, dtype=torch.float32, seed=0, **shape):
    """The tensor arguments of a call by name; ratios lie on both sides of the clip edges."""
    hidden, weight, targets, bias = sample(sequences, tokens, dtype=dtype, seed=seed, **shape)
    g = torch.Generator().manual_seed(seed + 1)
    logprobs = textbook_logprobs(hidden.double(), weight.double(), targets, bias=bias.double())[0]
    old = logprobs + 0.4 * torch.randn(sequences, tokens, generator=g)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    x = {"old_logprobs": old, "advantages": torch.randn(sequences, tokens, generator=g),
         "ref_logprobs": old + 0.2, "weights": (2 * torch.rand(sequences, tokens, generator=g)
                                                - 0.4).clamp(min=0)}
    return {"hidden": hidden, "weight": weight, "targets": targets, "bias": bias,
            **{k: v.to(exact) for k, v in x.items()}}


LINEAR = ("temperature", "softcap", "logit_scale", "valid_vocab", "memory", "entropy_grad", "rows",
          "capacity", "group")


def composed(hidden, weight, targets, old_logprobs, advantages, mask=None, *, bias=None, **options):
    """The same in two calls."""
    linear = {k: options.pop(k) for k in LINEAR if k in options}
    logprobs, entropy = tk.linear_logprobs(hidden, weight, targets, mask, bias=bias, **linear)
    return (*tk.ppo_loss(logprobs, old_logprobs, advantages, mask, entropy=entropy, **options),
            logprobs, entropy)


def textbook(hidden, weight, targets, old_logprobs, advantages, mask=None, *, bias=None, **options):
    """The same from logits."""
    linear = {k: options.pop(k) for k in LINEAR[:4] if k in options}
    logprobs, entropy = textbook_logprobs(hidden, weight, targets, mask, bias=bias, **linear)
    return (*tk.ppo_loss(logprobs, old_logprobs, advantages, mask, entropy=entropy, **options),
            logprobs, entropy)


def run(function, x, mask=None, learns=("hidden", "weight", "bias"), scale=1.0, **options):
    """(loss, metrics, logprobs, entropy, gradients)."""
    x = {k: v.detach().clone().requires_grad_() if k in learns else v for k, v in x.items()}
    out = function(**x, mask=mask, **options)
    grads = torch.autograd.grad(out[0] * scale, [x[k] for k in learns])
    return (out[0].detach(), torch.stack([m.detach() for m in out[1]]),
            *(t.detach() for t in out[2:]), *grads)


def assert_close(actual, exact, dtype):
    limit = LIMIT[dtype]
    top = 1e-4 if dtype != torch.float64 else 1e-10
    assert abs(actual[0].double() - exact[0].double()) <= top * (1 + abs(float(exact[0])))
    for a, e in zip(actual[2:4], exact[2:4], strict=True):
        assert float((a.double() - e.double()).abs().max() if e.numel() else 0) <= top
    for a, e in zip(actual[4:], exact[4:], strict=True):  # one number alone rounds by up to 2^-8
        assert distance(a, e) <= max(limit, 1.01 * distance(e.to(dtype), e))


CASES = [(backend, dtype, ratio, reduction, shaped)
         for backend in BACKENDS for dtype in (torch.float64, *DTYPES)
         for ratio in ("token", "sequence") for reduction in REDUCTIONS
         for shaped in (False, True) if not (backend == "cpp" and dtype == torch.float64)]


@pytest.mark.parametrize("backend, dtype, ratio, reduction, shaped", third(CASES, 1))
def test_equals_the_two_operators_and_the_textbook(backend, dtype, ratio, reduction, shaped):
    """A second copy of the loss drifts (Liger#1082, trl#7063): there is none."""
    x = batch(dtype=dtype, sequences=4)
    mask = sample_mask("row", 4, 23)
    options = {"ratio": ratio, "reduction": reduction, **TERMS, **(SHAPED if shaped else {})}
    with tk.use_backend(backend):
        actual = run(tk.linear_ppo_loss, x, mask, scale=2.0, **options)
    with tk.use_backend("reference"):
        two_calls = run(composed, x, mask, scale=2.0, **options)
    assert_close(actual, two_calls, dtype)
    torch.testing.assert_close(actual[1], two_calls[1], rtol=1e-4, atol=1e-4)
    double = {k: v.double() if v.is_floating_point() else v for k, v in x.items()}
    assert_close(actual, run(textbook, double, mask, scale=2.0, **options), dtype)
    assert not actual[4][~mask].any()


@pytest.mark.parametrize("estimator, weights, entropy_grad, ratio",
                         third(itertools.product(KL_ESTIMATORS, (None, "token", "sequence"),
                                                 (False, True), ("token", "sequence")), 2))
def test_terms(estimator, weights, entropy_grad, ratio):
    x = batch(dtype=torch.float64)
    if weights == "sequence":
        x["weights"], x["advantages"] = x["weights"][:, 0], x["advantages"][:, 0]
    if weights is None:
        del x["weights"]
    options = {**TERMS, "kl_estimator": estimator, "ratio": ratio, "entropy_grad": entropy_grad}
    mask = sample_mask("interior", 3, 23)
    actual = run(tk.linear_ppo_loss, x, mask, **options)
    expected = run(composed, x, mask, **options)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


SHAPES = third(itertools.product(DTYPES, (1, 7, 63, 64, 65, 1000), MASKS, (False, True)), seed=3)


def test_shapes_masks_strides():
    for case, (dtype, tokens, kind, contiguous) in enumerate(SHAPES):
        x = batch(tokens, 2, dtype=dtype, seed=case, d=8, v=37)
        mask = sample_mask(kind, 2, tokens, case)
        double = {k: v.double() if v.is_floating_point() else v for k, v in x.items()}
        exact = run(textbook, double, mask, **TERMS)
        if not contiguous:
            x = {k: v if k in ("hidden", "weight", "bias") else strided(v) for k, v in x.items()}
            mask = None if mask is None else strided(mask)
        assert_close(run(tk.linear_ppo_loss, x, mask, **TERMS), exact, dtype)


def test_packed_equals_padded():
    x, lengths = batch(), [23, 4, 11]
    mask = torch.arange(23) < torch.tensor(lengths)[:, None]
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = {k: v if k in ("weight", "bias") else v[mask] for k, v in x.items()}
    packed["advantages"] = x["advantages"][:, 0]
    x["advantages"] = x["advantages"][:, :1].expand(-1, 23)
    for ratio, reduction in itertools.product(("token", "sequence"), REDUCTIONS):
        options = {**TERMS, "ratio": ratio, "reduction": reduction, "norm_length": 30}
        a = run(tk.linear_ppo_loss, packed, cu_seqlens=offsets, **options)
        b = run(tk.linear_ppo_loss, x, mask, **options)
        torch.testing.assert_close(a[0], b[0])
        torch.testing.assert_close(a[4], b[4][mask], rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(a[5], b[5], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_micro_batches_add_up(reduction):
    """1 x 8 and 8 x 1, with the denominators of the whole batch (trl#5375, verl#6957)."""
    x, mask = batch(sequences=8), sample_mask("row", 8, 23)
    mask[0, 3] = True
    counts = {"num_tokens": int(mask.sum()), "num_sequences": int(mask.any(1).sum()),
              "norm_length": 23, "reduction": reduction, **TERMS}
    whole = run(tk.linear_ppo_loss, x, mask, **counts)
    loss, grads = 0.0, [torch.zeros_like(g) for g in whole[4:]]
    for b in range(8):
        part = {k: v if k in ("weight", "bias") else v[b:b + 1] for k, v in x.items()}
        out = run(tk.linear_ppo_loss, part, mask[b:b + 1], **counts)
        loss = loss + out[0]
        grads[0][b:b + 1] += out[4]
        grads[1] += out[5]
        grads[2] += out[6]
    assert abs(loss - whole[0]) <= 1e-6 * max(1, abs(whole[0]))
    for a, b in zip(grads, whole[4:], strict=True):
        assert distance(a, b) <= 1e-6


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("ratio", ("token", "sequence"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_ways_to_choose_rows_agree(kind, ratio, backend):
    x, mask = batch(), sample_mask("row", 3, 23)
    with tk.use_backend(backend):
        actual = run(tk.linear_ppo_loss, x, mask, ratio=ratio, **choose(kind, mask), **TERMS)
    plain = run(tk.linear_ppo_loss, x, mask, ratio=ratio, **TERMS)
    for a, b in zip(actual, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ratio", ("token", "sequence"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_over_capacity_is_nan_everywhere(ratio, backend):
    x, mask = batch(10, 1), torch.ones(1, 10, dtype=torch.bool)
    with tk.use_backend(backend):
        loss, _, logprobs, _, *grads = run(tk.linear_ppo_loss, x, mask, capacity=9, ratio=ratio)
    assert loss.isnan() and logprobs[0, 9:].isnan().all() and logprobs[0, :9].isfinite().all()
    assert grads[0][0, 9:].isnan().all() and grads[1].isnan().all() and grads[2].isnan().all()
    assert run(tk.linear_ppo_loss, x, mask, capacity=10, ratio=ratio)[0].isfinite()


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("kind", ("inside", "capacity"))
def test_poison(poison, kind):
    """exp of a masked slot makes NaN in backward only (OpenRLHF#1314, NeMo-RL#4120)."""
    x = batch(sequences=4)
    for shape, ratio in itertools.product(("left", "row", "all-false"), ("token", "sequence")):
        mask = sample_mask(shape, 4, 23)
        results = []
        for value in (0.0, poison):
            bad = {k: v if k in ("weight", "bias", "targets") else poisoned(v, mask, value)
                   for k, v in x.items()}
            if value != 0.0:
                bad["targets"] = torch.where(mask, x["targets"], -100)
            results.append(run(tk.linear_ppo_loss, bad, mask, ratio=ratio, **TERMS,
                               **choose(kind, mask)))
        assert_same_bits(results[1], results[0])
        assert not results[0][4][~mask].any()


def test_a_poisoned_sequence_without_tokens():
    x, mask = batch(), sample_mask("row", 3, 23)
    x["advantages"], x["weights"] = x["advantages"][:, 0].clone(), x["weights"][:, 0].clone()
    clean = run(tk.linear_ppo_loss, x, mask, **TERMS)
    x["advantages"][0] = x["weights"][0] = float("nan")
    again = run(tk.linear_ppo_loss, x, mask, **TERMS)
    assert_same_bits(again, clean)


def test_empty_input():
    for sequences, tokens in ((0, 5), (3, 0), (2, 5)):
        x = batch(tokens, sequences)
        mask = torch.zeros(sequences, tokens, dtype=torch.bool)
        for ratio in ("token", "sequence"):
            out = run(tk.linear_ppo_loss, x, mask, ratio=ratio, **TERMS)
            assert out[0] == 0 and not any(g.any() for g in out[4:])


def test_twice_and_other_chunks():
    x, mask = batch(200), sample_mask("interior", 3, 200)
    once = run(tk.linear_ppo_loss, x, mask, **TERMS)
    assert_same_bits(run(tk.linear_ppo_loss, x, mask, **TERMS), once)
    for memory in (1, 20_000, "recompute", "store"):
        other = run(tk.linear_ppo_loss, x, mask, memory=memory, **TERMS)
        for a, b in zip(other, once, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("ratio", ("token", "sequence"))
@pytest.mark.parametrize("backend", ("chunked", "reference"))
def test_gradcheck(ratio, backend):
    x = batch(4, 2, dtype=torch.float64, d=3, v=7)
    fixed = {k: v for k, v in x.items() if k not in ("hidden", "weight", "bias")}
    mask = torch.tensor([[True, True, False, True], [True, False, True, True]])

    def call(hidden, weight, bias):
        return tk.linear_ppo_loss(hidden=hidden, weight=weight, bias=bias, mask=mask, **fixed,
                                  ratio=ratio, entropy_coef=0.2, kl_coef=0.3, softcap=2.0).loss

    leaves = [x[k].requires_grad_() for k in ("hidden", "weight", "bias")]
    with tk.use_backend(backend):
        assert torch.autograd.gradcheck(call, leaves)


def test_only_the_loss_is_differentiable_and_only_in_what_asks():
    x = batch()
    exact = run(composed, x)
    names = ("hidden", "weight", "bias")
    for learns in itertools.product((False, True), repeat=3):
        leaves = {k: x[k].clone().requires_grad_(on) for k, on in zip(names, learns, strict=True)}
        old = x["old_logprobs"].clone().requires_grad_()
        out = tk.linear_ppo_loss(**{**x, **leaves, "old_logprobs": old})
        assert out.loss.requires_grad == any(learns)
        assert not out.logprobs.requires_grad and not out.entropy.requires_grad
        assert not any(m.requires_grad for m in out.metrics)
        if any(learns):
            (out.loss * torch.tensor(-3.0)).backward()
        for leaf, on, e in zip(leaves.values(), learns, exact[4:], strict=True):
            assert (leaf.grad is not None) == on
            assert not on or distance(leaf.grad, -3 * e) < 1e-5
        assert old.grad is None
    with torch.no_grad():
        assert not tk.linear_ppo_loss(**{**x, **leaves}).loss.requires_grad


N, D, V = 1500, 8, 700


LARGE = batch(N, 1, d=D, v=V)


def kernel(backend, ratio="token", wanted=(True, True, False)):
    """The kernel itself: what it does is visible to modes."""
    x = LARGE
    terms = terms_of(x["old_logprobs"], x["advantages"], entropy_coef=0.1, ratio=ratio)
    return _chunked.fwd(LinearPolicyLossCall(inputs_of(*(x[k] for k in (
        "hidden", "weight", "targets"))), terms, True, *wanted), steps=STEPS[backend])


@pytest.mark.parametrize("backend", STEPS)
def test_no_tensor_of_n_times_v(backend):
    with Largest() as seen:
        kernel(backend)
    assert seen.numel <= _linear.CPU_ROWS * V < N * V / 2
    with Largest() as seen:
        kernel(backend, "sequence")
    assert seen.numel == N * V  # the kept exponentials


@pytest.mark.parametrize("ratio", ("token", "sequence"))
@pytest.mark.parametrize("wanted, times", (((True, True, False), 6), ((True, False, False), 4),
                                           ((False, False, False), 2)))
def test_flops(ratio, wanted, times):
    """6NVD, and 4NVD with a frozen head."""
    with FlopCounterMode(display=False) as counted:
        kernel("cpp", ratio, wanted)
    assert counted.get_total_flops() == times * N * V * D


@pytest.mark.parametrize("ratio", ("token", "sequence"))
@pytest.mark.parametrize("wanted, times", (((True, True, False), 6), ((True, False, False), 4)))
def test_products_and_memory_of_a_gpu_at_real_size(monkeypatch, ratio, wanted, times):
    """No factor is cast up; at most the budget, dW and what is returned, and for sequences kept."""
    pytest.importorskip("triton")
    steps = as_on_a_gpu(monkeypatch)
    (n, v, d), budget = REAL, 1 << 30
    hidden, weight, targets = real_inputs(n, v, d)
    old = torch.empty(1, n, device="meta")
    call = LinearPolicyLossCall(inputs_of(hidden[None], weight, targets[None], budget=budget),
                                terms_of(old, old, entropy_coef=0.1, ratio=ratio), True,
                                *wanted)
    with Planned() as plan:
        inputs = [x.detach() for x in (hidden, weight, targets)]
        given = plan.nbytes
        out = _chunked.fwd(call, steps=steps)
        returned = sum(x.numel() * x.element_size() for x in out[4:]) + 4 * v * d * wanted[1]
    assert inputs and plan.flops == times * n * v * d and plan.factors == {torch.bfloat16}
    kept = 2 * n * v if ratio == "sequence" else 0
    assert plan.peak - given <= budget + kept + 2 * returned + 0.02 * budget


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", ("token", "sequence"))
@pytest.mark.parametrize("by_triton", (True, False))
def test_scalars_on_a_cpu_and_tensors_on_a_gpu(monkeypatch, dtype, ratio, by_triton):
    """Every argument, and nothing but 0-d tensors crosses from the CPU."""
    pytest.importorskip("triton")
    on_triton = as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(_linear, "takes_halves", lambda h, w: h.dtype != torch.float32)
    b, t, v, d = 3, 20, 5001, 16
    hidden, weight, targets = real_inputs(b * t, v, d, dtype)
    hidden, targets = hidden.reshape(b, t, d), targets.reshape(b, t)
    token, mask = torch.empty(b, t, device="meta"), targets > 0
    half = torch.tensor(0.5)
    for reduction, capacity in itertools.product(REDUCTIONS, (None, 30)):
        inputs = inputs_of(hidden, weight, targets, mask, weight[:, 0], temperature=half,
                           softcap=half, logit_scale=half, valid_vocab=v - 1, capacity=capacity,
                           budget=10 ** 6)
        terms = terms_of(token, token[:, 0], token, token, clip_low=0.5, clip_high=0.5,
                         dual_clip=1.5, entropy_coef=0.5, kl_coef=0.5, num_tokens=4.5,
                         num_sequences=4.5, norm_length=4.5, ratio=ratio, kl_estimator="k3",
                         reduction=reduction)
        with Planned():  # it stands in for addmm
            out = _chunked.fwd(LinearPolicyLossCall(inputs, terms, True, True, True, True),
                               steps=on_triton if by_triton else linear.TORCH)
            _chunked.bwd(LinearPolicyLossGradient(
                torch.empty((), device="meta"), *out[4:], targets, mask, None, capacity, dtype,
                dtype, dtype))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("ratio", ("token", "sequence"))
@pytest.mark.parametrize("learns", (("hidden", "weight"), ("hidden",)))
def test_the_roundings_of_a_gpu(dtype, ratio, learns):
    """As `test_linear_logprobs.py` has them; fp16 keeps slopes of 1e-6 and a scaler's 65,536."""
    x, mask = batch(40, 3, dtype=dtype, v=700), sample_mask("row", 3, 40)
    exact = {k: v.double() if v.is_floating_point() else v for k, v in x.items()}
    options = {"learns": learns, "scale": 2.0 ** 16, "ratio": ratio, "num_tokens": 10 ** 6, **TERMS}
    with halves(), tk.use_backend("chunked"):
        actual = run(tk.linear_ppo_loss, x, mask, **options)
    assert_close(actual, run(textbook, exact, mask, **options), dtype)


@pytest.mark.parametrize("backend", (*BACKENDS, "gpu"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("ratio", ("token", "sequence"))
def test_few_rows_and_a_gradient_of_the_loss_that_is_no_power_of_two(backend, dtype, ratio):
    """Each gradient is rounded once; the 100/3 alone is wrong by 1.25e-3 in bf16."""
    for rows, spread, seed in itertools.product((1, 2, 3, 8), (0.15, 1.0, 6.0), range(3)):
        x = batch(rows, 1, dtype=dtype, seed=seed, d=64, spread=spread)
        del x["bias"]
        exact = {k: v.double() if v.is_floating_point() else v for k, v in x.items()}
        options = {"learns": ("hidden", "weight"), "ratio": ratio, "scale": 100 / 3,
                   "entropy_coef": 0.01, "clip_low": 0.9, "clip_high": 9.0}
        with halves() if backend == "gpu" else contextlib.nullcontext():
            with tk.use_backend("chunked" if backend == "gpu" else backend):
                actual = run(tk.linear_ppo_loss, x, **options)
        assert_close(actual, run(textbook, exact, **options), dtype)


@pytest.mark.parametrize("ratio", ("token", "sequence"))
@pytest.mark.parametrize("memory", ("auto", 2_000_000))
def test_tokens_of_one_advantage_on_a_gpu(ratio, memory):
    """A first step: every ratio is 1, so that all slopes are those of 255 tokens' mean."""
    x = batch(255, 1, dtype=torch.bfloat16, d=64, spread=0.3, v=2000)
    del x["bias"], x["weights"]
    double = {k: v.double() if v.is_floating_point() else v for k, v in x.items()}
    double["old_logprobs"] = textbook_logprobs(*(double[k] for k in (
        "hidden", "weight", "targets")))[0]
    x["advantages"] = torch.ones(1)  # 1/255 in bf16 is wrong by 3.9e-3
    double["advantages"] = x["advantages"].double()
    x["old_logprobs"] = double["old_logprobs"].float()
    options = {"learns": ("hidden", "weight"), "ratio": ratio, "entropy_coef": 0.01}
    with halves(), tk.use_backend("chunked"):
        actual = run(tk.linear_ppo_loss, x, memory=memory, **options)
    for a, e in zip(actual[4:], run(textbook, double, **options)[4:], strict=True):
        assert distance(a, e) <= 2.6e-3


def test_nothing_of_size_v_is_kept():
    x, saved = batch(50, 1, d=8, v=999), []
    h = x["hidden"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        tk.linear_ppo_loss(**x)
    assert h.requires_grad and max(t.numel() for t in saved) == h.numel()


def test_autocast_and_inference_mode_change_nothing():
    x, mask = batch(), sample_mask("interior", 3, 23)
    expected = run(tk.linear_ppo_loss, x, mask, **TERMS)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(run(tk.linear_ppo_loss, x, mask, **TERMS), expected)
    with torch.inference_mode():
        out = tk.linear_ppo_loss(**x, mask=mask, **TERMS)
    torch.testing.assert_close(out.loss, expected[0])


def test_a_rollout_of_inference_mode_is_trained_on():
    x, mask = batch(), sample_mask("interior", 3, 23)
    expected = run(tk.linear_ppo_loss, x, mask, **TERMS)
    with torch.inference_mode():
        x = {k: v if k in ("hidden", "weight", "bias") else v.clone() for k, v in x.items()}
        mask = mask.clone()
    assert_same_bits(run(tk.linear_ppo_loss, x, mask, **TERMS), expected)


def raw_arguments(x, mask=None, rows=None, capacity=None, ratio="token", wanted=(True,) * 3):
    inputs = inputs_of(x["hidden"], x["weight"], x["targets"], mask, x["bias"], rows=rows,
                       capacity=capacity, budget=4000)
    terms = terms_of(x["old_logprobs"], x["advantages"], x["ref_logprobs"], x["weights"],
                     entropy_coef=0.1, kl_coef=0.3, ratio=ratio, kl_estimator="k3")
    return flat(LinearPolicyLossCall(inputs, terms, True, *wanted))


@pytest.mark.parametrize("backend", ("cpp", "reference"))
def test_opcheck(backend):
    x, mask = batch(6, 2, d=4, v=9), torch.tensor([[True, False, True, True, False, True]] * 2)
    with tk.use_backend(backend):
        for arguments in (raw_arguments(x, mask), raw_arguments(x, mask, tk.valid_rows(mask)),
                          raw_arguments(x, mask, capacity=10, ratio="sequence"),
                          raw_arguments(x, wanted=(False, True, False)),
                          raw_arguments(batch(6, 2, torch.bfloat16, d=4, v=9))):
            torch.library.opcheck(_fwd, arguments)
        out = _fwd(*raw_arguments(x, mask))
        for dtype in (torch.float32, torch.bfloat16):
            torch.library.opcheck(_bwd, flat(LinearPolicyLossGradient(
                torch.tensor(2.0), *out[4:], x["targets"], mask, None, None, dtype, torch.float32,
                dtype)))


@pytest.mark.parametrize("kind", ROWS)
def test_compiles_whole_and_equals_eager(kind):
    x, mask = batch(), sample_mask("interior", 3, 23)
    chosen = choose(kind, mask)

    def call(**given):
        out = tk.linear_ppo_loss(**{**given, "hidden": given["hidden"] * 2}, **TERMS, **chosen)
        return out.loss * 3, out.metrics, out.logprobs, out.entropy

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, x, mask), run(call, x, mask), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_fifty_lengths_and_scalars_make_at_most_two_graphs():
    """Liger#146, fla#533: a recompilation for every length or scalar."""
    calls = []
    for length in range(2, 52):
        x = batch(length, 2)
        mask = torch.arange(length).expand(2, -1) < length - 1
        scalars = [torch.tensor(v + length / 100) for v in (0.1, 0.2, 0.5)]
        calls.append((x, mask, tk.valid_rows(mask), *scalars))

    def call(x, mask, rows, clip, coef, temperature):
        return tk.linear_ppo_loss(**x, mask=mask, rows=rows, clip_low=clip, clip_high=clip,
                                  entropy_coef=coef, temperature=temperature).loss

    assert count_graphs(call, calls) <= 2


def test_export():
    x, mask = batch(), sample_mask("interior", 3, 23)

    class Module(torch.nn.Module):
        def forward(self, x, mask):
            return tk.linear_ppo_loss(**x, mask=mask).loss

    out = torch.export.export(Module(), (x, mask)).module()(x, mask)
    torch.testing.assert_close(out, Module()(x, mask))


@pytest.mark.parametrize("error, words, kwargs", [
    (ValueError, r"hidden has shape \[3, 4\], expected \[B, T, D\]", {"hidden": torch.ones(3, 4)}),
    (ValueError, "old_logprobs has shape", {"old_logprobs": torch.ones(3, 4)}),
    (ValueError, "advantages has shape", {"advantages": torch.ones(5)}),
    (TypeError, "targets is NoneType", {"targets": None}),
    (ValueError, "targets holds 190", {"targets": torch.full((3, 23), 190)}),
    (ValueError, "ratio is 'word', expected one of 'token', 'sequence'", {"ratio": "word"}),
    (ValueError, "memory is 'recompute', expected 'store' or 'auto', because ratio is 'sequence'",
     {"ratio": "sequence", "memory": "recompute"}),
    (ValueError, "memory is 1000, expected at least 52440 bytes", {"ratio": "sequence",
                                                                   "memory": 1000}),
    (ValueError, "ref_logprobs is None, expected a tensor, because kl_coef is 0.1",
     {"ref_logprobs": None, "kl_coef": 0.1}),
    (ValueError, "clip_low is -0.1", {"clip_low": -0.1}),
    (ValueError, "dual_clip is 1.0", {"dual_clip": 1.0}),
    (ValueError, "reduction is 'mean'", {"reduction": "mean"}),
    (ValueError, "num_tokens is -1", {"num_tokens": -1}),
    (ValueError, "temperature is 0", {"temperature": 0}),
    (ValueError, "capacity is 3 and rows is given", {"capacity": 3, "rows": torch.tensor([1])}),
    (TypeError, "unknown keyword entropy, did you mean entropy_coef, entropy_grad",
     {"entropy": torch.ones(3, 23)}),
])
def test_bad_input_names_the_argument(error, words, kwargs):
    x = batch()
    x["hidden"].requires_grad_()
    with pytest.raises(error, match=words):
        tk.linear_ppo_loss(**{**x, **kwargs})
