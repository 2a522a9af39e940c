"""`place_rewards`: where each reward lands, what is refused, moved or dropped, and its messages."""

import itertools

import pytest
import torch
from _matrix import third
from hypothesis import given, settings
from hypothesis import strategies as st

import tppo_kernels as tk
from tppo_kernels.testing import DTYPES, MASKS, POISONS, assert_same_bits, pack, sample_mask

MASK = torch.tensor([[True, True, False, True, False], [False, True, True, True, True]])


def by_loops(mask, terminal=None, spans=(), dense=None, span_at="last", on_masked="error"):
    """The contract one reward at a time, in Python floats: (rewards, dropped)."""
    placements = []
    B, T = mask.shape
    for b, t in itertools.product(range(B), range(T)) if dense is not None else ():
        placements.append((b, t, float(dense[b, t])))
    for b in range(B) if terminal is not None else ():
        actions = [t for t in range(T) if mask[b, t]]
        if float(terminal[b]) != 0:
            placements.append((b, actions[-1], float(terminal[b])))
    for b, start, end, value in spans:
        slots = [end - 1] if span_at == "last" else range(start, end)
        share = value / (end - start) if span_at == "spread" else value
        placements += [(b, t, share) for t in slots]
    out, dropped = [[0.0] * T for _ in range(B)], 0
    for b, t, value in placements:
        if value != 0 and not mask[b, t]:
            if on_masked == "drop":
                dropped += 1
                continue
            before = [s for s in range(t) if mask[b, s]]
            if on_masked == "error" or not before:
                raise ValueError
            t = before[-1]
        out[b][t] += value
    return torch.tensor(out).reshape(B, T), dropped


def test_by_hand():
    out = tk.place_rewards(MASK, terminal=torch.tensor([1.0, -2.0]),
                           dense=torch.tensor([[0.5, 0, 0, 0, 0], [0, 0, 0, 0.25, 0]]),
                           spans=[(0, 0, 2, 3.0), (1, 1, 5, 8.0), (0, 1, 2, 0.125)])
    assert out.rewards.tolist() == [[0.5, 3.125, 0, 1.0, 0], [0, 0, 0, 0.25, 6.0]]
    assert out.dropped == 0 and out.dropped.dtype == torch.int64
    assert out.rewards.dtype == torch.float32
    each = tk.place_rewards(MASK, spans=[(1, 1, 4, 3.0)], span_at="each").rewards
    assert each[1].tolist() == [0, 3, 3, 3, 0]
    spread = tk.place_rewards(MASK, spans=[(1, 1, 4, 3.0)], span_at="spread").rewards
    assert spread[1].tolist() == [0, 1, 1, 1, 0]
    assert not tk.place_rewards(MASK).rewards.any()


def test_terminal_at_the_last_action_token():
    """trl#3750: the reward was placed on the pad behind EOS. trl#5303: where pad == eos, EOS was
    masked away. Here the action mask alone says where the sequence ends, never an id or a length:
    EOS inside the mask is paid, whatever ids stand behind it."""
    eos_kept = torch.tensor([[True, True, True, False, False]])  # tokens: a b eos eos eos
    assert tk.place_rewards(eos_kept, terminal=torch.ones(1)).rewards.tolist() == [[0, 0, 1, 0, 0]]
    tool_last = torch.tensor([[True, True, False, False, False]])  # a tool answer ends the text
    assert tk.place_rewards(tool_last, terminal=torch.ones(1)).rewards.tolist() == [[0, 1, 0, 0, 0]]
    left = torch.tensor([[False, False, True, True, True]])
    assert tk.place_rewards(left, terminal=torch.ones(1)).rewards.tolist() == [[0, 0, 0, 0, 1]]


