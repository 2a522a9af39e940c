"""`token_rewards` against the paper's formula, at its edges, and as a citizen of PyTorch."""

import math

import pytest
import torch
from _matrix import third
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import tppo_kernels as tk
from tppo_kernels.ops.token_rewards import _check_values, reference
from tppo_kernels.testing import (
    DTYPES,
    MASKS,
    POISONS,
    assert_accurate,
    assert_same_bits,
    count_graphs,
    max_error,
    pack,
    poisoned,
    sample_mask,
    strided,
)

_fwd = torch.ops.tppo_kernels.token_rewards_fwd.default

SIZES = (1, 7, 63, 64, 65, 1000)
VALUES = (0.0, -0.5, 0.5)


def sample(batch, tokens, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(batch, tokens, 3, generator=g, dtype=torch.float64)).to(dtype)


def textbook(logits, mask, mode, lengths, alpha, values):
    """Token by token in Python floats; lengths: one a sequence, or None."""
    batch, tokens = logits.shape[:2]
    rewards = torch.zeros(batch, tokens, dtype=torch.float64)
    category = torch.zeros(batch, tokens, dtype=torch.int64)
    for b in range(batch):
        position = 0
        for t in range(tokens):
            if mask is not None and not mask[b, t]:
                continue
            position += 1
            z = logits[b, t].double().tolist()
            e = [math.exp(v - max(z)) for v in z]
            category[b, t] = z.index(max(z))
            reward = values[z.index(max(z))]
            if mode == "expected":
                reward = sum(v * p / sum(e) for v, p in zip(values, e, strict=True))
            if lengths is not None:
                reward *= 1 / (1 + math.exp(min(700, alpha * (position - lengths[b]) - 6)))
            rewards[b, t] = reward
    return rewards, category


def test_by_hand():
    """Classes 2, 1, masked, 0; l = 1, 2, -, 3 at suggested length 2."""
    logits = torch.tensor([[[0.0, 1, 2], [0, 3, 2], [9, 9, 9], [1, 0, 0]]])
    mask = torch.tensor([[True, True, False, True]])
    rewards, category = tk.token_rewards(logits, mask, suggested_length=2)
    assert category.tolist() == [[2, 1, 0, 0]]
    torch.testing.assert_close(rewards, torch.tensor(
        [[0.5 / (1 + math.exp(-8)), -0.5 / (1 + math.exp(-6)), 0.0, 0.0]]))
    rewards, category = tk.token_rewards(logits, mask, mode="expected", values=(0, 1, 2))
    p = torch.softmax(logits[0, :2].double(), -1)
    assert max_error(rewards[0, :2], p[:, 1] + 2 * p[:, 2]) < 1e-6


def test_penalty_has_the_figures_of_the_paper():
    """lwp(sl) = .9975 and lwp(sl + 3) = .5, with l counted from 1."""
    paid = tk.token_rewards(torch.tensor([0.0, 0, 1]).repeat(1, 30, 1), suggested_length=24,
                            values=(0, 1, 1)).rewards[0]
    assert float(paid[23]) == pytest.approx(0.9975, abs=5e-5)
    assert float(paid[26]) == pytest.approx(0.5, abs=1e-7)
    assert float(paid[0]) == 1.0 and (paid[1:] <= paid[:-1]).all()


@pytest.mark.parametrize("mode", ["argmax", "expected"])
@pytest.mark.parametrize("kind", MASKS)
def test_textbook(mode, kind):
    logits, mask = sample(4, 9, torch.float64), sample_mask(kind, 4, 9)
    per_sequence = torch.tensor([2.5, 0.0, 4.0, 100.0], dtype=torch.float64)
    for lengths, length in ((None, None), ([3.5] * 4, 3.5), ([3] * 4, torch.tensor(3)),
                           (per_sequence.tolist(), per_sequence), ([2, 4, 0, 9], torch.tensor(
                               [2, 4, 0, 9]))):
        actual = tk.token_rewards(logits, mask, mode=mode, suggested_length=length, alpha=0.7,
                                  values=(0.1, -1.0, 2.0))
        rewards, category = textbook(logits, mask, mode, lengths, 0.7, (0.1, -1.0, 2.0))
        torch.testing.assert_close(actual.rewards, rewards, rtol=1e-12, atol=1e-12)
        assert torch.equal(actual.category, category)


