"""`token_reward_loss` against the paper's formula, its draw, and as a citizen of PyTorch."""

import math

import pytest
import torch
from _matrix import third
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import tppo_kernels as tk
from tppo_kernels.ops.token_reward_loss import reference
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

_bwd = torch.ops.tppo_kernels.token_reward_loss_bwd.default
_fwd = torch.ops.tppo_kernels.token_reward_loss_fwd.default

SIZES = (1, 7, 63, 64, 65, 1000)
PINNED = [2898979360, 3304949170, 2910528722, 2149109664]
PARTS = ("loss", "local_loss", "global_loss")
WEIGHTS = (0.5, 1.0, 2.0)


def sample(batch, tokens, dtype=torch.float32, seed=0):
    """logits [B, T, 3], labels [B, T], sentence labels [B]."""
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(batch, tokens, 3, generator=g, dtype=torch.float64)
    sentences = 1 + torch.rand(batch, generator=g, dtype=torch.float64)
    return (logits.to(dtype), torch.randint(3, (batch, tokens), generator=g),
            sentences.to(dtype))


def run(logits, labels, mask=None, sentences=None, part="loss", **options):
    """(loss, local, global, gradient of one of them, metrics), detached."""
    logits = logits.detach().requires_grad_()
    out = tk.token_reward_loss(logits, labels, mask, sentences, **options)
    gradient, = torch.autograd.grad(getattr(out, part), logits)
    return *(x.detach() for x in out[:3]), gradient, out.metrics


def textbook(logits, labels, mask, sentences, zone, *, reduction="token", weights=(1, 1, 1)):
    """Token by token in fp64 scalars, the zone given; gradients are autograd's."""
    z = logits.detach().double().requires_grad_()
    local, global_, n, alive, counted = z.sum() * 0, z.sum() * 0, 0, 0, 0
    for b in range(z.shape[0]):
        rewards, seen = [], 0
        for t in range(z.shape[1]):
            if mask is not None and not mask[b, t]:
                continue
            seen, c = 1, int(labels[b, t])
            p = z[b, t].exp() / z[b, t].exp().sum()
            if zone[b, t]:
                local, n = local - weights[c] * p[c].log(), n + 1
            if c > 0:
                rewards.append(p[1] + 2 * p[2])
        alive += seen
        if rewards and sentences is not None:
            counted += 1
            global_ = global_ + (sum(rewards) / len(rewards) - float(sentences[b])) ** 2
    local = local / max(1, n if reduction == "token" else alive)
    return z, local, global_ / max(1, counted)


def zone_of(labels, mask, balance, seed):
    """The zone, from the one thing that a user sees of it: the gradient of the local loss."""
    logits = torch.zeros(*labels.shape, 3)
    gradient = run(logits, labels, mask, part="local_loss", balance=balance, seed=seed)[3]
    return gradient.abs().sum(-1) > 0


