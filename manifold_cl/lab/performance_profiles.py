"""Performance profiles: the share of instances that a contestant solves within a factor of the best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise


def profile(costs: Mapping[str, Sequence[float]]) -> dict[str, list[tuple[float, float]]]:
    """The performance profile of each contestant: points (τ, share), where the share rises.

    The share at τ counts the instances on which the contestant costs at most τ times the least cost of all. Instances
    that nobody solves count too: all shares stay below 1. Source: dolan2002benchmarking, section 2.

    Args:
        costs: contestant → its cost on every instance, in one order, infinite where it did not solve it.

    Raises:
        ValueError: for lists of different lengths, no instances, or costs that are not positive.
    """
    lengths = {len(values) for values in costs.values()}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(f"every contestant needs a cost on each of the same instances, got lengths {sorted(lengths)}")
    if any(not cost > 0 for values in costs.values() for cost in values):
        raise ValueError("costs are above 0, and infinite where an instance is not solved")
    (count,) = lengths
    least = [min(values[place] for values in costs.values()) for place in range(count)]
    curves = {}
    for name, values in costs.items():
        ratios = sorted(cost / best for cost, best in zip(values, least, strict=True) if math.isfinite(cost))
        curves[name] = [(ratio, (place + 1) / count) for place, ratio in enumerate(ratios)]
    return curves


def share_at(curve: Sequence[tuple[float, float]], factor: float) -> float:
    """The share of a profile at a factor."""
    return max((share for ratio, share in curve if ratio <= factor), default=0.0)


def area(curve: Sequence[tuple[float, float]], most: float) -> float:
    """The mean share over log τ from 1 to ``most``: one number per profile, 1 for the best on every instance."""
    steps = [(1.0, 0.0), *curve, (most, share_at(curve, most))]
    total = 0.0
    for (left, share), (right, _) in pairwise(steps):
        total += share * (math.log(min(right, most)) - math.log(min(left, most)))
    return total / math.log(most)