@pytest.mark.parametrize("dtype, tokens, kind, layout, mode", third(
    [(d, t, k, s, m) for d in DTYPES for t in SIZES for k in MASKS
     for s in ("contiguous", "strided") for m in ("argmax", "expected")], 1))
def test_accuracy(dtype, tokens, kind, layout, mode):
    """Against fp64 from the same inputs, judged by plain PyTorch in their own dtype."""
    logits, mask = sample(4, tokens, dtype, tokens), sample_mask(kind, 4, tokens)
    lengths = torch.tensor([1.0, 0.5 * tokens, 2.0 * tokens, 3.25])
    seen = strided(logits) if layout == "strided" else logits
    actual = tk.token_rewards(seen, mask, mode=mode, suggested_length=lengths)
    exact = tk.token_rewards(logits.double(), mask, mode=mode, suggested_length=lengths)
    valid = torch.ones(4, tokens, dtype=torch.bool) if mask is None else mask
    index = valid.cumsum(1).to(dtype)
    eager = (torch.softmax(logits, -1) * torch.tensor(VALUES, dtype=dtype)).sum(-1)
    if mode == "argmax":
        eager = torch.tensor(VALUES, dtype=dtype)[logits.argmax(-1)]
    eager = eager * torch.sigmoid(6 - 2 * (index - lengths.to(dtype)[:, None])) * valid
    assert_accurate(actual.rewards, exact.rewards, eager)
    assert torch.equal(actual.category, exact.category)
    assert actual.rewards.dtype == torch.float32 and exact.rewards.dtype == torch.float64
    assert actual.category.dtype == torch.int64
    assert not actual.rewards[~valid].any() and not actual.category[~valid].any()


@pytest.mark.parametrize("mode", ["argmax", "expected"])
@pytest.mark.parametrize("poison", POISONS)
def test_poison(poison, mode):
    """Padding leaked into rewards and means: verl#3805, ROLL#447, SkyRL#1305."""
    for kind in ("left", "right", "interior", "row", "all-false"):
        logits, mask = sample(4, 9), sample_mask(kind, 4, 9, seed=2)
        lengths = torch.rand(4) * 9
        clean, dirty = (tk.token_rewards(
            poisoned(logits, mask, value), mask, mode=mode,
            suggested_length=poisoned(lengths, mask.any(1), value)) for value in (0.0, poison))
        assert_same_bits(tuple(dirty), tuple(clean))
        assert not dirty.rewards[~mask].any() and not dirty.category[~mask].any()
        assert dirty.rewards.isfinite().all()
    packed = [tk.token_rewards(torch.ones(2, 3), suggested_length=torch.tensor([3.0, value, 1.0]),
                               cu_seqlens=torch.tensor([0, 1, 1, 2]).int()) for value in
              (0.0, poison)]
    assert_same_bits(tuple(packed[0]), tuple(packed[1]))


def test_the_index_counts_action_tokens_alone():
    """A reward on the pad after EOS (trl#3750), a step counted on padding or on tool tokens."""
    logits = sample(1, 4).expand(1, 4, 3)
    dense = tk.token_rewards(logits, suggested_length=1, alpha=1.0).rewards
    mask = torch.tensor([[False, True, False, True, True, False, True, False]])
    wide = torch.full((1, 8, 3), math.nan)
    wide[mask] = logits[0]
    out = tk.token_rewards(wide, mask, suggested_length=1, alpha=1.0).rewards
    assert torch.equal(out[mask], dense[0]) and not out[~mask].any()


