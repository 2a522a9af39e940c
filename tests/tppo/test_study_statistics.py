"""Correlation, levels reached and their intervals, against answers that are known beforehand."""

import math

import numpy as np
import pytest

from tppo.stages.study.statistics import (
    correlations,
    explained_by_lines,
    interval,
    means,
    monotone,
    ranks,
    ratio_at_level,
    reached,
    resampled,
    spearman,
)

N = [25.0, 100.0, 400.0, 1600.0]


def test_ranks_and_correlation_are_those_of_the_textbook():
    assert ranks([10, 20, 10, 5]).tolist() == [2.5, 4, 2.5, 1]
    assert spearman([1, 2, 3, 4], [10, 100, 1000, 10_000]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # 1 - 6 sum d^2 / n (n^2 - 1) without ties
    assert spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))


def test_a_curve_is_made_nondecreasing_by_its_nearest():
    assert monotone([1, 3, 2, 4]).tolist() == [1, 2.5, 2.5, 4]
    assert monotone([3, 2, 1]).tolist() == [2, 2, 2]


def test_a_level_is_reached_between_two_points():
    assert reached(0.5, [0, 10, 20], [0, 0.4, 0.8]) == pytest.approx(12.5)
    assert reached(0.5, N, [0.2, 0.4, 0.6, 0.8], log=True) == pytest.approx(200)  # sqrt(100 * 400)
    assert reached(0.1, N, [0.2, 0.4, 0.6, 0.8], log=True) == 25
    assert math.isinf(reached(0.9, N, [0.2, 0.4, 0.6, 0.8], log=True))
    noisy = [0.0, 0.7, 0.3, 0.3, 0.6]  # one point above the level is not enough
    assert reached(0.5, [0, 1, 2, 3, 4], noisy) > 3


@pytest.mark.parametrize("factor", (4, 16))
def test_the_ratio_at_an_equal_level_finds_a_shift_of_the_curve(factor):
    """Curve a has at N what curve b has at factor N."""
    a = [0.1 * math.log(n * factor) for n in N]
    b = [0.1 * math.log(n) for n in N]
    for at in (400, 1600):
        assert ratio_at_level((N, a), (N, b), at) == pytest.approx(max(1 / factor, N[0] / at))
        assert ratio_at_level((N[:3], a[:3]), (N[2:], b[2:]), at) == pytest.approx(
            max(1 / factor, N[0] / at))  # fmt: skip
    assert math.isinf(ratio_at_level((N, [0, 0, 0, 0.1]), (N, b), 1600))


def test_intervals_of_means_are_as_wide_as_sampling_makes_them():
    rng = np.random.default_rng(0)
    seeds = [(rng.random((1, 400)) < 0.3).astype(float) for _ in range(5)]
    found = interval(0.3, resampled(seeds, means, 4000)[:, 0])
    width = 2 * 1.96 * math.sqrt(0.3 * 0.7 / 2000)
    # Drawing seeds too counts the users' part of the spread twice, at most.
    assert width * 0.9 < found.high - found.low < width * math.sqrt(2) * 1.1


def test_arms_are_paired_by_user_and_seeds_by_arm():
    rng = np.random.default_rng(1)
    hard = [rng.random((1, 300)) * spread for spread in (0.2, 1.0, 2.0)]
    seeds = [np.concatenate([one, one + 0.05]) for one in hard]
    draws = resampled(seeds, means, 500)
    assert draws[:, 0].std() > 0.1  # seeds differ
    assert np.allclose(draws[:, 1] - draws[:, 0], 0.05)  # and their difference does not


def test_the_correlation_of_a_draw_is_that_of_the_answers_drawn():
    rng = np.random.default_rng(2)
    truth = rng.random(300)
    score = truth + rng.normal(0, 0.2, 300)
    block = np.stack([np.stack([ranks(score), ranks(truth)])])
    whole = correlations(block, np.arange(300)[None])
    assert whole[0, 0] == pytest.approx(spearman(score, truth))
    draws = resampled([block], correlations, 2000)[:, 0]
    assert abs(draws.mean() - whole[0, 0]) < 0.02 and 0.01 < draws.std() < 0.05


def test_an_interval_may_end_at_what_was_never_reached():
    found = interval(8.0, np.array([4.0] * 50 + [math.inf] * 50))
    assert found.low == 4 and math.isinf(found.high)


def test_lines_through_what_was_paid_explain_as_much_as_they_can():
    rng = np.random.default_rng(1)
    x, noise = rng.normal(size=(2, 4000, 4))
    slopes = np.array([2.0, -2.0, 2.0, 0.0])
    y = 3 * np.arange(4) + slopes * x + noise
    known = np.arange(4) < rng.integers(2, 4, size=4000)[:, None]  # nobody has the last column
    found = explained_by_lines(x, y, known, 3000)
    assert found == pytest.approx(1 - 1 / y[3000:][known[3000:]].var(), abs=0.01)
    assert 0.5 < found < 0.95
    flat = explained_by_lines(np.zeros_like(x), y, known, 3000)  # by the position alone
    assert flat == pytest.approx(1 - 5 / y[3000:][known[3000:]].var(), abs=0.02)
    assert math.isnan(explained_by_lines(x, y, known, 5))  # too few for a line
