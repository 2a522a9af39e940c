"""The merge of the two parts of `prefix_attention` in Triton, interpreted, against eager."""

import pytest
import torch

from tppo_kernels._kernels import triton_prefix, varlen
from tppo_kernels.testing import DTYPES, assert_accurate, assert_same_bits


def parts(tokens, heads, d, dtype):
    """out, lse, part, weight, and which tokens are of responses, in no order."""
    rows = torch.randperm(tokens)[:max(1, 2 * tokens // 3)]
    return (torch.randn(tokens, heads, d).to(dtype), 3 * torch.randn(heads, tokens),
            torch.randn(len(rows), heads, d).to(dtype), 3 * torch.randn(heads, len(rows)), rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, heads, d", [(1, 1, 8), (7, 3, 72), (65, 2, 128), (40, 5, 64)])
def test_against_the_eager_merge(tokens, heads, d, dtype):
    given = parts(tokens, heads, d, dtype)
    given[3][:, 0] = -float("inf")  # a part without a key
    exact = varlen.merge(*(x.double() for x in given[:4]), given[4])
    eager = varlen.merge(*(x.clone() for x in given[:4]), given[4])
    actual = triton_prefix.merge(*(x.clone() for x in given[:4]), given[4])
    for name, a, x, e in zip(("out", "lse"), actual, exact, eager, strict=True):
        assert a.dtype == e.dtype
        assert_accurate(a, x, e, name=name)
    others = torch.ones(tokens, dtype=torch.bool).index_fill_(0, given[4], False)
    assert_same_bits((actual[0][others], actual[1][:, others]),
                     (given[0][others], given[1][:, others]))
    assert_same_bits(triton_prefix.merge(*(x.clone() for x in given[:4]), given[4]), actual)


def test_no_response_and_strided_parts():
    out, lse, part, weight, rows = parts(9, 2, 16, torch.float32)
    none = rows[:0]
    merged = triton_prefix.merge(out.clone(), lse.clone(), part[:0], weight[:, :0], none)
    assert_same_bits(merged, (out, lse))
    expected = triton_prefix.merge(out.clone(), lse.clone(), part, weight, rows)
    across = part.transpose(0, 1).contiguous().transpose(0, 1), weight.T.contiguous().T
    assert_same_bits(triton_prefix.merge(out.clone(), lse.clone(), *across, rows), expected)