def test_ties_take_the_first_class():
    logits = torch.tensor([[[1.0, 1, 1], [0, 1, 1], [1, 0, 1], [-math.inf, -math.inf, 0]]])
    assert tk.token_rewards(logits).category.tolist() == [[0, 1, 0, 2]]


def test_stable_at_any_length_and_logit():
    """sigmoid and softmax neither overflow nor lose the small end: no NaN at 10^6 tokens."""
    logits = torch.tensor([[0.0, 0.0, 1e30]]).expand(100_000, 3)
    cu = torch.tensor([0, 100_000]).int()
    for alpha in (0.0, 2.0, 1e6, 1e38):
        for mode in ("argmax", "expected"):
            rewards = tk.token_rewards(logits, suggested_length=50_000, alpha=alpha, mode=mode,
                                       cu_seqlens=cu).rewards
            assert rewards.isfinite().all() and (rewards >= 0).all()
            assert float(rewards[0]) == pytest.approx(0.5 / (1 + math.exp(-6)) if not alpha
                                                      else 0.5)
            assert alpha == 0 or rewards[-1] == 0
    small = tk.token_rewards(logits[:40], suggested_length=0, alpha=1.0,
                             cu_seqlens=torch.tensor([0, 40]).int()).rewards[-1]
    assert float(small) == pytest.approx(0.5 * math.exp(6 - 40), rel=1e-5)
    sure = torch.tensor([[[-math.inf, 0.0, -math.inf]]])
    assert tk.token_rewards(sure, mode="expected").rewards.item() == -0.5


@pytest.mark.parametrize("mode", ["argmax", "expected"])
def test_a_nan_logit_is_no_plausible_reward(mode):
    logits = sample(2, 3)
    logits[1, 2, 0] = math.nan
    rewards = tk.token_rewards(logits, mode=mode, suggested_length=2).rewards
    assert rewards[1, 2].isnan() and rewards.isnan().sum() == 1


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (3, 5)])
def test_empty(shape):
    logits, mask = sample(*shape), torch.zeros(shape, dtype=torch.bool)
    cu = (torch.arange(shape[0] + 1) * shape[1]).int()
    for length in (None, 3, torch.ones(shape[0])):
        rewards, category = tk.token_rewards(logits, mask, suggested_length=length)
        assert rewards.shape == category.shape == shape and not rewards.any()
        flat = tk.token_rewards(logits.reshape(-1, 3), mask.flatten(), suggested_length=length,
                                cu_seqlens=cu)
        assert flat.rewards.shape == (mask.numel(),) and not flat.rewards.any()


def test_results_are_detached_and_inputs_left_alone():
    logits = sample(2, 3).requires_grad_()
    length = torch.tensor([2.0, 3.0], requires_grad=True)
    values = torch.tensor(VALUES, requires_grad=True)
    before = logits.detach().clone()
    rewards, category = tk.token_rewards(logits, suggested_length=length, values=values)
    assert not rewards.requires_grad and not category.requires_grad
    assert_same_bits(tuple(tk.token_rewards(logits, suggested_length=length)), (rewards, category))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(tuple(tk.token_rewards(logits, suggested_length=length)),
                         (rewards, category))
    assert torch.equal(logits, before)


def test_run_twice_and_layouts():
    logits, lengths = sample(5, 13), [13, 1, 0, 7, 12]
    suggested = torch.tensor([5.0, 2.0, 1.0, 3.0, 20.0])
    mask = sample_mask("interior", 5, 13) & (torch.arange(13) < torch.tensor(lengths)[:, None])
    for mode in ("argmax", "expected"):
        padded = tk.token_rewards(logits, mask, mode=mode, suggested_length=suggested)
        assert_same_bits(tuple(tk.token_rewards(logits, mask, mode=mode,
                                                suggested_length=suggested)), tuple(padded))
        flat, cu = pack(logits, lengths)
        packed = tk.token_rewards(flat, pack(mask, lengths)[0], mode=mode,
                                  suggested_length=suggested, cu_seqlens=cu)
        for actual, expected in zip(packed, padded, strict=True):
            torch.testing.assert_close(actual, pack(expected, lengths)[0])
        order = torch.tensor([3, 0, 4, 2, 1])
        shuffled = tk.token_rewards(logits[order], mask[order], mode=mode,
                                    suggested_length=suggested[order])
        for actual, expected in zip(shuffled, padded, strict=True):
            torch.testing.assert_close(actual, expected[order])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 999), st.floats(-50, 50))
