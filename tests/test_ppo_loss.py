"""`ppo_loss` against the textbook formula, and at its edges."""

import math

import pytest
import torch
from _loss_cases import ALL_TERMS, policy_magnitude, terms_of
from _loss_cases import policy_eager as eager_loss
from _loss_cases import policy_run as run
from _loss_cases import policy_sample as sample
from _matrix import third
from hypothesis import given, settings
from hypothesis import strategies as st

import tppo_kernels as tk
from tppo_kernels._core.check import REDUCTIONS
from tppo_kernels._math.sequence import KL_ESTIMATORS
from tppo_kernels.ops.ppo_loss import _check_values, reference
from tppo_kernels.ops.ppo_loss.reference import PolicyLossCall
from tppo_kernels.testing import (
    DTYPES,
    MASKS,
    POISONS,
    assert_accurate,
    assert_same_bits,
    pack,
    poisoned,
    sample_mask,
    strided,
)

SIZES = (1, 7, 63, 64, 65, 1000)
RATIOS = ("token", "sequence")


def textbook(x, mask, *, clip_low=0.2, clip_high=0.2, dual_clip=None, ratio="token",
             entropy_coef=0.0, kl_coef=0.0, kl_estimator="k2", reduction="token-mean",
             max_log_ratio=20.0):
    """The formula token by token in fp64 scalars; the gradient is autograd's."""
    batch, tokens = x["logprobs"].shape
    x = {name: value.double() for name, value in x.items()}
    x = {name: value.requires_grad_(name in ("logprobs", "entropy")) for name, value in x.items()}
    sequences = [[t for t in range(tokens) if mask is None or mask[b, t]] for b in range(batch)]
    per_sequence, nothing = [], sum(v.sum() * 0 for v in x.values() if v.requires_grad)
    for b, valid in enumerate(sequences):
        ds = [(x["logprobs"][b, t] - x["old_logprobs"][b, t]).clamp(-max_log_ratio, max_log_ratio)
              for t in valid]
        if ratio == "sequence" and valid:
            ds = [sum(ds) / len(ds)] * len(ds)
        terms = []
        for t, d in zip(valid, ds, strict=True):
            def at(name, b=b, t=t):
                return x[name][b] if x[name].dim() == 1 else x[name][b, t]
            a, r = at("advantages"), d.exp()
            term = torch.max(-a * r, -a * r.clamp(1 - clip_low, 1 + clip_high))
            if dual_clip is not None and a < 0:
                term = torch.min(term, -dual_clip * a)
            term = term * at("weights") if "weights" in x else term
            if "entropy" in x:
                term = term - entropy_coef * at("entropy")
            if "ref_logprobs" in x:
                k = (at("logprobs") - at("ref_logprobs")).clamp(-20, 20)
                value = {"k1": k, "k2": k * k / 2, "k3": (-k).exp() - 1 + k,
                         "abs": k.abs()}[kl_estimator.rstrip("+")]
                if kl_estimator.endswith("+"):
                    value = value.detach() + k * k / 2 - (k * k / 2).detach()
                term = term + kl_coef * value
            terms.append(term)
        per_sequence.append(terms)
    n_tokens = max(1, sum(map(len, per_sequence)))
    n_sequences = max(1, sum(len(terms) > 0 for terms in per_sequence))
    sums = [sum(terms) for terms in per_sequence]
    loss = {"token-mean": lambda: sum(sums) / n_tokens, "token-sum": lambda: sum(sums),
            "seq-mean-token-sum": lambda: sum(sums) / n_sequences,
            "seq-mean-token-mean": lambda: sum(s / max(1, len(p)) for s, p in zip(
                sums, per_sequence, strict=True)) / n_sequences,
            "seq-mean-token-sum-norm": lambda: sum(sums) / max(1, tokens) / n_sequences,
            }[reduction]() + nothing
    loss.backward()
    return loss.detach(), x["logprobs"].grad, x["entropy"].grad if "entropy" in x else None


def close(actual, expected, rtol=1e-9):
    for a, e in zip(actual[:3], expected[:3], strict=True):
        if e is not None:
            torch.testing.assert_close(a.double(), e.double(), rtol=rtol, atol=rtol)


