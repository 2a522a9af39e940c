"""The interval of a share."""

from __future__ import annotations

import math

Z = 1.959964  # 95 % of a normal distribution lie within so many standard deviations


def wilson(share: float, n: int, z: float = Z) -> tuple[float, float]:
    """Wilson's interval of a share of n: (c ± z sqrt(s (1 - s) / n + z² / 4n²)) / (1 + z² / n)
    with c = s + z² / 2n; 95 % by default (Wilson, 1927).

    It stays within 0 and 1 and has a width at both ends, where share ± 1.96 se has none.
    """
    if n == 0:
        return 0.0, 1.0
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low, high = (centre - half) / scale, (centre + half) / scale
    return max(0.0, min(share, low)), min(1.0, max(share, high))  # rounding moves both ends


def difference(
    one: tuple[float, int], other: tuple[float, int], z: float = Z
) -> tuple[float, float, float]:
    """The difference of two independent shares of so many each, and its interval from Wilson's
    intervals of the two (Newcombe, 1998, method 10).
    """
    (a, n), (b, m) = one, other
    return difference_of((a, *wilson(a, n, z)), (b, *wilson(b, m, z)))


def difference_of(
    one: tuple[float, float, float], other: tuple[float, float, float]
) -> tuple[float, float, float]:
    """The difference of two independent estimates and its interval; each comes as (value, lower
    bound, upper bound): a - b - sqrt((a - low_a)² + (high_b - b)²), and likewise above
    (Zou and Donner, 2008; for shares with Wilson's intervals Newcombe's method 10).
    """
    (a, low_a, high_a), (b, low_b, high_b) = one, other
    down, up = math.hypot(a - low_a, high_b - b), math.hypot(high_a - a, b - low_b)
    return a - b, a - b - down, a - b + up
