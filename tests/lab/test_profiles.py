"""Performance profiles against an example computed by hand."""

import math

import pytest

from manifold_cl.lab.performance_profiles import area, profile, share_at


def test_a_profile_equals_one_computed_by_hand():
    """Three solvers, four instances; nobody solves the last one.

    Least costs: 10, 4, 5. Ratios: a 1, 2, never; b 3, 1, 4; c never, never, 1.
    """
    curves = profile(
        {
            "a": [10, 8, math.inf, math.inf],
            "b": [30, 4, 20, math.inf],
            "c": [math.inf, math.inf, 5, math.inf],
        }
    )
    assert curves == {"a": [(1, 0.25), (2, 0.5)], "b": [(1, 0.25), (3, 0.5), (4, 0.75)], "c": [(1, 0.25)]}
    assert [share_at(curves["b"], factor) for factor in (0.5, 1, 2.9, 3, 100)] == [0, 0.25, 0.25, 0.5, 0.75]
    by_hand = (0.25 * math.log(3) + 0.5 * math.log(4 / 3) + 0.75 * math.log(100 / 4)) / math.log(100)
    assert area(curves["b"], 100) == pytest.approx(by_hand, rel=1e-12)


def test_the_area_is_one_for_the_best_everywhere_and_ignores_what_lies_beyond():
    assert area(profile({"a": [1, 2], "b": [3, 3]})["a"], 100) == pytest.approx(1)
    assert area([(1000.0, 1.0)], 100) == 0
    assert area([], 100) == 0


@pytest.mark.parametrize(
    ("costs", "match"),
    [
        ({"a": [1, 2], "b": [1]}, r"lengths \[1, 2\]"),
        ({"a": [], "b": []}, r"lengths \[0\]"),
        ({"a": [1.0, 0.0]}, "above 0"),
        ({"a": [math.nan]}, "above 0"),
    ],
)
def test_costs_that_make_no_profile_are_refused(costs, match):
    with pytest.raises(ValueError, match=match):
        profile(costs)