def test_by_hand():
    """r = 2, .5, 1.1, 2 and A = 1, -1, 1, -1: clipped high, low, inside, by the dual clip c = 1.5.

    l = -1.2, .8, -1.1, 1.5, so the loss is 0; only the third has a gradient, -1.1 / 4.
    """
    logprobs = torch.tensor([[2.0, 0.5, 1.1, 2.0]]).log().requires_grad_()
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    loss, m = tk.ppo_loss(logprobs, torch.zeros(1, 4), advantages, dual_clip=1.5)
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(0.0), atol=1e-7, rtol=0)
    torch.testing.assert_close(logprobs.grad, torch.tensor([[0.0, 0.0, -0.275, 0.0]]))
    assert [float(x) for x in m[:5]] == [4, 1, 1, 1, 0]
    d = logprobs.detach()
    expected = (-d.sum(), (d.exp() - 1 - d).sum(), torch.tensor(5.6))
    torch.testing.assert_close((m.approx_kl_k1_sum, m.approx_kl_k3_sum, m.ratio_sum), expected)
    torch.testing.assert_close((m.ratio_mean, m.ratio_max), (torch.tensor(1.4), torch.tensor(2.)))
    assert float(m.clip_fraction_low) == float(m.clip_fraction_high) == 0.25
    assert float(m.clip_fraction) == 0.5 and float(m.clip_fraction_dual) == 0.25
CASES = [(ratio, reduction, estimator, dual, weights, mask)
         for ratio in RATIOS for reduction in REDUCTIONS for estimator in KL_ESTIMATORS
         for dual in (None, 1.3) for weights in (None, "token", "sequence")
         for mask in ("none", "interior", "row", "left")]


@pytest.mark.parametrize("ratio, reduction, estimator, dual, weights, mask",
                         third(third(third(CASES, 1), 2), 3))