def test_by_hand():
    """Uniform classes: R = 1, cross-entropy log 3; a sure and right class 2: R = 2, 0."""
    logits = torch.tensor([[[0.0, 0, 0], [-99, -99, 99], [7, 7, 7]], [[0, 0, 0]] * 3])
    labels = torch.tensor([[1, 2, -100], [0, 0, 0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    out = tk.token_reward_loss(logits, labels, mask, torch.tensor([2.0, math.nan]), seed=0)
    assert float(out.local_loss) == pytest.approx(2 * math.log(3) / 3)
    assert float(out.global_loss) == pytest.approx((1.5 - 2) ** 2)
    assert float(out.loss) == pytest.approx(0.4 * 2 * math.log(3) / 3 + 0.6 * 0.25)
    m = out.metrics
    assert (m.tokens, m.kept, m.sequences) == (3, 3, 1)
    assert m.class_count.tolist() == [1, 1, 1] and m.class_correct.tolist() == [1, 0, 1]
    assert m.class_accuracy.tolist() == [1, 0, 1]
    assert float(m.expected_reward) == pytest.approx(1.5)
    assert float(m.argmax_reward) == 1 and float(m.argmax_global_loss) == 1  # (0 + 2) / 2
    paper = tk.token_reward_loss(logits, labels, mask, seed=0, local_reduction="sequence")
    assert float(paper.local_loss) == pytest.approx(2 * math.log(3) / 2)
    assert paper.global_loss == 0 and float(paper.loss) == pytest.approx(0.4 * math.log(3))


CASES = [(k, r, w, b, s) for k in MASKS for r in ("token", "sequence") for w in (None, WEIGHTS)
         for b in (None, 1.0, 3.0) for s in (True, False)]


@pytest.mark.parametrize("kind, reduction, weights, balance, judged", third(CASES))
def test_textbook(kind, reduction, weights, balance, judged):
    logits, labels, sentences = sample(4, 9, torch.float64, 5)
    labels[labels == 1] = torch.tensor([1, 2, 2])[torch.arange(int((labels == 1).sum())) % 3]
    labels[2] = 0  # a sequence without a judged token
    mask = sample_mask(kind, 4, 9)
    seed = None if balance is None else 11
    zone = zone_of(labels, mask, balance, seed)
    given_sentences = sentences if judged else None
    for part in PARTS:
        loss, local, global_, gradient, metrics = run(
            logits, labels, mask, given_sentences, part, local_reduction=reduction,
            class_weights=weights, balance=balance, seed=seed, local_weight=0.3, global_weight=2.0)
        z, e_local, e_global = textbook(logits, labels, mask, given_sentences, zone,
                                        reduction=reduction, weights=weights or (1, 1, 1))
        expected = {"loss": 0.3 * e_local + 2.0 * e_global, "local_loss": e_local,
                    "global_loss": e_global}
        e_gradient, = torch.autograd.grad(expected[part], z)
        torch.testing.assert_close((loss, local, global_, gradient),
                                   (*(x.detach() for x in expected.values()), e_gradient),
                                   rtol=1e-10, atol=1e-12)
    valid = torch.ones_like(zone) if mask is None else mask
    assert metrics.tokens == valid.sum() and metrics.kept == zone.sum()
    right = valid & (logits.argmax(-1) == labels)
    for c in range(3):
        assert metrics.class_count[c] == (valid & (labels == c)).sum()
        assert metrics.class_correct[c] == (right & (labels == c)).sum()


def test_class_weights_weigh_the_terms_not_the_mean():
    """sum(w ce) / n, as the paper; F.cross_entropy(weight=w) divides by the sum of w."""
    logits, labels, _ = sample(3, 5)
    local = tk.token_reward_loss(logits, labels, class_weights=WEIGHTS, balance=None).local_loss
    weight = torch.tensor(WEIGHTS)
    plain = F.cross_entropy(logits.reshape(-1, 3), labels.flatten(), reduction="none")
    torch.testing.assert_close(local, (weight[labels.flatten()] * plain).mean())
    assert_same_bits(local, tk.token_reward_loss(logits, labels, class_weights=weight,
                                                 balance=None).local_loss)
    certain = torch.tensor([[[0.0, -math.inf, 0.0], [0.0, 0.0, 0.0]]])
    out = run(certain, torch.tensor([[1, 0]]), class_weights=(1, 0, 1), balance=None)
    assert float(out[1]) == pytest.approx(math.log(3) / 2) and out[3].isfinite().all()


def test_the_token_mean_and_the_paper_sum_are_different_losses():
    """At 24 tokens a class of probability 1/4 costs 1.4 as a mean and 33 as a sum (OPS: 34)."""
    logits = torch.tensor([math.log(0.25), math.log(0.25), math.log(0.5)]).expand(8, 24, 3)
    labels = torch.ones(8, 24, dtype=torch.int64)
    mean, total = (tk.token_reward_loss(logits, labels, balance=None, local_reduction=r).local_loss
                   for r in ("token", "sequence"))
    assert float(mean) == pytest.approx(math.log(4)) and float(total / mean) == pytest.approx(24)


def test_draw_thins_the_majority_alone():
    g = torch.Generator().manual_seed(0)
    for shares in ((0.2, 0.7, 0.1), (0.2, 0.1, 0.7), (0.0, 0.5, 0.5), (0.3, 0.0, 0.7),
                   (0.3, 0.7, 0.0), (1.0, 0.0, 0.0)):
        labels = torch.multinomial(torch.tensor(shares), 4000, True, generator=g).reshape(40, 100)
        mask = torch.rand(40, 100, generator=g) < 0.8
        n = [int((mask & (labels == c)).sum()) for c in range(3)]
        rare, frequent = sorted((1, 2), key=lambda c: n[c])
        for balance in (1.0, 3.0, 0.5, 1000.0):
            zone = zone_of(labels, mask, balance, 7)
            assert not zone[~mask].any()
            assert zone[mask & (labels == 0)].all() and zone[mask & (labels == rare)].all()
            kept = int(zone[mask & (labels == frequent)].sum())
            p = min(1.0, balance * n[rare] / n[frequent]) if n[rare] else 1.0
            spread = math.sqrt(n[frequent] * p * (1 - p))
            assert abs(kept - p * n[frequent]) <= 4 * spread, (shares, balance)


def test_draw_is_uniform_and_independent_of_its_neighbours():
    index = torch.arange(200_000)
    draws = [reference.uniform(index, torch.tensor(seed))
             for seed in (0, 1, 2, -1, 2**40, 2**63 - 1)]
    for u in draws:
        assert 0 <= u.min() and u.max() < 1
        histogram = torch.histc(u, 100, 0, 1)
        chi2 = ((histogram - 2000) ** 2 / 2000).sum()
        assert 50 < chi2 < 160  # 99 degrees of freedom: mean 99, standard deviation 14
    rows = torch.stack([*draws, draws[0].roll(1), draws[0].roll(2), draws[0].roll(64)])
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlation.abs().max() < 0.012  # five standard deviations


def test_draw_depends_on_the_seed_and_on_nothing_else():
    """Not on padding, packing, device state or torch's global generator, which is left alone."""
    logits, labels, sentences = sample(6, 40, seed=3)
    labels[labels == 1] = 2
    labels[:, 0] = 1
    lengths = [40, 3, 17, 9, 30, 25]
    right = torch.arange(40) < torch.tensor(lengths)[:, None]
    state = torch.get_rng_state()
    zone = zone_of(labels, right, 1.0, 5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(zone_of(labels, right, 1.0, 5), zone)
    assert 0 < zone[right].float().mean() < 1
    assert not torch.equal(zone_of(labels, right, 1.0, 6), zone)
    assert torch.equal(zone_of(labels, right, torch.tensor(1.0), torch.tensor(5)), zone)
    left = right.flip(1)
    moved = torch.full_like(labels, -100)
    moved[left] = labels[right]
    assert torch.equal(zone_of(moved, left, 1.0, 5)[left], zone[right])
    shifted = torch.zeros_like(logits)
    shifted[left] = logits[right]
    flat, cu = pack(labels, lengths)
    out = [run(logits, labels, right, sentences, seed=5, balance=1.0),
           run(shifted, moved, left, sentences, seed=5, balance=1.0),
           run(pack(logits, lengths)[0], flat, None, sentences, seed=5, balance=1.0,
               cu_seqlens=cu)]
    for other in out[1:]:
        torch.testing.assert_close(other[:3], out[0][:3])
        torch.testing.assert_close(tuple(other[4]), tuple(out[0][4]))
    torch.testing.assert_close(out[1][3][left], out[0][3][right])
    torch.testing.assert_close(out[2][3], pack(out[0][3], lengths)[0])


def test_the_draw_is_pinned():
    """A run can be repeated on another machine, by another version: these draws never change."""

    def mix(x):
        x = (x + 0x9E3779B9) % 2**32
        x = (x ^ x >> 16) * 0x21F0AAAD % 2**32
        x = (x ^ x >> 15) * 0x735A2D97 % 2**32
        return x ^ x >> 15

    for seed in (0, 5, 1234567890123, 2**63 - 1):
        key = mix(mix(seed % 2**32) ^ seed >> 32)
        u = reference.uniform(torch.arange(1, 400), torch.tensor(seed))
        assert (u * 2**32).long().tolist() == [mix(mix(i) ^ key) for i in range(1, 400)]
    u = reference.uniform(torch.arange(1, 5), torch.tensor(1234567890123))
    assert (u * 2**32).long().tolist() == PINNED


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize("part", PARTS)
def test_gradcheck(part, reduction):
    logits, labels, sentences = sample(3, 4, torch.float64)
    mask = sample_mask("interior", 3, 4)
    assert torch.autograd.gradcheck(lambda z: getattr(tk.token_reward_loss(
        z, labels, mask, sentences, class_weights=WEIGHTS, seed=3, balance=1.0,
        local_reduction=reduction), part), logits.requires_grad_())


def eager(logits, labels, mask, sentences):
    """What a user would write without this operator, in the inputs' dtype."""
    z = logits.clone().requires_grad_()
    valid = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask
    target = labels.masked_fill(~valid, -100).flatten()
    weight = torch.tensor(WEIGHTS, dtype=z.dtype)
    ce = F.cross_entropy(z.reshape(-1, 3), target, weight, reduction="none")
    local = ce.sum() / valid.sum().clamp(min=1)
    judged = (valid & (labels > 0)).to(z.dtype)
    reward = (torch.softmax(z, -1) * torch.arange(3, dtype=z.dtype)).sum(-1)
    count = judged.sum(1)
    gap = (reward * judged).sum(1) / count.clamp(min=1) - sentences
    global_ = (gap.square() * (count > 0)).sum() / (count > 0).sum().clamp(min=1)
    loss = 0.4 * local + 0.6 * global_
    return (loss.detach(), local.detach(), global_.detach(),
            torch.autograd.grad(loss, z)[0])


@pytest.mark.parametrize("dtype, tokens, kind, layout", third(
    [(d, t, k, s) for d in DTYPES for t in SIZES for k in MASKS
     for s in ("contiguous", "strided")], 2))
def test_accuracy(dtype, tokens, kind, layout):
    """Against fp64 from the same inputs, judged by plain PyTorch in their own dtype."""
    logits, labels, sentences = sample(4, tokens, dtype, tokens)
    mask = sample_mask(kind, 4, tokens)
    x = (logits, labels, mask, sentences)
    seen = [strided(v) if v is not None else v for v in x] if layout == "strided" else x
    options = {"class_weights": WEIGHTS, "balance": None}
    actual = run(*seen, **options)
    exact = run(logits.double(), labels, mask, sentences.double(), **options)
    for name, a, e, p in zip((*PARTS, "gradient"), actual, exact, eager(*x), strict=False):
        assert_accurate(a, e, p, name=name)
        assert a.dtype == (dtype if name == "gradient" else torch.float32)
    if mask is not None:
        assert not actual[3][~mask].any()
    torch.testing.assert_close(tuple(actual[4]), tuple(x.float() for x in exact[4]))


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("part", PARTS)
def test_poison(poison, part):
    """verl#3805, trl#7024: padding in means; OpenRLHF#1314, NeMo-RL#4120: NaN in backward only."""
    for kind in ("left", "right", "interior", "row", "all-false"):
        logits, labels, sentences = sample(4, 9)
        labels[3] = 0
        mask = sample_mask(kind, 4, 9, seed=2)
        judged = (mask & (labels > 0)).any(1)
        for garbage in (-100, 7, 2**40):
            results = []
            for value, label in ((0.0, 0), (poison, garbage)):
                results.append(run(poisoned(logits, mask, value), labels.masked_fill(~mask, label),
                                   mask, poisoned(sentences, judged, value), part, seed=4))
            assert_same_bits(*results)
            assert not results[1][3][~mask].any()
            assert all(x.isfinite().all() for x in (*results[1][:4], *results[1][4]))


@pytest.mark.parametrize("scale", [math.inf, math.nan])
def test_masked_slots_stay_zero_whatever_gradient_comes(scale):
    logits, labels, sentences = sample(3, 7)
    mask = sample_mask("interior", 3, 7)
    z = logits.requires_grad_()
    (tk.token_reward_loss(z, labels, mask, sentences, balance=None).loss * scale).backward()
    assert not z.grad[~mask].any() and not z.grad[mask].isfinite().any()


def test_each_of_the_three_losses_carries_its_gradient():
    """Gradients were dropped in fused functions: verl#6913, Liger#968. All three at once add up."""
    logits, labels, sentences = sample(3, 5)
    parts = [run(logits, labels, None, sentences, part, balance=None)[3] for part in PARTS]
    torch.testing.assert_close(parts[0], 0.4 * parts[1] + 0.6 * parts[2])
    assert all(p.any() for p in parts)
    z = logits.requires_grad_()
    out = tk.token_reward_loss(z, labels, None, sentences, balance=None)
    (2 * out.loss - 3 * out.local_loss + out.global_loss).backward(retain_graph=True)
    torch.testing.assert_close(z.grad, 2 * parts[0] - 3 * parts[1] + parts[2])
    out.loss.backward()
    torch.testing.assert_close(z.grad, 3 * parts[0] - 3 * parts[1] + parts[2])
    assert not any(x.requires_grad for x in out.metrics)
    with torch.no_grad():
        plain = tk.token_reward_loss(z, labels, None, sentences, balance=None)
    assert_same_bits(tuple(plain), tuple(x.detach() for x in out[:3]) + (out.metrics,))
    assert not plain.loss.requires_grad
    raw = _fwd(z.detach(), labels, None, sentences, UNIT, None, None, None, "token", False)
    assert raw[3].numel() == raw[4].numel() == 0  # no gradient is made that nobody wants


def test_weights_of_the_two_losses_may_be_tensors():
    logits, labels, sentences = sample(3, 5)
    options = {"local_weight": 0.7, "global_weight": 0.2, "balance": 1.5, "seed": 3}
    tensors = {k: torch.tensor(v) for k, v in options.items()}
    assert_same_bits(run(logits, labels, None, sentences, **options),
                     run(logits, labels, None, sentences, **tensors))
    assert_same_bits(run(logits, labels.int(), None, torch.tensor([1, 2, 2]), **options),
                     run(logits, labels, None, torch.tensor([1.0, 2, 2]), **options))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (3, 5)])
def test_empty(shape):
    """Zero, attached, no NaN."""
    logits, labels, sentences = sample(*shape)
    mask, cu = torch.zeros(shape, dtype=torch.bool), (torch.arange(shape[0] + 1) * shape[1]).int()
    for reduction in ("token", "sequence"):
        options = {"seed": 0, "local_reduction": reduction}
        for out in (run(logits, labels, mask, sentences, **options),
                    run(logits.reshape(-1, 3), labels.flatten(), mask.flatten(), sentences,
                        cu_seqlens=cu, **options)):
            assert not any(x.any() for x in (*out[:4], *out[4]))
    assert tk.token_reward_loss(logits.requires_grad_(), labels, mask, seed=0).loss.requires_grad


def test_run_twice_and_permutation():
    logits, labels, sentences = sample(5, 13)
    mask = sample_mask("row", 5, 13)
    first = run(logits, labels, mask, sentences, seed=1, balance=1.0)
    assert_same_bits(run(logits, labels, mask, sentences, seed=1, balance=1.0), first)
    order = torch.tensor([3, 0, 4, 2, 1])
    plain = run(logits, labels, mask, sentences, balance=None)
    moved = run(logits[order], labels[order], mask[order], sentences[order], balance=None)
    torch.testing.assert_close((*moved[:4], tuple(moved[4])),
                               (*plain[:3], plain[3][order], tuple(plain[4])))
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(run(logits, labels, mask, sentences, seed=1, balance=1.0), first)
    with torch.inference_mode():
        assert torch.equal(tk.token_reward_loss(logits, labels, mask, sentences, seed=1,
                                                balance=1.0).loss, first[0])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 999), st.floats(-50, 50))
