"""Rows of logits in Triton: how each is scaled, and how it is cut into aligned groups of columns.

    v = sign(logit_scale) x,  u = v, or tanh(pre v) under a softcap,  z = factor u

A row may begin at any address. Its whole groups of G columns, 16 bytes each, are aligned; what
sticks out at both ends, fewer than G columns each, is its edge.
"""

import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # which knows no machine instruction


@triton.jit
def log2(x):
    """The logarithm by one instruction of the GPU, where `tl.log2` is a polynomial of some twenty.

    Wrong by at most 2^-22 where x is in [0.5, 2], and by 2^-22 of the result elsewhere. -inf of a
    subnormal number.
    """
    if INTERPRETED:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x],
                                         dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def row_scaling(row, temperature, temperature_ptr, stride_t, softcap, softcap_ptr, scale, scale_ptr,
             CAPPED: tl.constexpr):
    """(sign, pre, factor, slope) of a row in fp64; slope = dz/dx, where not capped."""
    zero = tl.full([], 0.0, tl.float64)  # makes tensors of what the interpreter leaves as floats
    temperature = zero + temperature
    scale = zero + scale
    softcap = zero + softcap
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + row * stride_t).to(tl.float64)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr).to(tl.float64)
    slope = scale / temperature
    sign = tl.where(scale < 0, -1.0, tl.where(scale > 0, 1.0, 0.0))
    pre = zero
    factor = tl.where(scale == 0, 1.0, tl.maximum(tl.abs(slope), 1e-37))
    if CAPPED:
        if softcap_ptr is not None:
            softcap = tl.load(softcap_ptr).to(tl.float64)
        pre = tl.abs(scale) / softcap
        factor = softcap / temperature
    return sign, pre, factor, slope


@triton.jit
def capped(v, pre):
    """tanh(pre v) to 1e-7, relative at 0 too: an odd polynomial below 0.6, 1 - 2e/(1 + e) above."""
    y = v * pre
    magnitude = tl.abs(y)
    square = y * y
    q = -5.89511963e-3 * square + 2.07959414e-2
    q = q * square - 5.37838228e-2
    q = q * square + 1.33319244e-1
    q = q * square - 3.33332986e-1
    e = tl.exp2(magnitude * (-2.0 * LOG2E))
    share = 1.0 / (1.0 + e)
    large = 1.0 - 2.0 * (e * share)
    return tl.where(magnitude < 0.6, y + y * square * q, tl.where(y < 0, -large, large))


@triton.jit
def capped_slope(v, pre):
    """1 - tanh(pre v)^2 as 4e/(1 + e)^2: where tanh is nearly 1, nothing is left of that."""
    e = tl.exp2(tl.abs(v * pre) * (-2.0 * LOG2E))
    share = 1.0 / (1.0 + e)
    return 4.0 * (e * share) * share


@triton.jit
def capped_exactly(v, pre):
    """tanh(pre v) in fp64."""
    y = v * pre
    e = tl.exp(-2.0 * tl.abs(y))
    u = (1.0 - e) / (1.0 + e)
    return tl.where(y < 0, -u, u)


@triton.jit
def row_body(off, V, G: tl.constexpr):
    """(offset of the first whole group of a row, columns before it, columns in whole groups)."""
    body_off = (off + G - 1) // G * G  # provably a multiple of 16 bytes
    lead = (body_off - off).to(tl.int32)
    return body_off, lead, tl.maximum(V - lead, 0) // G * G


@triton.jit
def part_of(tiles, part, parts):
    """The tiles [first, last) of a part."""
    share = tl.cdiv(tiles, parts)
    return part * share, tl.minimum(part * share + share, tiles)


@triton.jit
def tile_offsets(U: tl.constexpr, LG: tl.constexpr, G: tl.constexpr):
    """The columns of a tile [U, L G], and the first of the group of each: masks by whole groups.

    Two sizes, because the compiler lays threads along the one whose numbers lie together.
    """
    offsets = tl.arange(0, U)[:, None] * LG + tl.arange(0, LG)[None, :]
    return offsets, offsets // G * G


@triton.jit
def row_edge(lead, body, V, part, L: tl.constexpr, G: tl.constexpr):
    """(columns [L] outside the whole groups, which there are); the first part takes them."""
    lane = tl.arange(0, L)
    column = tl.where(lane < G, lane, lead + body + lane - G)
    end = tl.where(lane < G, tl.minimum(lead, V), V)
    return column, (lane < 2 * G) & (column < end) & (part == 0)


def aligned(x: Tensor) -> tuple[Tensor, int]:
    """A tensor that begins at the 16 bytes in which x begins, and where x begins in it."""
    shift = x.data_ptr() % 16 // x.element_size()
    if 0 < shift <= x.storage_offset():
        return x.as_strided((1,), (1,), x.storage_offset() - shift), shift
    return x, 0
