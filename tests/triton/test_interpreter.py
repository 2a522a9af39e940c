"""What the interpreter is silently wrong about, and `_bf16` mends."""

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def _arithmetic_kernel(x_ptr, y_ptr, sum_ptr, less_ptr, int_ptr, N: tl.constexpr):
    offsets = tl.arange(0, N)
    x, y = tl.load(x_ptr + offsets), tl.load(y_ptr + offsets)
    tl.store(sum_ptr + offsets, x + y * x)
    tl.store(less_ptr + offsets, x < y)
    tl.store(int_ptr + offsets, x.to(tl.int32))


@triton.jit
def _round_kernel(x_ptr, out_ptr, N: tl.constexpr):
    offsets = tl.arange(0, N)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    square = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + square, tl.dot(tl.load(a_ptr + square), tl.load(b_ptr + square)))


@triton.jit
def _sum_kernel(x_ptr, out_ptr, N: tl.constexpr):
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, N)), 0))


@triton.jit
def _maximum_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    offsets = tl.arange(0, N)
    tl.store(out_ptr + offsets, tl.maximum(tl.load(x_ptr + offsets), tl.load(y_ptr + offsets)))


def test_bf16_arithmetic_is_by_value():
    x, y = torch.randn(2, 64).bfloat16() * 30
    total, less = torch.empty(64).bfloat16(), torch.empty(64, dtype=torch.bool)
    whole = torch.empty(64, dtype=torch.int32)
    _arithmetic_kernel[(1,)](x, y, total, less, whole, N=64)
    torch.testing.assert_close(total, x + y * x, rtol=0, atol=0)
    assert torch.equal(less, x < y) and torch.equal(whole, x.to(torch.int32))


def test_casts_to_bf16_round_to_nearest_even():
    x = torch.cat([torch.randn(61), torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, float("nan")])])
    out = torch.empty(64).bfloat16()
    _round_kernel[(1,)](x, out, N=64)
    torch.testing.assert_close(out, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_dot_multiplies_values():
    a, b = torch.randn(2, 16, 16).bfloat16()
    out = torch.empty(16, 16)
    _dot_kernel[(1,)](a, b, out, N=16)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-6, atol=1e-6)


def test_a_sum_of_bf16_is_refused():
    """It would add bit patterns; a kernel adds in fp32 anyway."""
    with pytest.raises(triton.runtime.errors.InterpreterError, match="convert to fp32 first"):
        _sum_kernel[(1,)](torch.randn(64).bfloat16(), torch.empty(1), N=64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maximum_returns_the_operand_that_is_a_number(dtype):
    x, y = torch.randn(2, 16).to(dtype)
    x[3] = y[5] = float("nan")
    out = torch.empty(16, dtype=dtype)
    _maximum_kernel[(1,)](x, y, out, N=16)
    assert torch.equal(out, torch.fmax(x, y))
