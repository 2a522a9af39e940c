"""The softmax of rows of logits in Triton: what `token_logprobs` and the linear operators share.

Forward keeps of a lane max v, and sum 2^d and sum d 2^d of all its columns but one with the largest
v; d = c (u - max u), see `triton_rows`.
"""

import triton
import triton.language as tl

from .triton_rows import LOG2E, capped, capped_slope

LOWEST = tl.constexpr(-3.4028234663852886e38)
NEG_INF = tl.constexpr(float("-inf"))
ALL = tl.constexpr(tl.PropagateNan.ALL)
DEAD = tl.constexpr(-160.0)  # 2^DEAD is 0 in fp32, and 0 * DEAD is 0, where 0 * -inf is NaN


@triton.jit
def position(v, pre, CAPPED: tl.constexpr):
    """u of v; -inf stands for no column."""
    if CAPPED:
        return tl.where(v == NEG_INF, NEG_INF, capped(v, pre))
    else:
        return v


@triton.jit
def losers(v, m, pre, c, CAPPED: tl.constexpr):
    """(max of m [L] and v [U, L, G], its u, and of all the others sum 2^d and sum d 2^d) a lane.

    A knock-out of pairs: where two numbers meet, the smaller one is out of the way of the largest,
    which is in no sum. NaN wins and loses every pair, and so comes into both.
    """
    U: tl.constexpr = v.shape[0]
    L: tl.constexpr = v.shape[1]
    G: tl.constexpr = v.shape[2]
    if G > 1:
        first, second = tl.split(tl.reshape(v, [U, L, G // 2, 2]))
        out = tl.minimum(first, second, propagate_nan=ALL)
        m, u, s, w = losers(tl.maximum(first, second, propagate_nan=ALL), m, pre, c, CAPPED)
        d = (position(out, pre, CAPPED) - u[None, :, None]) * c
        e = tl.exp2(d)
        weighted = e * tl.maximum(d, DEAD)
        return m, u, s + tl.sum(tl.sum(e, 2), 0), w + tl.sum(tl.sum(weighted, 2), 0)
    elif U > 1:
        return losers(tl.permute(v, (2, 1, 0)), m, pre, c, CAPPED)
    else:
        v = tl.reshape(v, [L])
        out = tl.minimum(m, v, propagate_nan=ALL)
        m = tl.maximum(m, v, propagate_nan=ALL)
        u = tl.maximum(position(m, pre, CAPPED), LOWEST, propagate_nan=ALL)
        d = (position(out, pre, CAPPED) - u) * c
        e = tl.exp2(d)
        return m, u, e, e * tl.maximum(d, DEAD)


@triton.jit
def fold(m, s, w, x, live, sign, pre, c, CAPPED: tl.constexpr):
    """Takes a tile x [U, L, G] into max v of each lane, and into sum 2^d and sum d 2^d of all its
    columns but one with the largest v; d = c (u - max u).

    Beside the 1 of that column an fp32 sum would lose what the others add, which is all of 1 - p
    where the column is probable. live: which columns count, or None for all.
    """
    v = x.to(tl.float32) * sign
    if CAPPED:
        v = tl.maximum(v, LOWEST, propagate_nan=ALL)  # a logit of -inf is a column: z = -softcap
    if live is not None:
        v = tl.where(live, v, NEG_INF)
    new, u, s_tile, w_tile = losers(v, m, pre, c, CAPPED)
    shift = tl.maximum((position(m, pre, CAPPED) - u) * c, DEAD)
    shrink = tl.exp2(shift)
    return new, shrink * s + s_tile, shrink * (w + s * shift) + w_tile


@triton.jit
def merge(m, s, w, pre, c, CAPPED: tl.constexpr):
    """The same of all lanes or parts as of each; in fp64 and in a fixed order."""
    u = position(m, pre, CAPPED)
    top = tl.max(m, 0)
    u_top = tl.maximum(position(top, pre, CAPPED), LOWEST)
    d = tl.maximum((u - u_top) * c, DEAD)
    shrink = tl.exp2(d).to(tl.float64)
    s = s.to(tl.float64) + tl.where(u == float("inf"), float("nan"), 0.0)
    tops = tl.sum((u == u_top).to(tl.float64), 0)
    own = tl.where(u == u_top, 0.0, shrink)  # of the largest of a lane, which is not in its sum
    total = tl.sum(s * shrink + own, 0) + tl.maximum(tops - 1.0, 0.0)
    return top, total, tl.sum((w + s * d) * shrink + own * d, 0)


@triton.jit
def log1p(x):
    """log(1 + x) in fp64 for x >= 0: what 1 + x rounds away is made up for."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / tl.where(y == 1.0, 1.0, y - 1.0)))


@triton.jit
def row_gradients(row, g_logprob_ptr, stride_lp, g_entropy_ptr, stride_ent, slope):
    """(a, b) = slope (g_lp, g_ent); b is None where entropy has no gradient."""
    a = slope * 0.0
    b = None
    if g_logprob_ptr is not None:
        a = slope * tl.load(g_logprob_ptr + row * stride_lp).to(tl.float32)
    if g_entropy_ptr is not None:
        b = slope * tl.load(g_entropy_ptr + row * stride_ent).to(tl.float32)
    return a, b


@triton.jit
def at_target(logprob, a, b, entropy):
    """dx at the target, without the slope of a softcap: 1 - p is no difference here."""
    half = capped(tl.maximum(logprob, DEAD), 0.5)
    dx = a * (-2.0 * half / (1.0 - half))  # 1 - e^y = -2 tanh(y / 2) / (1 - tanh(y / 2))
    if b is not None:
        dx -= tl.exp2(logprob * LOG2E) * (b * (tl.maximum(logprob, DEAD) + entropy))
    return dx


@triton.jit
def gradient(x, hit, of_target, sign, pre, factor, a, b, entropy, top, log_sum,
             CAPPED: tl.constexpr):
    """dx = slope (1 - tanh^2 if capped) (g_lp (1[hit] - p) - g_ent p (log p + entropy))."""
    v = x.to(tl.float32) * sign
    u = v
    if CAPPED:
        u = capped(v, pre)
    log_p = tl.fma(u, factor, -top) - log_sum
    p = tl.exp2(log_p * LOG2E)
    if b is None:
        dx = p * -a
    else:
        dx = p * (-a - b * (tl.maximum(log_p, DEAD) + entropy))
    dx = tl.where(hit, of_target, dx)
    if CAPPED:
        dx = dx * capped_slope(v, pre)
    return dx