def test_properties(batch, tokens, seed, shift):
    """Blind to a shift of a token's logits (its gradient sums to 0) and to padding."""
    logits, labels, sentences = sample(batch, tokens, torch.float64, seed)
    mask = sample_mask("interior", batch, tokens, seed)
    out = run(logits, labels, mask, sentences, seed=seed)
    moved = run(logits + shift, labels, mask, sentences, seed=seed)
    wide = run(F.pad(logits, (0, 0, 2, 1), value=math.nan), F.pad(labels, (2, 1), value=-100),
               F.pad(mask, (2, 1)), sentences, seed=seed)
    torch.testing.assert_close(moved[:4], out[:4])
    torch.testing.assert_close((*wide[:3], wide[3][:, 2:2 + tokens]), out[:4])
    torch.testing.assert_close(out[3].sum(-1), torch.zeros(batch, tokens, dtype=torch.float64))


UNIT = [torch.tensor(1.0)] * 3


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck_and_no_host_read(packed):
    logits, labels, sentences = sample(3, 4)
    mask, cu = sample_mask("interior", 3, 4), None
    if packed:
        logits, labels, mask = logits.reshape(12, 3), labels.flatten(), mask.flatten()
        cu = torch.tensor([0, 4, 8, 12]).int()
    draw = torch.tensor(1.0), torch.tensor(5)
    for arguments in ((logits, labels, mask, sentences, UNIT, *draw, cu, "token", True),
                      (logits, labels, None, None, UNIT, None, None, cu, "sequence", False)):
        torch.library.opcheck(_fwd, arguments)
        with FakeTensorMode(allow_non_fake_inputs=True):  # a read of values raises
            reference.fwd(reference.TokenRewardLossCall(*arguments))
    slopes = torch.randn_like(logits), torch.randn_like(logits)
    torch.library.opcheck(_bwd, (torch.tensor(2.0), torch.tensor(3.0), *slopes))


