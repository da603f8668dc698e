"""Intervals and paired tests against numbers computed by hand and against scipy."""

import doctest
import math

import numpy as np
import pytest
from scipy import stats

from analysis.studies import student_t
from analysis.studies.student_t import mean_interval, paired_test


def test_an_interval_by_hand() -> None:
    found = mean_interval([70.0, 71.0, 75.0])
    assert (found.n, found.mean) == (3, 72.0)
    assert found.sd == pytest.approx(math.sqrt(7), rel=1e-12)  # (4 + 1 + 9) / 2
    # 4.302653 is the 97.5 % quantile of Student's law with two degrees of freedom, printed to six decimals
    assert found.high - 72 == pytest.approx(4.302653 * math.sqrt(7 / 3), rel=1e-6)
    assert found.low - 72 == pytest.approx(-4.302653 * math.sqrt(7 / 3), rel=1e-6)


@pytest.mark.parametrize("level", [0.5, 0.9, 0.99])
def test_intervals_and_tests_are_those_of_scipy(level: float) -> None:
    draw = np.random.default_rng(0)
    for n in (2, 3, 10):
        x, y = draw.normal(70, 2, n), draw.normal(68, 2, n)
        found = mean_interval(x, level=level)
        assert (found.low, found.high) == pytest.approx(
            stats.t.interval(level, n - 1, loc=x.mean(), scale=stats.sem(x)), rel=1e-12
        )  # the same formula in float64
        expected = stats.ttest_rel(x, y)
        test = paired_test(x, y, level=level)
        interval = expected.confidence_interval(level)
        assert test.difference == pytest.approx((x - y).mean(), rel=1e-12)  # float64
        assert (test.t, test.p) == pytest.approx((expected.statistic, expected.pvalue), rel=1e-9)  # float64
        assert (test.low, test.high) == pytest.approx((interval.low, interval.high), rel=1e-9)  # float64


def test_flipped_signs_are_counted_exactly() -> None:
    draw = np.random.default_rng(1)
    x, y = draw.normal(0.5, 1, 6), draw.normal(0, 1, 6)
    signs = np.array(np.meshgrid(*[[1, -1]] * 6)).reshape(6, -1).T
    means = (signs * (x - y)).mean(axis=1)
    share = (np.abs(means) >= abs((x - y).mean()) * (1 - 1e-9)).mean()
    assert paired_test(x, y).p_flip == pytest.approx(share, rel=1e-9)  # a count of 64
    assert paired_test(np.arange(1.0, 7.0), np.zeros(6)).p_flip == 2 / 64  # all of one sign
    again = paired_test(draw.normal(1, 1, 30), np.zeros(30)).p_flip  # 2³⁰ choices: a fixed draw of them
    assert 0 < again < 0.01


def test_choices_of_signs_that_tie_on_paper_tie_with_rounded_scores() -> None:
    # differences −0.1, −0.1, −0.3 and 0.4 sum to −0.1, and no choice of their signs is nearer to 0
    assert paired_test([63.4, 67.8, 75.1, 68.8], [63.5, 67.9, 75.4, 68.4]).p_flip == 1.0
    # 0.1, 0.2, −0.1 and −0.5 sum to −0.3; nearer to 0 are ±(0.1 + 0.2 + 0.1 − 0.5) alone, 2 of 16
    assert paired_test([61.5, 69.5, 68.6, 68.5], [61.4, 69.3, 68.7, 69.0]).p_flip == 14 / 16


def test_one_number_has_no_spread_and_none_has_no_mean() -> None:
    one = mean_interval([72.0])
    assert (one.n, one.mean) == (1, 72.0)
    assert np.isnan(one[2:]).all()
    assert mean_interval([]).n == 0
    assert np.isnan(mean_interval([float("nan")])[1:]).all()
    test = paired_test([72.0], [70.0])
    assert (test.n, test.difference) == (1, 2.0)
    assert np.isnan(test[2:]).all()


def test_unknown_numbers_do_not_count() -> None:
    assert mean_interval([70.0, float("nan"), 72.0]) == mean_interval([70.0, 72.0])
    gaps = paired_test([70.0, float("nan"), 73.0, 1.0], [69.0, 5.0, 70.0, float("nan")])
    assert gaps == paired_test([70.0, 73.0], [69.0, 70.0])


def test_equal_numbers_leave_nothing_to_test() -> None:
    assert mean_interval([0.1 + 0.2, 0.3, 0.3]).sd == 0.0  # they differ by their rounding
    test = paired_test([0.1 + 0.2, 70.3], [0.2, 70.2])
    assert test.difference == pytest.approx(0.1, rel=1e-12)  # float64
    assert (test.low, test.high) == (test.difference, test.difference)
    assert np.isnan([test.t, test.p]).all()
    assert np.isnan(paired_test([1.0, 2.0], [1.0, 2.0]).p)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="level is 95, a number between 0 and 1 was expected"):
        mean_interval([1.0, 2.0], level=95)
    with pytest.raises(ValueError, match="lengths differ: 2 values, 1 of the reference"):
        paired_test([1.0, 2.0], [1.0])


def test_examples_in_docstrings() -> None:
    found = doctest.testmod(student_t)
    assert (found.attempted, found.failed) == (3, 0)
