"""`linear_logprobs` and `linear_ppo_loss` with Triton's row formulas, interpreted, against fp64."""

import itertools

import numpy as np
import pytest
import torch
from _linear_cases import (
    LIMIT,
    ROWS,
    SHAPED,
    assert_close,
    choose,
    distance,
    double,
    grads,
    halves,
    inputs_of,
    sample,
    textbook,
)
from _matrix import third
from triton.runtime.interpreter import InterpreterBuilder

import tppo_kernels as tk
from tppo_kernels._math import kept
from tppo_kernels.ops.linear_logprobs import _triton
from tppo_kernels.ops.linear_logprobs.reference import LinearLogprobsCall
from tppo_kernels.ops.token_logprobs import _triton as token
from tppo_kernels.testing import DTYPES, assert_same_bits, sample_mask


@pytest.fixture(autouse=True)
def products_of_a_gpu():
    with halves():
        yield


@pytest.fixture
def small(monkeypatch):
    """Blocks and tiles of 256 columns, two blocks a tile, so that few columns are several."""
    monkeypatch.setattr(token, "WARPS", 1)
    monkeypatch.setattr(token, "UNROLL", 2)
    monkeypatch.setattr(_triton, "TILE", 256)
    monkeypatch.setattr(_triton, "BLOCK_WARPS", 2)
    monkeypatch.setattr(kept, "KEPT_BLOCK", 256)


CASES = third(itertools.product((torch.float32, torch.float16), ("store", "recompute", 40_000),
                                ("both", "logprobs", "entropy"), (False, True), (5, 600)), 7)


def test_against_fp64(triton, small):
    """Tiles that are whole, cut or absent; rows that begin anywhere; every regime."""
    for case, (dtype, memory, part, shaped, v) in enumerate(CASES):
        hidden, weight, targets, bias = sample(2, 4, d=16, v=v, dtype=dtype, seed=case, spread=3.0)
        mask = sample_mask("interior", 2, 4, case)
        options = {"part": part, **(SHAPED if shaped else {})}
        more = {"bias": bias} if case % 2 else {}
        actual = grads(tk.linear_logprobs, hidden, weight, targets, mask, memory=memory, **more,
                       **options)
        exact = grads(textbook, *double(hidden, weight, targets), mask,
                      **{k: b.double() for k, b in more.items()}, **options)
        assert_close(actual, exact, dtype)
        assert not actual[2][~mask].any()


@pytest.mark.parametrize("memory", ("store", "recompute"))
@pytest.mark.parametrize("softcap", (None, 3.0))
def test_bf16(triton, small, memory, softcap):
    """Against fp64, with rows enough for roundings to 2^-8 to meet their mean square."""
    hidden, weight, targets, _ = sample(2, 24, d=16, v=300, dtype=torch.bfloat16, spread=2.0)
    actual = grads(tk.linear_logprobs, hidden, weight, targets, memory=memory, softcap=softcap)
    assert_close(actual, grads(textbook, *double(hidden, weight, targets), softcap=softcap),
                 torch.bfloat16)
    with tk.use_backend("reference"):
        expected = grads(tk.linear_logprobs, hidden, weight, targets, memory=memory,
                         softcap=softcap)
    for a, e in zip(actual[2:], expected[2:], strict=True):
        assert distance(a, e) <= 1e-3


@pytest.mark.parametrize("memory", ("store", "recompute"))
def test_few_rows(triton, small, memory):
    """Their gradients hang on few numbers: each is the sum of two of 16 bits."""
    for rows, spread, part in itertools.product((1, 3), (1.0, 6.0), ("logprobs", "entropy")):
        hidden, weight, targets, _ = sample(1, rows, d=64, v=300, dtype=torch.bfloat16, seed=rows,
                                            spread=spread)
        actual = grads(tk.linear_logprobs, hidden, weight, targets, memory=memory, part=part)
        exact = grads(textbook, *double(hidden, weight, targets), part=part)
        for a, e in zip(actual[2:], exact[2:], strict=True):
            assert distance(a, e) <= 1.05 * distance(e.to(torch.bfloat16), e)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_whole_blocks(triton, dtype):
    """The shapes of a real launch: tiles of 2048 columns, and one that is cut."""
    hidden, weight, targets, _ = sample(1, 3, d=16, v=5000, dtype=dtype, spread=3.0)
    for memory in ("store", "recompute"):
        assert_close(grads(tk.linear_logprobs, hidden, weight, targets, memory=memory),
                     grads(textbook, *double(hidden, weight, targets)), dtype)