@pytest.mark.parametrize("dynamic", (None, True))
@pytest.mark.parametrize("options", [{"seed": 3, "balance": 1.0}, {"balance": None}])
def test_compile_equals_eager(options, dynamic):
    logits, labels, sentences = sample(3, 7)
    mask = sample_mask("interior", 3, 7)

    def total(z):
        out = tk.token_reward_loss(z, labels, mask, sentences, **options)
        return out.loss + 2 * out.global_loss, out.metrics

    torch._dynamo.reset()
    results = []
    for f in (torch.compile(total, fullgraph=True, dynamic=dynamic, backend="aot_eager"), total):
        z = logits.clone().requires_grad_()
        loss, metrics = f(z)
        loss.backward()
        results.append((loss.detach(), z.grad, tuple(metrics)))
    torch.testing.assert_close(*results)


def test_fifty_lengths_and_seeds_make_at_most_two_graphs():
    """Liger#146, fla#533: recompilation for every length or scalar."""

    def step(logits, labels, mask, sentences, seed, balance):
        return tk.token_reward_loss(logits, labels, mask, sentences, seed=seed,
                                    balance=balance).loss

    calls = []
    for n in range(2, 52):
        logits, labels, sentences = sample(n % 5 + 2, n)
        calls.append((logits.requires_grad_(), labels, torch.ones_like(labels, dtype=torch.bool),
                      sentences, torch.tensor(n), torch.tensor(1 + n / 9)))
    assert count_graphs(step, calls) <= 2


