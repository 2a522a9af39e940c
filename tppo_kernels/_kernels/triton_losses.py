"""What the Triton kernels of `ppo_loss` and `value_loss` share.

A program takes every P-th sequence of a batch (`losses.arrange`) and leaves its sums in fp64; the
last program to end, told by an integer ticket, adds those of all in their order: one launch, equal
bits for equal batches, no float atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._math.sequence import KL_CLAMP
from .losses import GIVEN, SEQUENCES, TOKENS, Batch

PROGRAMS = 1024  # at most; the same on every GPU, so that results are too
BLOCK, SHORT = 512, 128  # tokens of a program in flight; of sequences up to SHORT tokens
TILE = 1024  # elements of a program in backward
_TOKENS, _SEQUENCES, _GIVEN = map(tl.constexpr, (TOKENS, SEQUENCES, GIVEN))
_KL_CLAMP = tl.constexpr(KL_CLAMP)
_tickets: dict[tuple[int, int], Tensor] = {}


def shape_of(batch: Batch) -> dict[str, int]:
    """Tokens in flight: one of two, so that lengths make two variants of a kernel at most.

    The assembler would spill a few registers to fit one more program on a processor: maxnreg.
    """
    short = batch.cu_seqlens is None and batch.tokens <= SHORT
    shape = {"BLOCK": SHORT, "num_warps": 4} if short else {"BLOCK": BLOCK, "num_warps": 8}
    return {**shape, "maxnreg": 128}


def ticket(like: Tensor) -> Tensor:
    """An int32 that is 0 when the next launch of the current stream starts, and after it again.

    One a stream, whose launches follow one another. A captured graph, which may be replayed beside
    them, zeroes one of its own.
    """
    if like.is_cpu or torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=like.device)
    key = (like.device.index, torch.cuda.current_stream(like.device).cuda_stream)
    if key not in _tickets:
        _tickets[key] = torch.zeros(1, dtype=torch.int32, device=like.device)
    return _tickets[key]


@triton.jit
def number(scalar):
    """The value of (a number, where it lies on the device if it does)."""
    if scalar[1] is None:
        return scalar[0]
    else:
        return tl.load(scalar[1]).to(tl.float32)


@triton.jit
def span(offsets_ptr, b, T, N):
    """Of sequence b: (its first token in a dense result, how many it has)."""
    if offsets_ptr is not None:
        begin = tl.load(offsets_ptr + b).to(tl.int64)
        count = tl.load(offsets_ptr + b + 1).to(tl.int64) - begin
    else:
        begin = b * T
        count = tl.minimum(N - begin, T)
    return begin, count


@triton.jit
def first_of(stride, sequence):
    """Where a sequence begins in a column: packed tokens have no stride."""
    offsets_ptr, b, begin, _ = sequence
    if offsets_ptr is not None:
        return begin
    else:
        return b * stride


@triton.jit
def valid_tokens(mask, place):
    """Which tokens of a block (sequence, offsets in it) are there and not masked."""  # [BLOCK]
    sequence, off = place
    valid = off < sequence[3]
    if mask[0] is not None:
        valid &= tl.load(mask[0] + first_of(mask[1], sequence) + off, mask=valid, other=0) != 0
    return valid


@triton.jit
def column(x, place, valid, STEP: tl.constexpr):
    """A block of a column (pointer, stride) in fp32, 0 where not valid."""  # [BLOCK]
    sequence, off = place
    if STEP == 0:
        value = tl.load(x[0] + sequence[1] * x[1]) + tl.zeros(off.shape, x[0].dtype.element_ty)
    else:
        value = tl.load(x[0] + first_of(x[1], sequence) + off, mask=off < sequence[3], other=0.0)
    return tl.where(valid, value.to(tl.float32), 0.0)


@triton.jit
def length_of(mask, sequence, BLOCK: tl.constexpr):
    """The valid tokens of a sequence, at least 1."""
    tokens = tl.zeros([BLOCK], tl.int32)
    for start in range(0, sequence[3], BLOCK):
        valid = valid_tokens(mask, (sequence, start + tl.arange(0, BLOCK)))
        tokens += valid.to(tl.int32)
    return tl.maximum(tl.sum(tokens, 0), 1).to(tl.float32)


@triton.jit
def times(weight, x):
    """weight * x, and 0 where the weight is 0: by selection, so that 0 * inf is 0."""
    return tl.where(weight == 0.0, 0.0, weight * x)


@triton.jit
def leave(parts_ptr, k, x, PROGRAMS: tl.constexpr):
    """Stores this program's sum in row k of the sums of all programs."""  # parts: [sums, P] fp64
    tl.store(parts_ptr + k * PROGRAMS + tl.program_id(0), x)