def test_masked_slots():
    dense = torch.tensor([[1.0, 0, 2.0, 0, 4.0], [0, 0, 0, 0, 0]])
    with pytest.raises(ValueError, match="dense puts 2 on token 2 of sequence 0, where mask is "):
        tk.place_rewards(MASK, dense=dense)
    moved = tk.place_rewards(MASK, dense=dense, on_masked="move_back")
    assert moved.rewards[0].tolist() == [1, 2, 0, 4, 0] and moved.dropped == 0
    dropped = tk.place_rewards(MASK, dense=dense, on_masked="drop")
    assert dropped.rewards[0].tolist() == [1, 0, 0, 0, 0] and dropped.dropped == 2
    one = [(0, 0, 3, 6.0)]
    assert tk.place_rewards(MASK, spans=one, on_masked="move_back").rewards[0, 1] == 6
    share = tk.place_rewards(MASK, spans=one, on_masked="move_back", span_at="spread").rewards
    assert share[0].tolist() == [2, 4, 0, 0, 0]
    each = tk.place_rewards(MASK, spans=one, on_masked="drop", span_at="each")
    assert each.rewards[0].tolist() == [6, 6, 0, 0, 0] and each.dropped == 1


def test_nothing_is_lost_silently():
    """Rewards that cancel on a masked slot are two losses; NaN is a reward, 0 and -0 are none."""
    cancel = [(0, 0, 3, 1.0), (0, 1, 3, -1.0)]
    with pytest.raises(ValueError, match=r"spans\[0\] puts 1 on token 2 of sequence 0"):
        tk.place_rewards(MASK, spans=cancel)
    assert tk.place_rewards(MASK, spans=cancel, on_masked="drop").dropped == 2
    nan = torch.zeros(2, 5)
    nan[1, 0] = float("nan")
    with pytest.raises(ValueError, match="dense puts nan on token 0 of sequence 1"):
        tk.place_rewards(MASK, dense=nan)
    zeros = tk.place_rewards(MASK, dense=torch.full((2, 5), -0.0), terminal=torch.zeros(2),
                             spans=[(0, 2, 3, 0.0)])
    assert not zeros.rewards.any() and zeros.dropped == 0


def test_the_first_slot_is_named():
    """By the order of the layout, not of the arguments; packed too."""
    spans = [(1, 0, 1, 7.0), (0, 3, 5, 5.0), (0, 2, 3, 3.0)]
    with pytest.raises(ValueError, match=r"spans\[2\] puts 3 on token 2 of sequence 0, where"):
        tk.place_rewards(MASK, spans=spans)
    packed, cu = pack(MASK, [5, 5])
    with pytest.raises(ValueError, match=r"spans\[0\] puts 7 on token 0 of sequence 1 \(packed "
                       r"slot 5\)"):
        tk.place_rewards(packed, spans=spans[:1], cu_seqlens=cu)


@pytest.mark.parametrize("on_masked", ("error", "move_back", "drop"))
def test_no_slot_to_move_to_and_no_action_token(on_masked):
    mask = torch.tensor([[True, True], [False, False], [False, True]])
    for terminal in (1.0, float("nan"), -1e-30):
        with pytest.raises(ValueError, match="terminal is .* for sequence 1, which has no action"):
            tk.place_rewards(mask, terminal=torch.tensor([1.0, terminal, 1.0]),
                             on_masked=on_masked)
    zero = tk.place_rewards(mask, terminal=torch.tensor([1.0, 0.0, 2.0]), on_masked=on_masked)
    assert zero.rewards.tolist() == [[0, 1], [0, 0], [0, 2]]
    for spans in ([(2, 0, 1, 1.0)], [(1, 0, 2, 1.0)]):  # never into the sequence before
        if on_masked == "drop":
            assert tk.place_rewards(mask, spans=spans, on_masked=on_masked).dropped == 1
        else:
            with pytest.raises(ValueError, match=r"spans\[0\] puts 1 on token [01] of sequence"):
                tk.place_rewards(mask, spans=spans, on_masked=on_masked)
    packed, cu = pack(mask, [2, 2, 2])
    with pytest.raises(ValueError, match="for sequence 1, which has no action token"):
        tk.place_rewards(packed, terminal=torch.ones(3), cu_seqlens=cu, on_masked=on_masked)


