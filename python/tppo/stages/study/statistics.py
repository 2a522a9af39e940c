"""What is computed from outcomes: rank correlation, levels reached, intervals by resampling.

Intervals are by the paired bootstrap over seeds and users: seeds are drawn with replacement, then
within each seed drawn its users, the same ones for every arm, because arms of one seed start from
the same model and are judged by the same users.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Points = tuple[Sequence[float], Sequence[float]]  # x, y of a curve, x increasing
DRAWS = 2000
FEW_ROWS = 20


class Interval(NamedTuple):
    """A figure with its 95 % interval; an end may be infinite where a level was not reached."""

    value: float
    low: float
    high: float


def ranks(values: Sequence[float]) -> Array:
    """Ranks from 1, equal values with the mean of theirs."""
    found = np.asarray(values, dtype=np.float64)
    _, place, count = np.unique(found, return_inverse=True, return_counts=True)
    return (count.cumsum() - (count - 1) / 2)[place]


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation: Pearson's of the ranks; NaN where one of them is constant."""
    return float(_pearson(ranks(a)[None], ranks(b)[None])[0])


def _pearson(a: Array, b: Array) -> Array:
    """Pearson's correlation of the rows of a and b."""
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))


def monotone(values: Sequence[float]) -> Array:
    """The nondecreasing sequence nearest in least squares (pool adjacent violators)."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        mean, size = float(value), 1
        while blocks and blocks[-1][0] >= mean:
            before, count = blocks.pop()
            mean, size = (before * count + mean * size) / (count + size), size + count
        blocks.append((mean, size))
    return np.repeat([mean for mean, _ in blocks], [size for _, size in blocks])


def reached(level: float, x: Sequence[float], y: Sequence[float], *, log: bool = False) -> float:
    """The smallest x at which the curve y(x) reaches a level, x increasing.

    Noise must not count as reaching: the curve is first made nondecreasing.  Between two points it
    is linear in x, or in log x.  Infinite where it stays below; x[0] where it begins above.
    """
    curve = monotone(y)
    above = np.flatnonzero(curve >= level - 1e-12)
    if not len(above):
        return math.inf
    k = int(above[0])
    if k == 0:
        return float(x[0])
    share = (level - curve[k - 1]) / (curve[k] - curve[k - 1])
    if log:
        return float(math.exp((1 - share) * math.log(x[k - 1]) + share * math.log(x[k])))
    return float((1 - share) * x[k - 1] + share * x[k])


def ratio_at_level(a: Points, b: Points, at: float) -> float:
    """x of curve a over x of curve b where both have the level that b has at x = `at`.

    The curves are linear in log x; the level is that of b made nondecreasing.  Where a begins
    above it the ratio is at most a's smallest x over b's, which is what is returned; infinite where
    a never reaches it.
    """
    level = float(np.interp(math.log(at), np.log(np.asarray(b[0])), monotone(b[1])))
    return reached(level, *a, log=True) / reached(level, *b, log=True)


def interval(value: float, draws: Array) -> Interval:
    """A figure with the central 95 % of its draws, of which some may be infinite."""
    known = np.sort(draws[~np.isnan(draws)])
    if not len(known):
        return Interval(value, math.nan, math.nan)
    last = len(known) - 1
    return Interval(value, float(known[round(0.025 * last)]), float(known[round(0.975 * last)]))


def resampled(
    seeds: Sequence[Array], statistic: Callable[[Array, npt.NDArray[np.intp]], Array],
    draws: int = DRAWS,
) -> Array:  # fmt: skip
    """The mean over seeds of a statistic of each arm, resampled: [draws, arms].

    seeds: for each seed the figures of its arms, [arms, ..., users].
    statistic: gives of them and of users drawn [n, users] the statistic of each draw, [n, arms].
    """
    rng = np.random.default_rng(20251)
    total = np.zeros((draws, seeds[0].shape[0]))
    for _ in seeds:
        chosen = rng.integers(len(seeds), size=draws)
        for k, figures in enumerate(seeds):
            here = np.flatnonzero(chosen == k)
            users = figures.shape[-1]
            if len(here):
                total[here] += statistic(figures, rng.integers(users, size=(len(here), users)))
    return total / len(seeds)


def means(figures: Array, users: npt.NDArray[np.intp]) -> Array:
    """The mean over the users drawn, [n, arms], of figures [arms, users]."""
    return np.stack([row[users].mean(1) for row in figures], 1)


def correlations(figures: Array, users: npt.NDArray[np.intp]) -> Array:
    """The rank correlation over the answers drawn, [n, arms], of ranks [arms, 2, answers].

    The ranks are those among all answers: among those drawn they would be others, in the same
    order.
    """
    return np.stack([_pearson(a[users], b[users]) for a, b in figures], 1)


def explained_by_lines(x: Array, y: Array, known: npt.NDArray[np.bool_], fitted: int) -> float:
    """1 - Var(y - a_t - b_t x) / Var(y) of the rows from `fitted` on, where known; all [n, T].

    The lines, one a column t, are those of least squares through the rows before.  Of columns with
    fewer than `FEW_ROWS` of them no line is known, and they are left out.
    """
    errors, wanted = [np.zeros(0)], [np.zeros(0)]
    for t in range(y.shape[1]):
        here, there = known[:fitted, t], known[fitted:, t]
        if here.sum() < FEW_ROWS:
            continue
        a, b = x[:fitted, t][here], y[:fitted, t][here]
        spread = a.var()
        slope = ((a - a.mean()) * (b - b.mean())).mean() / spread if spread > 0 else 0.0
        wanted.append(y[fitted:, t][there])
        errors.append(wanted[-1] - b.mean() - slope * (x[fitted:, t][there] - a.mean()))
    off, every = np.concatenate(errors), np.concatenate(wanted)
    return float(1 - off.var() / every.var()) if len(every) and every.var() > 0 else math.nan
