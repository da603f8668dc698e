"""Metrics against published numbers and matrices made by hand."""

import doctest
from collections.abc import Callable

import numpy as np
import pytest

from manifold_cl.continual import metrics
from manifold_cl.continual.metrics import (
    METRICS,
    bwt,
    bwt_over_all,
    forgetting,
    forgetting_just_learned,
    fwt,
    fwt_flat,
    maa,
    mfn,
    mft,
)

Figure = Callable[[metrics.Matrix], float]

HIDE_ROWS = (  # HiDe on UCIT, rows after task 1 to 6
    (91.87,),
    (91.30, 93.27),
    (89.10, 92.33, 54.88),
    (87.23, 90.83, 49.07, 81.67),
    (84.73, 91.57, 46.19, 66.67, 67.03),
    (83.50, 90.60, 48.51, 66.60, 61.63, 55.32),
)
HIDE = np.full((6, 6), np.nan)
for _i, _row in enumerate(HIDE_ROWS):
    HIDE[_i, : _i + 1] = _row

BY_HAND = [[80.0, 40.0, 10.0], [90.0, 70.0, 30.0], [60.0, 75.0, 50.0]]


@pytest.mark.parametrize(
    ("figure", "published"),
    [(mft, 74.01), (mfn, 67.69), (maa, 79.84), (bwt, -7.58), (forgetting_just_learned, 7.58)],
)
def test_the_published_figures_of_the_published_matrix(figure: Figure, published: float) -> None:
    assert figure(HIDE) == pytest.approx(published, abs=0.005)  # printed to two decimals


def test_figures_that_need_the_unknown_upper_triangle_are_nan() -> None:
    for figure in (fwt, fwt_flat, forgetting):
        assert np.isnan(figure(HIDE))


@pytest.mark.parametrize(
    ("figure", "expected"),
    [
        (mft, (80 + 70 + 50) / 3),
        (mfn, (60 + 75 + 50) / 3),
        (maa, (80 + (90 + 70) / 2 + (60 + 75 + 50) / 3) / 3),
        (bwt, ((60 - 80) + (75 - 70)) / 2),
        (bwt_over_all, ((60 - 80) + (75 - 70) + 0) / 3),
        (fwt, (40 + (10 + 30) / 2) / 2),  # a mean of means by column
        (fwt_flat, (40 + 10 + 30) / 3),  # every entry counts the same
        (forgetting, ((90 - 60) + (75 - 75)) / 2),  # from the best at any time, not from the diagonal
        (forgetting_just_learned, ((80 - 60) + (70 - 75)) / 2),  # a task that gained counts as negative
    ],
)
def test_every_figure_of_a_matrix_made_by_hand(figure: Figure, expected: float) -> None:
    assert figure(BY_HAND) == pytest.approx(expected, rel=1e-15)  # float64 sums of small numbers


def test_backward_transfer_is_the_scaled_gap_of_final_and_fresh_accuracy() -> None:
    draws = np.random.default_rng(0).uniform(0, 100, (20, 5, 5))
    for a in draws:
        assert bwt(a) == pytest.approx((mfn(a) - mft(a)) * 5 / 4, rel=1e-10, abs=1e-10)  # float64
        assert bwt_over_all(a) == pytest.approx(bwt(a) * 4 / 5, rel=1e-10, abs=1e-10)  # float64


def test_the_two_conventions_of_forgetting_are_ordered_and_one_is_backward_transfer() -> None:
    for a in np.random.default_rng(1).uniform(0, 100, (20, 5, 5)):
        assert forgetting_just_learned(a) == pytest.approx(-bwt(a), abs=1e-12)  # float64, numbers up to 100
        assert forgetting(a) >= forgetting_just_learned(a)


def test_transfer_ignores_what_was_learned_and_what_was_kept() -> None:
    changed = np.array(BY_HAND)
    changed[np.tril_indices(3)] = 0.0
    assert (fwt(changed), fwt_flat(changed)) == (fwt(BY_HAND), fwt_flat(BY_HAND))


def test_a_matrix_that_is_still_growing_has_no_final_figures() -> None:
    growing = np.array(BY_HAND)
    growing[2] = np.nan
    assert np.isnan(
        [METRICS[name](growing) for name in ("mft", "mfn", "maa", "bwt", "forgetting", "forgetting_just_learned")]
    ).all()
    assert fwt(growing) == fwt(BY_HAND)  # what it needs is known one task earlier
    assert fwt_flat(growing) == fwt_flat(BY_HAND)


def test_a_single_task_has_accuracy_but_no_transfer() -> None:
    assert (mft([[55.0]]), mfn([[55.0]]), maa([[55.0]])) == (55.0, 55.0, 55.0)
    assert np.isnan([figure([[55.0]]) for figure in (bwt, fwt, fwt_flat, forgetting, forgetting_just_learned)]).all()


@pytest.mark.parametrize("name", sorted(METRICS))
@pytest.mark.parametrize("a", [[[1.0, 2.0]], [1.0, 2.0], [], [[[1.0]]]])
def test_matrices_that_are_not_square_are_refused(name: str, a: metrics.Matrix) -> None:
    with pytest.raises(ValueError, match=r"an accuracy matrix is square, \(tasks, tasks\), got shape \("):
        METRICS[name](a)


def test_examples_in_docstrings() -> None:
    found = doctest.testmod(metrics)
    assert (found.attempted, found.failed) == (4, 0)
