"""`response_states`: each alignment against plain slices, ragged and packed, and its gradient."""

import itertools

import pytest
import torch
from _matrix import third
from hypothesis import given, settings
from hypothesis import strategies as st

import tppo_kernels as tk
from tppo_kernels.testing import (
    DTYPES,
    POISONS,
    assert_same_bits,
    count_graphs,
    pack,
    sample_mask,
    strided,
)

ALIGNMENTS = ("logprob", "value", "reward", "bootstrap")
OFFSET = {"logprob": -1, "value": -1, "reward": 0}


def by_loops(full, prompt_lengths, T, align, mask=None):
    """The table of the docstring, one slot at a time."""
    B = full.shape[0]
    mask = torch.ones(B, T, dtype=torch.bool) if mask is None else mask
    out = full.new_zeros(B, T, *full.shape[2:])
    last = full.new_zeros(B, *full.shape[2:])
    for b, t in itertools.product(range(B), range(T)):
        if mask[b, t]:
            out[b, t] = full[b, prompt_lengths[b] + t + OFFSET.get(align, 0)]
            last[b] = full[b, prompt_lengths[b] + t]
    return last if align == "bootstrap" else out


def test_by_hand():
    """OpenRLHF#467, SkyRL#2144: heads on prompt positions. verl#6068: `roll` to shift states. What
    comes out has T positions, taken by index."""
    full = torch.tensor([[0., 1., 2., 3., 4., 5.]])  # prompt 0 1 2, response 3 4 5
    assert tk.response_states(full, 3, 3, align="logprob").tolist() == [[2., 3., 4.]]
    assert tk.response_states(full, 3, 3, align="value").tolist() == [[2., 3., 4.]]
    assert tk.response_states(full, 3, 3, align="reward").tolist() == [[3., 4., 5.]]
    assert tk.response_states(full, 3, 3, align="bootstrap").tolist() == [5.]
    tool = torch.tensor([[True, True, False]])
    assert tk.response_states(full, 3, 3, align="bootstrap", mask=tool).tolist() == [4.]
    assert tk.response_states(full, 3, 3, align="reward", mask=tool).tolist() == [[3., 4., 0.]]
    assert_same_bits(tk.response_states(full, 3, 3), tk.response_states(full, 3, 3, "logprob"))


@pytest.mark.parametrize("align, start, stop", [("logprob", -1, -1), ("value", -1, -1),
                                                ("reward", 0, 0)])
def test_int_prompt_is_the_slice(align, start, stop):
    full = torch.randn(2, 9, 5)
    expected = full[:, 4 + start:4 + 5 + stop]
    assert_same_bits(tk.response_states(full, 4, 5, align=align), expected)
    assert_same_bits(tk.response_states(full, torch.tensor(4), 5, align=align), expected)
    assert_same_bits(tk.response_states(full, torch.tensor([4, 4], dtype=torch.int32), 5, align),
                     expected)


KINDS = ("none", "left", "right", "interior", "row", "all-false")
CASES = third((*itertools.product(ALIGNMENTS, (*DTYPES, torch.float64), (1, 7, 65),
                                  ((), (3,), (2, 2)), KINDS, (False, True)),
               *itertools.product(ALIGNMENTS, DTYPES[:2], (63, 64, 1000), ((3,),), KINDS[:4:3],
                                  (True,))), seed=3)


def test_values_and_gradients_over_the_matrix():
    for case, (align, dtype, T, inner, kind, wide) in enumerate(CASES):
        prompts = torch.tensor([2, 1, 3])
        full = torch.randn(3, T + 3, *inner).to(dtype)
        mask = sample_mask(kind, 3, T, case)
        expected = by_loops(full, prompts.tolist(), T, align, mask)
        leaf = (strided(full) if wide and inner else full.clone()).requires_grad_()
        out = tk.response_states(leaf, prompts, T, align, mask=mask)
        assert_same_bits(out.detach(), expected, str(CASES[case]))
        twin = full.clone().requires_grad_()
        grad = torch.randn(expected.shape).to(dtype)
        out.backward(strided(grad) if wide and inner else grad)
        (by_loops(twin, prompts.tolist(), T, align, mask) + 0 * twin.sum()).backward(grad)
        assert leaf.grad.dtype == dtype
        assert_same_bits(leaf.grad, twin.grad, f"gradient of {CASES[case]}")