def test_packed_equals_padded():
    lengths = [5, 0, 3, 1]
    mask = torch.rand(4, 5) < 0.6
    mask[:, 0] = True
    mask &= torch.arange(5) < torch.tensor(lengths)[:, None]
    terminal, dense = torch.tensor([1.0, 0.0, 3.0, 4.0]), torch.randn(4, 5)
    dense = torch.where(torch.arange(5) < torch.tensor(lengths)[:, None], dense, 0)
    spans = [(0, 1, 4, 1.0), (2, 0, 3, -2.0), (3, 0, 1, 0.5), (0, 4, 5, 9.0)]
    for span_at, on_masked in itertools.product(("last", "each", "spread"), ("move_back", "drop")):
        options = {"terminal": terminal, "spans": spans, "span_at": span_at,
                   "on_masked": on_masked}
        padded = tk.place_rewards(mask, dense=dense, **options)
        values, cu = pack(dense, lengths)
        packed = tk.place_rewards(pack(mask, lengths)[0], dense=values, cu_seqlens=cu, **options)
        assert_same_bits(packed.rewards, pack(padded.rewards, lengths)[0])
        assert packed.dropped == padded.dropped


CASES = third(itertools.product((1, 7, 63, 64, 65, 200), MASKS[1:], (*DTYPES, torch.float64),
                                ("last", "each", "spread"), ("error", "move_back", "drop")), seed=4)


def test_equals_the_loops_over_the_matrix():
    for case, (T, kind, dtype, span_at, on_masked) in enumerate(CASES):
        g = torch.Generator().manual_seed(case)
        mask = sample_mask(kind, 3, T, case)
        dense = torch.randn(3, T, generator=g).to(dtype)
        if on_masked == "error":
            dense = torch.where(mask, dense, 0)
        terminal = torch.where(mask.any(1), torch.randn(3, generator=g), 0).to(dtype)
        spans = []
        for _ in range(4):
            b = int(torch.randint(3, (), generator=g))
            start = int(torch.randint(T, (), generator=g))
            end = start + 1 + int(torch.randint(T - start, (), generator=g))
            if on_masked != "error" or bool(mask[b, start:end].all()):
                spans.append((b, start, end, float(torch.randn((), generator=g))))
        options = {"terminal": terminal, "spans": spans, "dense": dense, "span_at": span_at,
                   "on_masked": on_masked}
        try:
            expected, dropped = by_loops(mask, **options)
        except ValueError:
            with pytest.raises(ValueError, match="to move to"):
                tk.place_rewards(mask, **options)
            continue
        actual = tk.place_rewards(mask, **options)
        assert actual.rewards.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(actual.rewards.float(), expected, rtol=1e-6, atol=1e-6,
                                   msg=lambda m, case=case: f"{CASES[case]}: {m}")
        assert actual.dropped == dropped
        assert not actual.rewards[~mask].any()
        assert_same_bits(tuple(tk.place_rewards(mask, **options)), tuple(actual))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 9),
       st.sampled_from(("last", "each", "spread")))