def test_export():
    class Loss(torch.nn.Module):
        def forward(self, logits, labels, mask, sentences):
            return tk.token_reward_loss(logits, labels, mask, sentences, seed=3).loss

    def inputs(B, T, kind):
        logits, labels, sentences = sample(B, T)
        return logits, labels, sample_mask(kind, B, T), sentences

    auto = torch.export.Dim.AUTO
    shapes = (*[{0: auto, 1: auto}] * 3, {0: auto})
    program = torch.export.export(Loss(), inputs(2, 6, "interior"), dynamic_shapes=shapes)
    other = inputs(4, 11, "left")
    torch.testing.assert_close(program.module()(*other), Loss()(*other))


def test_a_label_that_is_not_checked_makes_nan_and_reads_nothing_else():
    """As on a GPU without TPPO_CHECK: never out of bounds, never a plausible number."""
    logits, labels, sentences = sample(2, 3)
    for label in (3, -1, -100, 2**40):
        labels[1, 1] = label
        local, _, _, dlocal, dglobal = reference.fwd(reference.TokenRewardLossCall(
            logits, labels, None, sentences, UNIT, None, None, None, "token", True))
        assert local.isnan() and dlocal[1, 1].isnan().all()
        assert dlocal[0].isfinite().all() and dglobal.isfinite().all()