@pytest.mark.parametrize("align", ALIGNMENTS)
def test_packed_equals_padded(align):
    """Packed prompt and response; the result is padded, as the lengths of responses differ."""
    prompts, responses = [2, 4, 1, 3], [5, 0, 3, 1]
    lengths = [p + r for p, r in zip(prompts, responses, strict=True)]
    full = torch.randn(4, max(lengths), 3, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor(responses)[:, None]
    mask[0, 1] = False
    packed, cu = pack(full, lengths)
    one, two = full.requires_grad_(), packed.detach().requires_grad_()
    a = tk.response_states(one, torch.tensor(prompts), 5, align, mask=mask)
    b = tk.response_states(two, torch.tensor(prompts), 5, align, mask=mask, cu_seqlens=cu)
    assert_same_bits(b.detach(), a.detach())
    grad = torch.randn_like(a)
    a.backward(grad)
    b.backward(grad)
    assert_same_bits(two.grad, pack(one.grad, lengths)[0])
    assert not b[~mask].any() if align != "bootstrap" else not b[1].any()


@pytest.mark.parametrize("align", ALIGNMENTS)
@pytest.mark.parametrize("packed", (False, True))
def test_gradcheck(align, packed):
    full = torch.randn(3, 7, 2, dtype=torch.float64)
    mask = torch.tensor([[True, False, True], [False] * 3, [True, True, False]])
    cu = torch.tensor([0, 7, 14, 21], dtype=torch.int32) if packed else None
    leaf = (full.flatten(0, 1) if packed else full).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: tk.response_states(x, torch.tensor([2, 4, 3]), 3, align, mask=mask,
                                     cu_seqlens=cu), leaf)
    if not packed:
        assert torch.autograd.gradcheck(lambda x: tk.response_states(x, 3, 4, align), leaf)


@pytest.mark.parametrize("poison", POISONS)
def test_poison(poison):
    """prime-rl#2085: what stands in masked slots reaches neither a result nor a gradient."""
    for align, kind in itertools.product(ALIGNMENTS, ("right", "interior", "row", "all-false")):
        mask, prompts = sample_mask(kind, 4, 6), torch.tensor([1, 2, 3, 2])
        full = torch.randn(4, 9)
        used = torch.zeros(4, 9, dtype=torch.bool)
        marks = by_loops(torch.arange(36.).reshape(4, 9) + 1, prompts.tolist(), 6, align, mask)
        used.view(-1)[(marks[marks > 0] - 1).long()] = True

        def run(fill, align=align, mask=mask, prompts=prompts, full=full, used=used):
            x = torch.where(used, full, fill).requires_grad_()
            out = tk.response_states(x, torch.where(mask.any(1), prompts, -(10 ** 12)), 6, align,
                                     mask=mask)
            valid = mask if align != "bootstrap" else mask.any(1)
            out.backward(torch.where(valid, 0.5, fill))
            return out.detach(), x.grad

        assert_same_bits(run(poison), run(0.0))
        assert not run(poison)[1][~used].any()