def test_properties(batch, tokens, seed, shift):
    """Linear in values, blind to a shift of the logits and to padding, never beyond the values."""
    logits, mask = sample(batch, tokens, torch.float64, seed), sample_mask("interior", batch,
                                                                           tokens, seed)
    for mode in ("argmax", "expected"):
        rewards = tk.token_rewards(logits, mask, mode=mode, suggested_length=2.0).rewards
        scaled = tk.token_rewards(logits, mask, mode=mode, suggested_length=2.0,
                                  values=torch.tensor(VALUES) * -4).rewards
        torch.testing.assert_close(scaled, -4 * rewards)
        moved = tk.token_rewards(logits + shift, mask, mode=mode, suggested_length=2.0).rewards
        torch.testing.assert_close(moved, rewards)
        wide = tk.token_rewards(
            torch.nn.functional.pad(logits, (0, 0, 2, 1), value=math.nan),
            torch.nn.functional.pad(mask, (2, 1)), mode=mode, suggested_length=2.0).rewards
        torch.testing.assert_close(wide[:, 2:2 + tokens], rewards)
        assert (rewards.abs() <= 0.5).all()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("expected", [False, True])
def test_opcheck_and_no_host_read(packed, expected):
    logits, mask, cu = sample(3, 4), sample_mask("interior", 3, 4), None
    if packed:
        logits, mask, cu = logits.reshape(12, 3), mask.flatten(), torch.tensor([0, 4, 8, 12]).int()
    worth = [torch.tensor(v) for v in VALUES]
    for length in (None, torch.tensor(3.0), torch.ones(3)):
        call = reference.TokenRewardsCall(logits, mask, worth, length, torch.tensor(2.0), cu,
                                          expected)
        torch.library.opcheck(_fwd, call)
        with FakeTensorMode(allow_non_fake_inputs=True):  # a read of values raises
            reference.fwd(call)


def test_compile_and_export():
    logits, mask = sample(3, 7), sample_mask("interior", 3, 7)

    def paid(logits, mask, length):
        return tuple(tk.token_rewards(logits, mask, suggested_length=length))

    torch._dynamo.reset()
    compiled = torch.compile(paid, fullgraph=True, backend="aot_eager")
    for length in (torch.tensor(3.0), torch.ones(3)):
        assert_same_bits(compiled(logits, mask, length), paid(logits, mask, length))

    class Paid(torch.nn.Module):
        def forward(self, logits, mask):
            return paid(logits, mask, torch.tensor(3.0))

    shapes = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},) * 2
    program = torch.export.export(Paid(), (logits, mask), dynamic_shapes=shapes)
    other = sample(5, 11), sample_mask("left", 5, 11)
    assert_same_bits(tuple(program.module()(*other)), paid(*other, torch.tensor(3.0)))


def test_fifty_lengths_make_at_most_two_graphs():
    """Liger#146, fla#533: recompilation for every length or scalar."""
    calls = [(sample(n % 5 + 2, n), torch.ones(n % 5 + 2, n, dtype=torch.bool),
              torch.tensor(0.5 * n), torch.tensor(n / 9)) for n in range(2, 52)]
    assert count_graphs(lambda x, m, s, a: tk.token_rewards(
        x, m, suggested_length=s, alpha=a).rewards, calls) <= 2


GOOD = {"class_logits": torch.zeros(2, 3, 3), "mask": torch.ones(2, 3, dtype=torch.bool)}
FLAT = {"class_logits": torch.zeros(6, 3), "mask": None}


