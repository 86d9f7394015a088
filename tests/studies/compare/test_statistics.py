"""Paired differences against scipy's own test and against numbers out of a book."""

import math

import numpy as np
import pytest
from scipy import stats

from fm_stages.studies.compare.statistics import mean_of, paired

ARM, REFERENCE = {0: 1.0, 1: 3.0, 2: 2.0}, {0: 2.0, 1: 2.5, 2: 3.0}


def test_three_seeds_by_hand():
    """Differences -1, 0.5, -1: mean -0.5, deviation sqrt(0.75); t(2) has quantiles 4.302653 and 1.060660."""
    pair = paired(ARM, REFERENCE)
    error = math.sqrt(0.75 / 3)
    assert pair.num_seeds == 3
    assert pair.mean == pytest.approx(-0.5)
    assert pair.low == pytest.approx(-0.5 - 4.302653 * error, rel=1e-6)
    assert pair.high == pytest.approx(-0.5 + 4.302653 * error, rel=1e-6)
    assert pair.smallest == pytest.approx((4.302653 + 1.060660) * error, rel=1e-6)
    assert not pair.shown
    assert pair.relative == pytest.approx(-0.5 / 2.5)


@pytest.mark.parametrize("num", [2, 5, 12])
def test_the_interval_is_that_of_scipys_paired_test(num):
    generator = np.random.default_rng(num)
    x, y = generator.normal(1.0, 1, num), generator.normal(0.0, 1, num)
    pair = paired(dict(enumerate(x.tolist())), dict(enumerate(y.tolist())))
    test = stats.ttest_rel(x, y)
    assert (pair.low, pair.high) == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert pair.shown == (test.pvalue < 0.05)


def test_the_smallest_difference_is_found_four_times_in_five():
    """Simulated, with ten seeds, where the approximation is good to a per cent."""
    generator = np.random.default_rng(0)
    noise = generator.normal(size=(1500, 10))
    exact = (stats.t.ppf(0.975, 9) + stats.t.ppf(0.8, 9)) / math.sqrt(10)  # at the true deviation, 1
    mean_smallest = np.mean([paired(dict(enumerate(row)), dict.fromkeys(range(10), 0.0)).smallest for row in noise])
    assert mean_smallest == pytest.approx(exact, rel=0.05)
    shown = [paired(dict(enumerate(row)), dict.fromkeys(range(10), 0.0)).shown for row in noise + exact]
    assert np.mean(shown) == pytest.approx(0.8, abs=0.03)


def test_one_seed_has_no_interval():
    pair = paired({0: 1.0}, {0: 3.0})
    assert (pair.mean, pair.low, pair.high, pair.smallest, pair.shown) == (-2.0, None, None, None, False)


def test_only_seeds_that_both_have_are_paired():
    assert paired({0: 1.0, 2: 5.0}, {0: 3.0, 1: 9.0}).num_seeds == 1
    assert paired({0: 1.0, 1: math.nan}, {0: 3.0, 1: 9.0}).mean == -2.0
    assert paired({0: 1.0, 1: math.nan}, {0: 4.0, 1: 9.0}).relative == -0.75  # of the seeds that are paired
    assert math.isnan(paired({0: 1.0}, {0: 0.0}).relative)
    assert paired({0: 1.0}, {1: 3.0}) is None


def test_equal_arms_differ_by_nothing():
    pair = paired(ARM, ARM)
    assert (pair.mean, pair.low, pair.high, pair.smallest, pair.shown) == (0, 0, 0, 0, False)


def test_mean_of_what_is_finite():
    assert mean_of([1.0, math.nan, 3.0]) == 2.0
    assert math.isnan(mean_of([]))
