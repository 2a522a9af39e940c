"""The two parts of a response token's attention, merged in one launch; see `varlen`."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import launching_on

TILE = 2048  # numbers of a program, 16 a thread
WARPS = 4


@triton.jit(do_not_specialize=("row_ptr", "lse_ptr", "weight_ptr", "length", "count", "heads"))
def _prefix_attention_merge_kernel(out_ptr, lse_ptr, part_ptr, weight_ptr, row_ptr, length, count,
                                   heads, D, R: tl.constexpr, COLUMNS: tl.constexpr):
    """R pairs of a response token and a head in each program, all D numbers of each.

    lse is replaced where it is read: first all of a program's threads read it, then one writes.
    """
    pair = tl.program_id(0) * R + tl.arange(0, R)  # [R]
    token = pair // heads
    head = (pair - token * heads).to(tl.int64)
    here = token < count
    row = tl.load(row_ptr + token, mask=here, other=0).to(tl.int64)
    lse_ptr += head * length + row
    before = tl.load(lse_ptr, mask=here, other=0.0)
    weight = tl.load(weight_ptr + head * count + token, mask=here, other=0.0)
    d = weight - before
    share = 1.0 / (1.0 + tl.exp(-d))
    merged = tl.maximum(before, weight) + tl.log(1.0 + tl.exp(-tl.abs(d)))

    column = tl.arange(0, COLUMNS)[None, :]
    live = here[:, None] & (column < D)
    out_ptr += ((row * heads + head) * D)[:, None] + column
    own = tl.load(out_ptr, mask=live, other=0.0).to(tl.float32)
    part_ptr += (pair.to(tl.int64) * D)[:, None] + column
    other = tl.load(part_ptr, mask=live, other=0.0).to(tl.float32)
    tl.store(out_ptr, own + share[:, None] * (other - own), mask=live)
    tl.debug_barrier()
    tl.store(lse_ptr, merged, mask=here)


def merge(out: Tensor, lse: Tensor, part: Tensor, weight: Tensor, responses: Tensor
          ) -> tuple[Tensor, Tensor]:
    """(out [L, Hq, D], lse [Hq, L]), in place, with the parts [n, Hq, D], [Hq, n] of responses."""
    out, lse, part, weight = (x.contiguous() for x in (out, lse, part, weight))
    length, heads, d = out.shape
    pairs = part.shape[0] * heads
    if pairs:
        columns = triton.next_power_of_2(d)
        each = max(1, TILE // columns)
        with launching_on(out):
            _prefix_attention_merge_kernel[(triton.cdiv(pairs, each),)](
                out, lse, part, weight, responses, length, part.shape[0], heads, d, R=each,
                COLUMNS=columns, num_warps=WARPS)
    return out, lse