@pytest.mark.parametrize("change, error, words", [
    ({"class_logits": None}, TypeError, ["class_logits", "None"]),
    ({"class_logits": torch.zeros(2, 3)}, ValueError, ["class_logits", "[2, 3]", "[B, T, 3]"]),
    ({"class_logits": torch.zeros(2, 3, 2)}, ValueError, ["class_logits", "[2, 3, 2]", "3]"]),
    ({"class_logits": torch.zeros(2, 3, 3).int()}, TypeError, ["class_logits", "int32"]),
    ({"mask": torch.ones(2, 3)}, TypeError, ["mask", "float32", "bool"]),
    ({"mask": torch.ones(3, 2, dtype=torch.bool)}, ValueError, ["mask", "[3, 2]", "[2, 3]"]),
    ({"mode": "mean"}, ValueError, ["mode", "mean", "argmax", "expected"]),
    ({"values": (0.0, 1.0)}, ValueError, ["values", "(0.0, 1.0)", "3 numbers"]),
    ({"values": 1.0}, ValueError, ["values", "1.0", "3 numbers"]),
    ({"values": (0.0, "a", 1.0)}, TypeError, ["values[1]", "'a'", "a number"]),
    ({"values": (0.0, math.nan, 1.0)}, ValueError, ["values[1]", "nan"]),
    ({"values": (0.0, 1.0, math.inf)}, ValueError, ["values[2]", "inf"]),
    ({"values": torch.zeros(2)}, ValueError, ["values", "[2]", "[3]"]),
    ({"suggested_length": -1}, ValueError, ["suggested_length", "-1", ">= 0"]),
    ({"suggested_length": math.inf}, ValueError, ["suggested_length", "inf"]),
    ({"suggested_length": "24"}, TypeError, ["suggested_length", "'24'"]),
    ({"suggested_length": torch.ones(3)}, ValueError, ["suggested_length", "[3]", "[2]"]),
    ({"suggested_length": torch.tensor([1.0, math.nan])}, ValueError, ["suggested_length", "nan"]),
    ({"suggested_length": torch.tensor(-2.0)}, ValueError, ["suggested_length", "-2"]),
    ({"alpha": -0.1}, ValueError, ["alpha", "-0.1", ">= 0"]),
    ({"alpha": math.nan}, ValueError, ["alpha", "nan"]),
    ({"alpha": torch.tensor(-1.0)}, ValueError, ["alpha", "-1"]),
    ({"alpha": torch.ones(2)}, ValueError, ["alpha", "[2]", "0-d"]),
    ({**FLAT, "cu_seqlens": torch.tensor([0, 6])}, TypeError, ["cu_seqlens", "int64", "int32"]),
    ({**FLAT, "cu_seqlens": torch.tensor([0, 5]).int()}, ValueError, ["cu_seqlens", "5", "N = 6"]),
    ({**FLAT, "cu_seqlens": torch.tensor([1, 6]).int()}, ValueError, ["cu_seqlens", "start at 0"]),
    ({**FLAT, "cu_seqlens": torch.tensor([0, 4, 2, 6]).int()}, ValueError,
     ["cu_seqlens", "never decrease"]),
    ({"cu_seqlens": torch.tensor([0, 6]).int()}, ValueError, ["class_logits", "[N, 3]"]),
    ({"length": 3}, TypeError, ["length"]),
])
def test_bad_input(change, error, words):
    with pytest.raises(error) as caught:
        tk.token_rewards(**{**GOOD, **change})
    assert all(word in str(caught.value) for word in ("token_rewards", *words)), caught.value


def test_the_length_of_an_empty_sequence_is_not_looked_at():
    lengths = torch.tensor([math.nan, 3.0])
    mask = torch.tensor([[False], [True]])
    _check_values(reference.TokenRewardsCall(torch.zeros(2, 1, 3), mask, [], lengths,
                                             torch.tensor(2.0), None, False))
    assert tk.token_rewards(torch.zeros(2, 1, 3), mask, suggested_length=lengths).rewards[0] == 0