@pytest.mark.parametrize("spread", (0.15, 6.0))
@pytest.mark.parametrize("softcap", (None, 3.0))
def test_kept_exponentials_are_accurate(triton, small, spread, softcap):
    """Nearly uniform rows and nearly certain ones."""
    hidden, weight, targets, _ = sample(2, 6, dtype=torch.float16, spread=spread, v=500)
    targets[0] = (hidden[0].float() @ weight.float().T).argmax(-1)
    options = {"part": "entropy", "softcap": softcap}
    assert_close(grads(tk.linear_logprobs, hidden, weight, targets, memory="store", **options),
                 grads(textbook, *double(hidden, weight, targets), **options), torch.float16,
                 top=30)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_a_frozen_head(triton, small, dtype):
    hidden, weight, targets, _ = sample(2, 9, v=300, dtype=dtype)
    mask = sample_mask("row", 2, 9)
    options = {"frozen": True, "part": "logprobs"}
    actual = grads(tk.linear_logprobs, hidden, weight, targets, mask, entropy_grad=False, **options)
    exact = grads(textbook, *double(hidden, weight, targets), mask, **options)
    assert_close(actual[:3], exact[:3], dtype)


@pytest.mark.parametrize("memory", ("store", "recompute"))
def test_logits_that_a_softmax_meets_rarely(triton, small, memory):
    """Rows of next to nothing but one, of a whole such block, of +-1e4, and one that climbs."""
    v, rows = 600, 5
    logits = torch.randn(rows, v)
    logits[0, :-1] = -1e30
    logits[1, :256] = -1e30
    logits[2] += 1e4
    logits[3] -= 1e4
    logits[4] = torch.linspace(-80, 80, v)
    targets = torch.full((rows,), v - 1)
    actual = grads(tk.linear_logprobs, torch.eye(rows), logits.T.contiguous(), targets,
                   memory=memory)
    exact = grads(textbook, torch.eye(rows).double(), logits.T.double(), targets)
    top = torch.where(logits < -1e29, 0, logits).abs().amax(1)
    for a, e in zip(actual[:2], exact[:2], strict=True):
        assert bool(((a - e).abs() <= 1e-4 + 2.4e-7 * top).all())
    for row in range(rows):
        assert distance(actual[3][:, row], exact[3][:, row]) <= (2e-3 if row in (2, 3) else 1e-5)


def test_what_is_not_a_number_stays_in_its_row(triton, small):
    hidden, weight, targets, _ = sample(1, 4, v=600)
    expected = tk.linear_logprobs(hidden, weight.requires_grad_(), targets, memory="store")
    hidden[0, 2] = float("nan")
    out = tk.linear_logprobs(hidden, weight, targets, memory="store")
    for a, e in zip(out, expected, strict=True):
        assert a.isnan().tolist() == [[False, False, True, False]]
        assert torch.equal(a[:, [0, 1, 3]], e[:, [0, 1, 3]])


@pytest.mark.parametrize("kind", ROWS)
def test_the_ways_to_choose_rows_and_determinism(triton, small, kind):
    hidden, weight, targets, bias = sample(2, 9, v=300, dtype=torch.bfloat16)
    mask = sample_mask("row", 2, 9)
    for memory in ("store", "recompute"):
        plain = grads(tk.linear_logprobs, hidden, weight, targets, mask, bias=bias, memory=memory)
        again = grads(tk.linear_logprobs, hidden, weight, targets, mask, bias=bias, memory=memory)
        assert_same_bits(again, plain)
        actual = grads(tk.linear_logprobs, hidden, weight, targets, mask, bias=bias, memory=memory,
                       **choose(kind, mask))
        for a, b in zip(actual, plain, strict=True):
            assert distance(a, b) < 4e-3 if a.dtype == torch.bfloat16 else distance(a, b) < 1e-6