@triton.jit
def is_last(ticket_ptr):
    """Whether all other programs have left their sums; the ticket is then 0 again."""
    tl.debug_barrier()  # all threads have stored before one thread counts this program
    last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1
    if last:
        tl.store(ticket_ptr, 0)
    return last


@triton.jit
def parts_of(parts_ptr, k, PROGRAMS: tl.constexpr):
    """Row k of the programs' sums, 0 where no program is."""  # [P]
    p = tl.arange(0, PROGRAMS)
    return tl.load(parts_ptr + k * PROGRAMS + p, mask=p < tl.num_programs(0), other=0.0,
                   cache_modifier=".cg")


@triton.jit
def total(parts_ptr, k, PROGRAMS: tl.constexpr):
    """The sum of row k."""
    return tl.sum(parts_of(parts_ptr, k, PROGRAMS), 0)


@triton.jit
def scale_of(tokens, sequences, count, length, COUNT_OF: tl.constexpr):
    """1 / (count * length), both at least 1; NaN stays NaN."""
    of = tl.full([], 1.0, tl.float32)
    if COUNT_OF == _TOKENS:
        of = tokens.to(tl.float32)
    elif COUNT_OF == _SEQUENCES:
        of = sequences.to(tl.float32)
    elif COUNT_OF == _GIVEN:
        of = of * number(count)
    size = tl.full([], 1.0, tl.float32) * number(length)
    return tl.div_rn(1.0, tl.where(of < 1.0, 1.0, of) * tl.where(size < 1.0, 1.0, size))


@triton.jit
def scaled(slopes_ptr, out_ptr, n, factor, BLOCK: tl.constexpr):
    """A block of factor * slopes in the type of the result, 0 where a slope is 0."""
    off = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    slope = tl.load(slopes_ptr + off, mask=off < n, other=0.0)
    tl.store(out_ptr + off, times(slope, factor).to(out_ptr.dtype.element_ty), mask=off < n)


@triton.jit
def exp(x):
    """e^x to 1e-7 at any size: n ln2 apart in two parts, 2^n exact, a minimax polynomial."""
    x = tl.where(x > 89.0, 89.0, tl.where(x < -88.0, -88.0, x))
    n = tl.floor(x * 1.44269504 + 0.5)
    r = (x - n * 0.693359375) - n * -2.12194440e-4
    q = ((1.38143206e-3 * r + 8.36885162e-3) * r + 4.16684002e-2) * r + 1.66665196e-1
    return (((q * r + 4.99999940e-1) * r * r + r) + 1.0) * tl.exp2(n - 1.0) * 2.0


@triton.jit
def exp_beyond_linear(x, e):
    """e^x - 1 - x without cancellation, by its series below 1; e is e^x."""
    q = (x / 3628800.0 + 1.0 / 362880.0) * x + 1.0 / 40320.0
    q = (q * x + 1.0 / 5040.0) * x + 1.0 / 720.0
    q = (q * x + 1.0 / 120.0) * x + 1.0 / 24.0
    q = (q * x + 1.0 / 6.0) * x + 0.5
    return tl.where(tl.abs(x) < 1.0, x * x * q, e - 1.0 - x)


@triton.jit
def clamped_to(x, low, high):
    """x in [low, high]; NaN stays NaN."""
    return tl.where(x > high, high, tl.where(x < low, low, x))


@triton.jit
def kl(logprob, ref, clamp, ESTIMATOR: tl.constexpr):
    """A KL estimate in +-clamp (None: unbounded) and its derivative with respect to logprob: see
    `_math.sequence.kl`."""
    raw = logprob - ref
    d = clamped_to(raw, -_KL_CLAMP, _KL_CLAMP)
    beyond = tl.abs(raw) > _KL_CLAMP
    value = d
    slope = d
    if ESTIMATOR == "k1":
        slope = tl.full(d.shape, 1.0, tl.float32)
    elif ESTIMATOR == "k2":
        value = 0.5 * d * d
    elif ESTIMATOR == "abs":
        value = tl.abs(d)
        slope = tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, d))
    elif ESTIMATOR != "k1+":
        value = exp_beyond_linear(-d, exp(-d))
        if ESTIMATOR == "k3":
            slope = d - value  # 1 - e^-d
    if clamp is not None:
        if ESTIMATOR != "k1+" and ESTIMATOR != "k3+":
            beyond |= tl.abs(value) > clamp
        value = clamped_to(value, -clamp, clamp)
    return value, tl.where(beyond, 0.0, slope)