def test_move_back_keeps_the_total(seed, B, T, span_at):
    """What goes in comes out, whatever overlaps; a permuted batch gives permuted rewards."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(B, T, generator=g) < 0.5
    mask[:, 0] = True
    spans, total = [], 0.0
    for _ in range(6):
        b, start = int(torch.randint(B, (), generator=g)), int(torch.randint(T, (), generator=g))
        end, value = start + 1 + int(torch.randint(T - start, (), generator=g)), float(
            torch.randn((), generator=g))
        spans.append((b, start, end, value))
        total += value * (end - start if span_at == "each" else 1)
    out = tk.place_rewards(mask, spans=spans, span_at=span_at, on_masked="move_back").rewards
    assert float(out.double().sum()) == pytest.approx(total, abs=1e-5)
    order = torch.randperm(B, generator=g)
    where = {int(b): i for i, b in enumerate(order)}
    moved = tk.place_rewards(mask[order], spans=[(where[b], *rest) for b, *rest in spans[::-1]],
                             span_at=span_at, on_masked="move_back").rewards
    torch.testing.assert_close(moved, out[order], rtol=0, atol=1e-6)


@pytest.mark.parametrize("poison", POISONS)
def test_poison(poison):
    """With "drop", what stands in masked slots changes no bit of a valid one."""
    mask = sample_mask("row", 4, 9)
    dense = torch.randn(4, 9)
    clean = tk.place_rewards(mask, dense=torch.where(mask, dense, 0), on_masked="drop")
    dirty = tk.place_rewards(mask, dense=torch.where(mask, dense, poison), on_masked="drop")
    assert_same_bits(dirty.rewards, clean.rewards)
    assert clean.dropped == 0 and dirty.dropped == (~mask).sum()


def test_forms_of_spans_and_of_no_mask():
    spans = [(0, 0, 2, 3.0), (1, 1, 5, 8.0)]
    expected = tk.place_rewards(MASK, spans=spans)
    index = torch.tensor([s[:3] for s in spans])
    values = torch.tensor([s[3] for s in spans])
    for form in (iter(spans), tuple(spans), (index, values), [index.int(), values.bfloat16()],
                 [(torch.tensor(0), 0, 2, torch.tensor(3.0)), spans[1]]):
        assert_same_bits(tuple(tk.place_rewards(MASK, spans=form)), tuple(expected))
    assert tk.place_rewards(MASK, spans=(index, values.double())).rewards.dtype == torch.float64
    assert not tk.place_rewards(MASK, spans=[]).rewards.any()
    assert not tk.place_rewards(MASK, spans=(index[:0], values[:0])).rewards.any()
    dense = torch.randn(2, 5)
    out = tk.place_rewards(None, dense=dense, terminal=torch.ones(2)).rewards
    torch.testing.assert_close(out, dense + torch.tensor([0., 0., 0., 0., 1.]))
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    out = tk.place_rewards(None, terminal=torch.ones(2), cu_seqlens=cu).rewards
    assert out.tolist() == [0, 1, 0, 0, 1]
    many = tk.place_rewards(MASK, spans=[(1, 1, 2, 0.1)] * 10).rewards
    assert float(many[1, 1]) == pytest.approx(1.0, abs=1e-7)  # overlapping spans add


def test_empty_detached_strided():
    for shape in ((0, 5), (3, 0)):
        out = tk.place_rewards(torch.ones(shape, dtype=torch.bool), dense=torch.zeros(shape),
                               terminal=torch.zeros(shape[0]))
        assert out.rewards.shape == shape and out.dropped == 0
    with pytest.raises(ValueError, match="terminal is 1 for sequence 0"):
        tk.place_rewards(torch.ones(3, 0, dtype=torch.bool), terminal=torch.ones(3))
    empty = tk.place_rewards(torch.ones(0, dtype=torch.bool),
                             cu_seqlens=torch.zeros(1, dtype=torch.int32))
    assert empty.rewards.shape == (0,)
    dense = torch.randn(5, 2, requires_grad=True)
    out = tk.place_rewards(MASK, dense=torch.where(MASK.t(), dense, 0).t(), terminal=dense[0])
    assert not out.rewards.requires_grad
    with torch.inference_mode():
        tk.place_rewards(MASK, terminal=torch.ones(2))
    gae = tk.gae(out.rewards, torch.zeros(2, 5), MASK)  # the result feeds the next operator
    assert gae.returns.isfinite().all()


def test_default_device_is_not_asked():
    given = {"terminal": torch.tensor([1.0, -2.0]), "spans": [(1, 1, 4, 3.0)],
             "dense": torch.where(MASK, 0.5, 0.0), "span_at": "each", "on_masked": "move_back"}
    expected = tk.place_rewards(MASK, **given)
    with torch.device("meta"):
        assert_same_bits(tk.place_rewards(MASK, **given), expected)


def test_opcheck_and_compile():
    raw = torch.ops.tppo_kernels.place_rewards_fwd.default
    index, values = torch.tensor([[0, 0, 2], [1, 1, 5]]), torch.tensor([3.0, 8.0])
    terminal, dense = torch.tensor([1.0, -2.0]), torch.randn(2, 5)
    packed, cu = pack(MASK, [5, 5])
    torch.library.opcheck(raw, (MASK, terminal, index, values, dense, None, "each", "drop"))
    torch.library.opcheck(raw, (packed, None, index, values, None, cu, "spread", "drop"))

    def call(mask, terminal, index, values):
        return tk.place_rewards(mask, terminal=terminal, spans=(index, values), on_masked="drop")

    args = (MASK, terminal, index, values)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_same_bits(tuple(compiled(*args)), tuple(call(*args)))


@pytest.mark.parametrize("error, words, args, kwargs", [
    (TypeError, "mask is NoneType None, expected a tensor", (None,), {}),
    (TypeError, "mask has dtype float32, expected bool", (MASK.float(),), {}),
    (ValueError, r"cu_seqlens is \[0, -3\], expected offsets", (None,),
     {"cu_seqlens": torch.tensor([0, -3], dtype=torch.int32)}),
    (ValueError, r"mask has shape \[5\], expected \[B, T\]", (MASK[0],), {}),
    (TypeError, "terminal is list", (MASK,), {"terminal": [1.0, 2.0]}),
    (ValueError, r"terminal has shape \[3\].*\[2\] as mask", (MASK,), {"terminal": torch.ones(3)}),
    (TypeError, "terminal has dtype int64", (MASK,), {"terminal": torch.ones(2).long()}),
    (ValueError, r"dense has shape \[2, 4\]", (MASK,), {"dense": torch.ones(2, 4)}),
    (ValueError, "span_at is 'first', expected one of 'last', 'each', 'spread'", (MASK,),
     {"span_at": "first"}),
    (ValueError, "on_masked is 'ignore', expected one of 'error', 'move_back', 'drop'", (MASK,),
     {"on_masked": "ignore"}),
    (TypeError, "spans is float 1.0, expected .b, start, end, value.", (MASK,), {"spans": 1.0}),
    (TypeError, "spans is a tensor", (MASK,), {"spans": torch.zeros(1, 4)}),
    (ValueError, r"spans\[1\] is tuple .*expected \(b, start, end, value\)", (MASK,),
     {"spans": [(0, 0, 1, 1.0), (0, 1, 2)]}),
    (TypeError, r"spans\[0\] is tuple .*three whole numbers", (MASK,),
     {"spans": [(0, 0.0, 1, 1.0)]}),
    (TypeError, r"spans\[0\] is tuple .*and a number", (MASK,), {"spans": [(0, 0, 1, None)]}),
    (ValueError, r"spans\[0\] is tuple .*of 64 bits", (MASK,), {"spans": [(2**63, 0, 1, 1.0)]}),
    (ValueError, r"spans\[0\] is tuple .*of 64 bits", (MASK,), {"spans": [(0, 0, 1, 10**400)]}),
    (ValueError, r"spans\[0\] is \(b, start, end\) = \(2, 0, 1\), expected a sequence in \[0, 2\)",
     (MASK,), {"spans": [(2, 0, 1, 1.0)]}),
    (ValueError, r"spans\[0\].*\(-1, 0, 1\), expected a sequence", (MASK,),
     {"spans": [(-1, 0, 1, 1.0)]}),
    (ValueError, r"spans\[0\].*\(0, 3, 6\), expected 0 <= start < end <= 5", (MASK,),
     {"spans": [(0, 3, 6, 1.0)]}),
    (ValueError, r"spans\[0\].*\(0, 2, 2\), expected 0 <= start < end", (MASK,),
     {"spans": [(0, 2, 2, 1.0)]}),
    (ValueError, r"spans\[0\].*\(0, -1, 2\)", (MASK,), {"spans": [(0, -1, 2, 1.0)]}),
    (ValueError, r"spans\[0\].*\(0, 1, 3\), expected 0 <= start < end <= 2, the tokens of seq",
     (MASK.flatten(),), {"spans": [(0, 1, 3, 1.0)],
                         "cu_seqlens": torch.tensor([0, 2, 10], dtype=torch.int32)}),
    (ValueError, r"spans\[0\] has shape \[1, 4\]", (MASK,),
     {"spans": (torch.zeros(1, 4).long(), torch.zeros(1))}),
    (ValueError, r"spans\[1\] has shape \[2\]", (MASK,),
     {"spans": (torch.zeros(1, 3).long(), torch.zeros(2))}),
    (ValueError, "cu_seqlens is .*end at N = 10", (MASK.flatten(),),
     {"cu_seqlens": torch.tensor([0, 9], dtype=torch.int32)}),
    (TypeError, "span", (MASK,), {"span": ()}),
])
def test_bad_input_names_the_argument(error, words, args, kwargs):
    with pytest.raises(error, match=words):
        tk.place_rewards(*args, **kwargs)