def test_expanded_sliced_and_missing_gradients():
    """verl#6960: strided gradients read as contiguous; verl#6913, Liger#968: lost gradients."""
    full = torch.randn(3, 8, 4, requires_grad=True)
    tk.response_states(full, 3, 4).sum().backward()  # an expanded gradient
    assert_same_bits(full.grad[:, 2:6], torch.ones(3, 4, 4))
    assert not full.grad[:, :2].any() and not full.grad[:, 6:].any()
    full.grad = None
    (tk.response_states(full, 3, 4)[:, ::2].transpose(1, 2) * 3).sum().backward()
    assert_same_bits(full.grad[0, 2:6, 0], torch.tensor([3., 0., 3., 0.]))
    with torch.no_grad():
        assert not tk.response_states(full, 3, 4).requires_grad
    with torch.inference_mode():
        tk.response_states(full, 3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tk.response_states(full, 3, 4).dtype == torch.float32


def test_never_shares_memory_and_is_attached_when_empty():
    full = torch.randn(2, 6, 3)
    out = tk.response_states(full, 1, 5)
    out.zero_()
    assert full.all()
    for T, shape in ((0, (2, 0, 3)), (3, (0, 3, 3))):
        empty = torch.randn(shape[0], 6, 3, requires_grad=True)
        out = tk.response_states(empty, 2, T)
        assert out.shape == shape and out.requires_grad
        out.sum().backward()
        assert not empty.grad.any()
        last = tk.response_states(empty, 2, T, "bootstrap")
        assert last.shape == (shape[0], 3) and not last.any()
    nothing = torch.zeros(0, 3, requires_grad=True)
    out = tk.response_states(nothing, 1, 2, mask=torch.zeros(2, 2, dtype=torch.bool),
                             cu_seqlens=torch.zeros(3, dtype=torch.int32))
    assert_same_bits(out.detach(), torch.zeros(2, 2, 3))
    out.sum().backward()


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from(ALIGNMENTS), st.integers(1, 4), st.integers(1, 6))
def test_ragged_batches(seed, align, B, T):
    """Each sequence alone, right-padded or left-padded prompts, gives the same states."""
    g = torch.Generator().manual_seed(seed)
    prompts = torch.randint(1, 5, (B,), generator=g)
    lengths = torch.randint(0, T + 1, (B,), generator=g)
    mask = torch.arange(T) < lengths[:, None]
    rows = [torch.randn(int(p + n), 2, generator=g) for p, n in zip(prompts, lengths, strict=True)]
    full = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=float("nan"))
    out = tk.response_states(full, prompts, T, align, mask=mask)
    width = int(prompts.max())  # left-pad the prompts to one width
    left = torch.full((B, width + T, 2), float("nan"))
    for b, row in enumerate(rows):
        left[b, width - int(prompts[b]):][:len(row)] = row
        alone = tk.response_states(row[None], int(prompts[b]), int(lengths[b]), align)[0]
        assert_same_bits(out[b] if align == "bootstrap" else out[b, :len(alone)], alone)
    assert_same_bits(tk.response_states(left, width, T, align, mask=mask), out)


@pytest.mark.parametrize("align", ALIGNMENTS)
def test_opcheck(align):
    fwd = torch.ops.tppo_kernels.response_states_fwd.default
    bwd = torch.ops.tppo_kernels.response_states_bwd.default
    prompts, mask = torch.tensor([2, 1]), sample_mask("interior", 2, 4)
    cu = torch.tensor([0, 6, 13], dtype=torch.int32)
    for full, m, c in ((torch.randn(2, 7, 3), mask, None), (torch.randn(2, 7), None, None),
                       (torch.randn(13, 3), mask, cu)):
        torch.library.opcheck(fwd, (full, prompts, m, c, 4, align))
        out = fwd(full, prompts, m, c, 4, align)
        torch.library.opcheck(bwd, (out, prompts, m, c, full.shape[0 if c is not None else 1], 4,
                                    align))


@pytest.mark.parametrize("align", ("logprob", "bootstrap"))
def test_compiles_as_one_graph_and_exports(align):
    def call(full, prompts, mask):
        states = tk.response_states(full * 2, prompts, 4, align, mask=mask)
        return states, tk.response_states(full, 3, 4, align)

    def gradient(function, full, *args):
        full = full.clone().requires_grad_()
        one, two = function(full, *args)
        (one.square().sum() + two.sum()).backward()
        return one.detach(), two.detach(), full.grad

    args = (torch.randn(2, 7, 3), torch.tensor([2, 3]), sample_mask("interior", 2, 4))
    assert_same_bits(gradient(torch.compile(call, fullgraph=True, backend="aot_eager"), *args),
                     gradient(call, *args))

    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return call(*inputs)

    program = torch.export.export(Module(), args)
    assert_same_bits(tuple(program.module()(*args)), call(*args))