ONE = torch.ones(2, 3, dtype=torch.int64)
GOOD = {"logits": torch.zeros(2, 3, 3), "labels": ONE, "mask": ONE.bool(),
        "sentence_labels": torch.ones(2), "seed": 1}
FLAT = {"logits": torch.zeros(6, 3), "labels": ONE.flatten(), "mask": None,
        "sentence_labels": None}


@pytest.mark.parametrize("change, error, words", [
    ({"logits": torch.zeros(2, 3)}, ValueError, ["logits", "[2, 3]", "[B, T, 3]"]),
    ({"logits": torch.zeros(2, 3, 4)}, ValueError, ["logits", "[2, 3, 4]", "3]"]),
    ({"logits": None}, TypeError, ["logits", "None", "tensor"]),
    ({"labels": torch.ones(2, 3)}, TypeError, ["labels", "float32", "int64"]),
    ({"labels": ONE[:, :2]}, ValueError, ["labels", "[2, 2]", "[2, 3]"]),
    ({"labels": 3 * ONE}, ValueError, ["labels", "3", "[0, 2]"]),
    ({"labels": -100 * ONE}, ValueError, ["labels", "-100", "[0, 2]"]),
    ({"mask": 1.0 * ONE}, TypeError, ["mask", "float32", "bool"]),
    ({"mask": ONE[:1].bool()}, ValueError, ["mask", "[1, 3]", "[2, 3]"]),
    ({"sentence_labels": torch.ones(3)}, ValueError, ["sentence_labels", "[3]", "[2]"]),
    ({"sentence_labels": torch.tensor([1, math.nan])}, ValueError, ["sentence_labels", "nan"]),
    ({"sentence_labels": [1, 2]}, TypeError, ["sentence_labels", "list"]),
    ({"seed": None}, ValueError, ["seed", "None", "balance"]),
    ({"seed": 1.5}, TypeError, ["seed", "1.5", "whole number"]),
    ({"seed": 2**63}, ValueError, ["seed", str(2**63)]),
    ({"seed": torch.ones(())}, ValueError, ["seed", "float32", "0-d"]),
    ({"balance": 0}, ValueError, ["balance", "0", "> 0"]),
    ({"balance": math.nan}, ValueError, ["balance", "nan"]),
    ({"balance": torch.tensor(-1.0)}, ValueError, ["balance", "-1"]),
    ({"local_weight": -1}, ValueError, ["local_weight", "-1", ">= 0"]),
    ({"global_weight": math.inf}, ValueError, ["global_weight", "inf"]),
    ({"global_weight": "1"}, TypeError, ["global_weight", "'1'"]),
    ({"class_weights": (1, 2)}, ValueError, ["class_weights", "(1, 2)", "3 numbers"]),
    ({"class_weights": (1, -2, 1)}, ValueError, ["class_weights[1]", "-2", ">= 0"]),
    ({"class_weights": torch.tensor([1.0, -2, 1])}, ValueError, ["class_weights[1]", "-2"]),
    ({"class_weights": torch.ones(4)}, ValueError, ["class_weights", "[4]", "[3]"]),
    ({"local_reduction": "mean"}, ValueError, ["local_reduction", "mean", "token", "sequence"]),
    ({**FLAT, "cu_seqlens": torch.tensor([0, 6])}, TypeError, ["cu_seqlens", "int64", "int32"]),
    ({**FLAT, "cu_seqlens": torch.tensor([0, 5]).int()}, ValueError, ["cu_seqlens", "5", "N = 6"]),
    ({**FLAT, "cu_seqlens": torch.tensor([0, 6]).int(), "sentence_labels": torch.ones(2)},
     ValueError, ["sentence_labels", "[2]", "[1]"]),
    ({"weight": 3}, TypeError, ["weight"]),
])
def test_bad_input(change, error, words):
    with pytest.raises(error) as caught:
        tk.token_reward_loss(**{**GOOD, **change})
    assert all(word in str(caught.value) for word in ("token_reward_loss", *words)), caught.value


def test_the_draw_does_not_ask_for_the_default_device():
    """Under `torch.set_default_device("cuda")`, with a batch on the CPU, it hashed rubbish."""
    logits, labels = torch.randn(2, 30, 3), torch.randint(3, (2, 30))
    expected = tk.token_reward_loss(logits, labels, seed=3, balance=0.5)
    with torch.device("meta"):
        again = tk.token_reward_loss(logits, labels, seed=3, balance=0.5)
    assert torch.equal(again.loss, expected.loss)


def test_without_a_draw_no_seed_is_needed():
    assert_same_bits(run(*sample(2, 3)[:2], balance=None), run(*sample(2, 3)[:2], balance=None,
                                                               seed=3))