def test_textbook(ratio, reduction, estimator, dual, weights, mask):
    x = sample(3, 5, torch.float64, seed=len(reduction) + len(estimator))
    if weights != "token":
        x["weights"], x["advantages"] = x["weights"][:, 0], x["advantages"][:, 0]
    if weights is None:
        del x["weights"]
    options = dict(ratio=ratio, reduction=reduction, kl_estimator=estimator, dual_clip=dual,
                   entropy_coef=0.1, kl_coef=0.3, clip_low=0.1, clip_high=0.25, max_log_ratio=0.7)
    valid = sample_mask(mask, 3, 5, seed=4)
    expected = textbook(x, valid, **options)
    close(run(x, valid, **options), expected)
    n, every = 15, torch.ones(3, 5, dtype=torch.bool) if valid is None else valid
    packed = {k: v.reshape(n) if v.dim() == 2 else v for k, v in x.items()}
    packed = run(packed, every.reshape(n), cu_seqlens=torch.tensor([0, 5, 10, 15]).int(),
                 norm_length=5, **options)
    close([v.reshape(3, 5) if v.dim() else v for v in packed[:3]], expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_gradcheck(ratio, reduction):
    x = sample(3, 4, torch.float64, seed=5)
    mask = sample_mask("interior", 3, 4)
    logprobs, entropy = x.pop("logprobs").requires_grad_(), x.pop("entropy").requires_grad_()
    for estimator in ("k1", "k2", "k3", "abs"):
        options = {**ALL_TERMS, "kl_estimator": estimator, "reduction": reduction, "ratio": ratio}
        assert torch.autograd.gradcheck(
            lambda lp, h, options=options: tk.ppo_loss(lp, mask=mask, entropy=h, **x,
                                                       **options).loss, (logprobs, entropy))


@pytest.mark.parametrize("dtype, tokens, kind, layout, ratio", third(
    [(d, t, k, s, r) for d in DTYPES for t in SIZES for k in MASKS
     for s in ("contiguous", "strided") for r in RATIOS]))
def test_accuracy(dtype, tokens, kind, layout, ratio):
    """Against fp64 from the same inputs, judged by plain PyTorch in their own dtype."""
    x, mask = sample(4, tokens, dtype, seed=tokens), sample_mask(kind, 4, tokens)
    actual = run({k: strided(v) for k, v in x.items()} if layout == "strided" else x, mask,
                 ratio=ratio, **ALL_TERMS)
    exact = run({k: v.double() for k, v in x.items()}, mask, ratio=ratio, **ALL_TERMS)
    eager = eager_loss(x, mask, ratio)
    for name, a, e, p in zip(("loss", "dlogprobs", "dentropy"), actual, exact, eager, strict=False):
        added = policy_magnitude(x, mask, ratio=ratio, **ALL_TERMS) if name == "loss" else None
        assert_accurate(a, e, p, scale=added, name=name)
    assert actual[0].dtype == torch.float32 and actual[1].dtype == actual[2].dtype == dtype


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_poison(poison, ratio):
    """The exp of a masked slot made NaN in backward only: OpenRLHF#1314, NeMo-RL#4120,
    prime-rl#2085; padding leaked into means: verl#3805."""
    for kind in ("left", "right", "interior", "row", "all-false"):
        mask = sample_mask(kind, 4, 9, seed=2)
        x = sample(4, 9, seed=3)
        options = {**ALL_TERMS, "ratio": ratio, "reduction": "seq-mean-token-mean"}
        clean = run({k: poisoned(v, mask, 0.0) for k, v in x.items()}, mask, **options)
        dirty = run({k: poisoned(v, mask, poison) for k, v in x.items()}, mask, **options)
        assert_same_bits(tuple(dirty), tuple(clean))
        assert not dirty[1][~mask].any() and not dirty[2][~mask].any()
        assert all(v.isfinite().all() for v in (*dirty[:3], *dirty[3]))
        bare = [{k: poisoned(x[k], mask, value) for k in (
            "logprobs", "old_logprobs", "advantages")} for value in (0.0, poison)]
        assert_same_bits(*(tuple(run(v, mask, ratio=ratio, dual_clip=1.5)) for v in bare))
        results = []
        for value in (0.0, poison):  # [B] arguments of a sequence without a valid token
            per_sequence = {k: poisoned(x[k][:, 0], mask.any(1), value)
                            for k in ("advantages", "weights")}
            results.append(tuple(run({**x, **per_sequence}, mask, **options)))
        assert_same_bits(*results)


def test_infinite_gradient_leaves_masked_slots_at_zero():
    mask = sample_mask("interior", 3, 7)
    _, dlogprobs, dentropy, _ = run(sample(3, 7), mask, scale=math.inf, entropy_coef=0.1)
    assert not dlogprobs[~mask].any() and not dentropy[~mask].any()
    assert dentropy[mask].isinf().all()


@pytest.mark.parametrize("ratio", RATIOS)
def test_clamped_tokens(ratio):
    """Beyond max_log_ratio a token is counted and has no gradient; inf - inf is NaN, and shows."""
    logprobs = torch.tensor([[-0.1, -9.0, 0.0], [-0.3, -0.2, -0.1]], requires_grad=True)
    old = torch.tensor([[-0.2, -0.1, -math.inf], [-0.3, -0.2, -0.1]])
    loss, m = tk.ppo_loss(logprobs, old, -torch.ones(2, 3), ratio=ratio, max_log_ratio=2.0)
    loss.backward()
    assert loss.isfinite() and float(m.clamped_count) == 2
    assert not logprobs.grad[0, 1:].any() and logprobs.grad[0, 0] > 0
    at_limit = {"logprobs": torch.full((1, 2), -1.0), "old_logprobs": torch.zeros(1, 2),
                "advantages": torch.ones(1, 2)}
    _, gradient, _, m = run(at_limit, ratio=ratio, max_log_ratio=1.0)
    assert gradient.all() and not m.clamped_count
    both = torch.full((1, 2), -math.inf, requires_grad=True)
    loss, m = tk.ppo_loss(both, both.detach(), torch.ones(1, 2), ratio=ratio)
    loss.backward()
    assert loss.isnan() and both.grad.isnan().all() and m.ratio_max.isnan()
    for name in ("logprobs", "old_logprobs", "advantages", "ref_logprobs", "entropy", "weights"):
        x = sample(2, 3)
        x[name][1, 1] = math.nan
        loss, gradient, _, _ = run(x, ratio=ratio, **ALL_TERMS)
        assert loss.isnan() and (name == "entropy" or gradient[1, 1].isnan()), name


@pytest.mark.parametrize("ratio", RATIOS)
def test_a_weight_of_zero_selects_an_infinite_term_away(ratio):
    x = {"logprobs": torch.tensor([[-1.0], [-1.0]]), "old_logprobs": torch.tensor([[-1.0], [-1.2]]),
         "advantages": torch.tensor([math.inf, 1.0]), "weights": torch.tensor([0.0, 1.0])}
    loss, gradient, _, _ = run(x, ratio=ratio, reduction="token-sum", clip_high=1.0)
    torch.testing.assert_close((loss, gradient), (torch.tensor(-math.exp(0.2)), torch.tensor(
        [[0.0], [-math.exp(0.2)]])))
    x = {"logprobs": torch.zeros(2, 2), "old_logprobs": torch.tensor([[0.0, -math.inf], [0.0] * 2]),
         "advantages": torch.ones(2, 2), "weights": torch.tensor([0.0, 1.0])}
    mask = torch.tensor([[False, True], [True, True]])
    loss, gradient, _, _ = run(x, mask, ratio=ratio, max_log_ratio=math.inf)
    torch.testing.assert_close((loss, gradient), (torch.tensor(-2 / 3), torch.tensor(
        [[0.0, 0.0], [-1 / 3, -1 / 3]])))


def test_a_coefficient_of_zero_is_off():
    x = sample(2, 3)
    x["entropy"][0, 0] = x["ref_logprobs"][0, 1] = math.nan
    bare = {k: x[k] for k in ("logprobs", "old_logprobs", "advantages", "weights")}
    assert_same_bits(run(x)[:2], run(bare)[:2])
    assert run(x)[3].entropy.isnan() and run(x)[3].kl.isnan()


def test_gradient_where_branches_meet():
    """At a clip edge r counts as inside, at l = -c A as not yet clipped (the docstring says so)."""
    half = math.log(0.5)
    logprobs = torch.tensor([[half, 0.0, math.log(2.0)]], dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros(1, 3, dtype=torch.float64)
    for a, expected in ((-1.0, [0.5, 1.0, 2.0]), (1.0, [-0.5, -1.0, -2.0])):
        loss = tk.ppo_loss(logprobs, zeros, zeros + a, clip_low=0.5, clip_high=1.0, dual_clip=2.0,
                           reduction="token-sum").loss
        gradient, = torch.autograd.grad(loss, logprobs)
        torch.testing.assert_close(gradient, torch.tensor([expected], dtype=torch.float64))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_micro_batches_add_up(ratio, reduction):
    """The mean of means is not the mean: trl#5375, verl#6957."""
    x, mask = sample(8, 11, seed=7), sample_mask("row", 8, 11, seed=7)
    counts = {"num_tokens": mask.sum(), "num_sequences": int(mask.any(1).sum()), "norm_length": 11}
    options = {**ALL_TERMS, "ratio": ratio, "reduction": reduction}
    whole = run(x, mask, **options)
    parts = [run({k: v[b:b + 1] for k, v in x.items()}, mask[b:b + 1], **counts, **options)
             for b in range(8)]
    summed = (sum(p[0] for p in parts), torch.cat([p[1] for p in parts]),
              torch.cat([p[2] for p in parts]))
    torch.testing.assert_close(summed, whole[:3], rtol=1e-6, atol=1e-6)
    metrics = parts[0][3]
    for part in parts[1:]:
        metrics = metrics.merged(part[3])
    torch.testing.assert_close(tuple(metrics), tuple(whole[3]), rtol=1e-6, atol=1e-6)


def test_denominators_are_at_least_one():
    x = sample(2, 3)
    sums = run(x, reduction="token-sum")
    close(run(x, num_tokens=0), sums, 1e-6)
    close(run(x, reduction="seq-mean-token-sum", num_sequences=torch.tensor(0)), sums, 1e-6)
    close(run(x, reduction="seq-mean-token-sum-norm", num_sequences=1, norm_length=0), sums, 1e-6)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (3, 5)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_empty(shape, reduction):
    """Zero, attached, no NaN; requires_grad was lost in fused functions: verl#6913, Liger#968."""
    x, mask = sample(*shape), torch.zeros(shape, dtype=torch.bool)
    packed = {k: v.flatten() for k, v in x.items()}
    cu = (torch.arange(shape[0] + 1) * shape[1]).int()
    for ratio in RATIOS:
        options = {**ALL_TERMS, "reduction": reduction, "ratio": ratio, "norm_length": 4}
        for out in (run(x, mask, **options),
                    run(packed, mask.flatten(), cu_seqlens=cu, **options)):
            assert all(not v.any() for v in (*out[:3], *out[3]))
    assert tk.ppo_loss(x["logprobs"].requires_grad_(), x["old_logprobs"], x["advantages"],
                       mask).loss.requires_grad
    for b in (0, 2):  # arguments [B] of B empty sequences
        loss = tk.ppo_loss(torch.zeros(0, requires_grad=True), torch.zeros(0), torch.zeros(b),
                           weights=torch.ones(b), cu_seqlens=torch.zeros(b + 1).int()).loss
        assert loss == 0 and loss.requires_grad


@pytest.mark.parametrize("ratio", RATIOS)
def test_run_twice_and_layouts(ratio):
    x, lengths = sample(5, 13, seed=9), [13, 1, 0, 7, 12]
    mask = torch.arange(13) < torch.tensor(lengths)[:, None]
    options = {**ALL_TERMS, "ratio": ratio, "reduction": "seq-mean-token-mean"}
    x["advantages"] = x["advantages"][:, 0]
    padded = run(x, mask, **options)
    assert_same_bits(run(x, mask, **options), padded)
    packed = {k: pack(v, lengths)[0] if v.dim() == 2 else v for k, v in x.items()}
    got = run(packed, cu_seqlens=pack(mask, lengths)[1], **options)
    expected = (padded[0], *(pack(v, lengths)[0] for v in padded[1:3]), tuple(padded[3]))
    torch.testing.assert_close((*got[:3], tuple(got[3])), expected, rtol=1e-5, atol=1e-6)
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = run({k: v[order] for k, v in x.items()}, mask[order], **options)
    torch.testing.assert_close(shuffled[:3], (padded[0], *(v[order] for v in padded[1:3])),
                               rtol=1e-5, atol=1e-6)


def test_packed_arguments_of_n_equal_b_are_per_token():
    """Three tokens of three sequences, one of them empty: [3] is read as one value a token."""
    x = {k: v[0] for k, v in sample(1, 3).items()}
    loss = run(x, cu_seqlens=torch.tensor([0, 2, 2, 3]).int())[0]
    assert_same_bits(loss, run({k: v[None] for k, v in x.items()})[0])


def test_the_formula_exists_once_and_serves_chunks():
    """A second copy of the loss drifts (Liger#1082, trl#7063): chunks of tokens add up to it."""
    x, mask = sample(3, 8, seed=11), sample_mask("interior", 3, 8)
    terms = terms_of(x["old_logprobs"], x["advantages"], x["ref_logprobs"], x["weights"],
                     dual_clip=1.5, entropy_coef=0.1, kl_coef=0.3, kl_estimator="k3",
                     reduction="seq-mean-token-mean")
    tokens = reference.tokens_of(terms, mask, torch.float32)

    def some(i, *given):
        return [v.flatten()[i:i + 7] for v in given]

    chunks = [reference.token_terms(
        *some(i, x["logprobs"], x["entropy"]), reference.Tokens(*some(i, *tokens)), terms.formula)
        for i in range(0, 24, 7)]
    whole = run(x, mask, reduction="seq-mean-token-mean", **ALL_TERMS)
    torch.testing.assert_close(
        (sum(c.loss.sum() for c in chunks), torch.cat([c.dlogprobs for c in chunks]),
         torch.cat([c.dentropy for c in chunks]), sum(c.metrics for c in chunks)[:-1]),
        (whole[0], *(v.flatten() for v in whole[1:3]), torch.stack(whole[3])[:-1]))
ONES = torch.ones(2, 3)


def test_a_tensor_coefficient_without_its_tensor_shows_where_values_are_not_checked():
    call = PolicyLossCall(ONES, None, None, terms_of(ONES, ONES, entropy_coef=0.5), False, False)
    assert reference.fwd(call)[0].isnan()
    with pytest.raises(ValueError, match="entropy is None"):
        _check_values(call)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 4), st.integers(0, 99),
       st.sampled_from(RATIOS), st.sampled_from([r for r in REDUCTIONS if "norm" not in r]))
def test_padding_invariance_and_ratio_one(batch, tokens, more, seed, ratio, reduction):
    x, options = sample(batch, tokens, seed=seed), {"ratio": ratio, "reduction": reduction}
    mask = sample_mask("interior", batch, tokens, seed)
    got = run(x, mask, **options, **ALL_TERMS)
    wide = {k: torch.cat([torch.full((batch, more), math.nan), v], 1) for k, v in x.items()}
    padded = run(wide, torch.cat([torch.zeros(batch, more).bool(), mask], 1), **options,
                 **ALL_TERMS)
    torch.testing.assert_close(
        (padded[0], padded[1][:, more:], padded[2][:, more:]), got[:3], rtol=1e-5, atol=1e-6)
    a = torch.where(mask, x["advantages"], 0.0)
    loss = tk.ppo_loss(x["old_logprobs"], x["old_logprobs"], a, mask, ratio=ratio).loss
    torch.testing.assert_close(loss, -a.sum() / mask.sum().clamp(min=1))