def test_a_temperature_a_row_and_scalars_on_a_gpu(triton, small, scalars_on_a_gpu):
    hidden, weight, targets, _ = sample(2, 6, v=300)
    each = 0.5 + torch.rand(2, 6)
    exact = grads(textbook, *double(hidden, weight, targets), temperature=each.double(),
                  softcap=4.0)
    for memory in ("store", "recompute"):
        assert_close(grads(tk.linear_logprobs, hidden, weight, targets, temperature=each,
                           softcap=4.0, memory=memory), exact, torch.float32)
    once = grads(tk.linear_logprobs, hidden, weight, targets, **SHAPED)
    scalars_on_a_gpu(token)
    again = grads(tk.linear_logprobs, hidden, weight, targets, **SHAPED)
    for a, b in zip(again, once, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_target_outside_the_vocabulary_is_nan(small):
    """What a GPU does, where targets are not read on the host."""
    hidden, weight, targets, _ = sample(1, 4, v=300)
    targets[0, 1], targets[0, 2] = 300, -1
    for regime in ("none", "store"):
        out = _triton.fwd(LinearLogprobsCall(inputs_of(hidden, weight, targets), regime))
        assert out[0].isnan().tolist() == out[1].isnan().tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", ("token", "sequence"))
@pytest.mark.parametrize("frozen", (False, True))
def test_the_loss(triton, small, dtype, ratio, frozen):
    tokens = 20 if dtype == torch.bfloat16 else 6  # roundings to 2^-8 shall meet their mean square
    hidden, weight, targets, _ = sample(3, tokens, v=300, dtype=dtype)
    mask = sample_mask("row", 3, tokens)
    g = torch.Generator().manual_seed(1)
    old = textbook(*double(hidden, weight, targets))[0].float() + 0.3 * torch.randn(
        3, tokens, generator=g)
    advantages = torch.randn(3, tokens, generator=g)
    terms = {"dual_clip": 1.5, "entropy_coef": 0.1, "ref_logprobs": old + 0.2, "kl_coef": 0.3,
             "num_tokens": 1_000_000}  # slopes that fp16 alone would lose

    def by_logits(h, w):
        logprobs, entropy = textbook(h, w, targets, mask)
        return tk.ppo_loss(logprobs, old, advantages, mask, entropy=entropy, ratio=ratio,
                           **terms).loss

    def run(function, *given):
        leaves = [x.detach().clone() for x in given]
        for leaf in leaves[:1] if frozen else leaves:
            leaf.requires_grad_()
        loss = function(*leaves)
        scaled = loss * 2.0 ** 16  # as a GradScaler does
        return loss.detach(), *torch.autograd.grad(scaled, leaves[:1] if frozen else leaves)

    actual = run(lambda h, w: tk.linear_ppo_loss(h, w, targets, old, advantages, mask, ratio=ratio,
                                                 **terms).loss, hidden, weight)
    with tk.use_backend("reference"):
        exact = run(by_logits, hidden.double(), weight.double())
    assert abs(float(actual[0] - exact[0])) < 1e-5
    for a, e in zip(actual[1:], exact[1:], strict=True):
        assert distance(a, e) <= LIMIT[dtype]


def coarse_log2(x):
    """As wrong as the GPU's instruction may be, and in the two directions by turns."""
    exact = np.log2(np.where(np.abs(x) < 2.0 ** -126, 0, x))
    error = np.where((x >= 0.5) & (x <= 2), 2.0 ** -22, 2.0 ** -22 * np.abs(exact))
    signs = np.where(x.view(np.uint32) & 1, -1, 1)
    return (exact + np.where(np.isfinite(exact), signs * error, 0)).astype(np.float32)


@pytest.mark.parametrize("spread", (0.02, 0.15, 1.0, 6.0))
def test_the_logarithm_of_a_gpu_is_exact_enough(triton, small, monkeypatch, spread):
    """The gradient of the entropy from exponentials of 16 bits: their logarithm is one instruction,
    and adds less than a hundredth of what is allowed to how wrong the gradient is."""
    hidden, weight, targets, _ = sample(2, 6, v=700, dtype=torch.float16, spread=spread)
    targets[0] = (hidden[0].float() @ weight.float().T).argmax(-1)
    exact = grads(textbook, *double(hidden, weight, targets), part="entropy")
    options = {"part": "entropy", "memory": "store"}
    fine = grads(tk.linear_logprobs, hidden, weight, targets, **options)
    with monkeypatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_log2",
                      lambda self, x: self.unary_op(x, coarse_log2))
        coarse = grads(tk.linear_logprobs, hidden, weight, targets, **options)
    assert not torch.equal(coarse[3], fine[3])
    for c, f, e in zip(coarse[2:], fine[2:], exact[2:], strict=True):
        assert distance(c, e) <= distance(f, e) + LIMIT[torch.float16] / 100