def test_fifty_lengths_two_graphs():
    """Liger#146, fla#533: a recompilation for every length."""
    calls = [(torch.randn(2, 9 + 2 * t, 3, requires_grad=True), 3 + t, 2 + t) for t in range(50)]
    assert count_graphs(lambda full, P, T: tk.response_states(full, P, T), calls) <= 2
    ragged = [(torch.randn(2, 9 + t, 3), torch.tensor([2, 3]), sample_mask("interior", 2, 2 + t))
              for t in range(50)]
    assert count_graphs(lambda full, P, m: tk.response_states(full, P, m.shape[1], mask=m),
                        ragged) <= 2


X = torch.zeros(2, 6, 3)
MASK = torch.ones(2, 4, dtype=torch.bool)


@pytest.mark.parametrize("error, words, args, kwargs", [
    (TypeError, "full is list", ([0.0], 1, 1), {}),
    (ValueError, r"full has shape \[6\], expected \[B, L\]", (torch.zeros(6), 1, 1), {}),
    (TypeError, "full has dtype int64, expected float32", (X.long(), 1, 1), {}),
    (ValueError, "prompt_length is 0, expected a number >= 1", (X, 0, 4), {}),
    (ValueError, "prompt_length is -1, expected a number >= 0", (X, -1, 4, "reward"), {}),
    (TypeError, "prompt_length is float", (X, 1.0, 4), {}),
    (TypeError, "prompt_length has dtype float32", (X, torch.ones(2), 4), {}),
    (ValueError, r"prompt_length has shape \[3\]", (X, torch.ones(3).long(), 4), {}),
    (ValueError, "prompt_length is 0 and T is 4: align='logprob' puts token 0 of sequence 1 at "
     r"position -1, expected a position in \[0, 6\)", (X, torch.tensor([1, 0]), 4), {}),
    (ValueError, "prompt_length is 4 and T is 4: align='logprob' needs 7 states a sequence, full "
     "has L = 6", (X, 4, 4), {}),
    (ValueError, "needs 7 states", (X, 3, 4, "reward"), {}),
    (ValueError, "needs 7 states", (X, 3, 4, "bootstrap"), {}),
    (ValueError, "puts token 3 of sequence 1 at position 6", (X, torch.tensor([2, 3]), 4, "reward"),
     {}),
    (ValueError, "puts token 3 of sequence 0 at position 6", (X, 3, 4, "bootstrap"),
     {"mask": MASK}),
    (ValueError, "T is 1099511627776, expected up to the 6 tokens of full",
     (X, torch.tensor([2, 3]), 2**40), {}),
    (ValueError, "T is -1, expected a number >= 0", (X, 1, -1), {}),
    (TypeError, "T is float", (X, 1, 2.0), {}),
    (ValueError, "align is 'rewards', expected one of 'logprob'", (X, 1, 4, "rewards"), {}),
    (ValueError, r"mask has shape \[2, 4\].*\[2, 3\] as full, T", (X, 1, 3), {"mask": MASK}),
    (TypeError, "mask has dtype float32, expected bool", (X, 1, 4), {"mask": MASK.float()}),
    (ValueError, "cu_seqlens is .*end at N = 2", (X[:, 0], 1, 1),
     {"cu_seqlens": torch.tensor([0, 1], dtype=torch.int32)}),
    (ValueError, "sequence 0 at position 2, expected a position in .0, 2.", (X[0], 1, 3),
     {"cu_seqlens": torch.tensor([0, 2, 6], dtype=torch.int32)}),
    (TypeError, "keyword", (X, 1, 1), {"temperature": 1.0}),
])
def test_bad_input_names_the_argument(error, words, args, kwargs):
    with pytest.raises(error, match=words):
        tk.response_states(*args, **kwargs)


def test_a_slot_outside_is_nan_where_nothing_is_checked():
    """On a GPU no value is read: never an out-of-bounds read, never a plausible number."""
    from tppo_kernels.ops.response_states import reference

    out = reference.fwd(reference.ResponseStatesCall(
        torch.ones(2, 4), torch.tensor([1, 3]), None, None, 3, "reward"))
    assert_same_bits(out, torch.tensor([[1., 1., 1.], [1., float("nan"), float("nan")]]))
