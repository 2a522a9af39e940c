"""Makes Triton's interpreter compute as a GPU does where it is silently wrong.

It keeps bf16 as bit patterns: arithmetic, `dot` and casts other than to and from fp32 act on those
bits, casts from fp32 truncate. Here values are computed in fp32 and rounded to nearest even once.
Its maximum and minimum propagate NaN, a GPU's return the other operand. Triton 3.6 makes a whole
number of an array of one element by a conversion that numpy 2.4 and later refuse.
"""

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceScanOpInterface, TensorHandle

_convert_float = interpreter._convert_float
_unary, _binary, _dot, _cast = (InterpreterBuilder.unary_op, InterpreterBuilder.binary_op,
                                InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl)
_apply = ReduceScanOpInterface.apply
_patch_tensor = interpreter._patch_lang_tensor


def widen(bits):
    """bf16 bit patterns as the fp32 values that they are."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def narrow(values):
    """fp32 values as bf16 bit patterns, rounded to nearest even; NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), ((bits >> 16) | 0x40).astype(np.uint16), rounded)


def _is_bf16(handle):
    return handle.dtype.scalar == tl.bfloat16


def _wide(handle):
    return TensorHandle(widen(handle.data), tl.float32) if _is_bf16(handle) else handle


def convert_float(data, source, target, rounding):
    if source == tl.bfloat16 and target == tl.float32:
        return widen(data)
    if (source == tl.float32 and target == tl.bfloat16
            and rounding != interpreter._ir.ROUNDING_MODE.RTZ):
        return narrow(data)
    return _convert_float(data, source, target, rounding)


def unary_op(self, x, op):
    if _is_bf16(x):
        return TensorHandle(narrow(op(widen(x.data))), tl.bfloat16)
    return _unary(self, x, op)


def binary_op(self, left, right, op):
    if not _is_bf16(left):
        return _binary(self, left, right, op)
    result = np.asarray(op(widen(left.data), widen(right.data)))
    if result.dtype == np.bool_:
        return TensorHandle(result, tl.int1)
    return TensorHandle(narrow(result), tl.bfloat16)


def create_dot(self, a, b, accumulator, *rest):
    return _dot(self, _wide(a), _wide(b), accumulator, *rest)


def cast_impl(self, source, target):
    if _is_bf16(source) and target.scalar != tl.float32:
        return _cast(self, _wide(source), target)
    if target.scalar == tl.bfloat16 and source.dtype.scalar != tl.float32:
        return TensorHandle(narrow(source.data.astype(np.float32)), tl.bfloat16)
    return _cast(self, source, target)


def apply(self, values):
    for x in values if isinstance(values, tuple) else (values,):
        if x.dtype.scalar == tl.bfloat16:
            raise TypeError("a reduction or scan over bf16: convert to fp32 first")
    return _apply(self, values)


def patch_tensor(tensor, scope):
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def patch():
    """Puts all of it in the interpreter's place, for the life of the process."""
    interpreter._convert_float, interpreter._patch_lang_tensor = convert_float, patch_tensor
    InterpreterBuilder.unary_op, InterpreterBuilder.binary_op = unary_op, binary_op
    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl
    InterpreterBuilder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    InterpreterBuilder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    ReduceScanOpInterface.apply = apply
