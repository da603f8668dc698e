"""Paired studies: one seed per order of the tasks."""

from collections.abc import Callable
from pathlib import Path

import pytest

from manifold_cl.study import read_plan

Write = Callable[..., Path]


def test_a_paired_study_has_one_seed_per_order(config: Write) -> None:
    orders = '\n[orders]\nforth = ["first", "second", "third"]\nback = ["third", "second", "first"]\n'
    plan = read_plan(config(("rank = 4", "rank = 4\npaired = true"), more=orders))
    assert plan.replicates == [("forth", 0), ("back", 1)]
    assert [cell.name for cell in plan.cells if cell.label == "ours"] == ["ours-forth-seed0", "ours-back-seed1"]
    assert plan.to_dict()["paired"] is True
    crossed = read_plan(config(more=orders))
    assert "paired" not in crossed.to_dict()  # files of earlier studies stay as they are
    assert crossed.extends(plan) is False  # cells of a paired study are no part of what changed
    wrong = config(("rank = 4", "rank = 4\npaired = true"), ("seeds = [0, 1]", "seeds = [0]"), more=orders)
    with pytest.raises(ValueError, match="one seed per order, got 1 seeds and 2 orders"):
        read_plan(wrong)


def test_a_paired_study_is_extended_by_further_pairs(config: Write) -> None:
    forth, back = 'forth = ["first", "second", "third"]', 'back = ["third", "second", "first"]'
    paired = ("rank = 4", "rank = 4\npaired = true")
    plan = read_plan(config(paired, ("seeds = [0, 1]", "seeds = [0]"), more=f"\n[orders]\n{forth}\n"))
    assert read_plan(config(paired, more=f"\n[orders]\n{forth}\n{back}\n")).extends(plan)
    assert not read_plan(config(paired, more=f"\n[orders]\n{back}\n{forth}\n")).extends(plan)  # other pairs


@pytest.mark.slow
@pytest.mark.stream
def test_the_orders_of_the_main_study_are_a_latin_square() -> None:
    plan = read_plan(Path(__file__).parents[2] / "benchmarks" / "six-orders.toml")
    orders = [list(tasks) for tasks in plan.orders.values()]
    assert all(len(set(column)) == len(orders) for column in zip(*orders, strict=True))  # each task once per place
    assert plan.replicates == list(zip(plan.orders, range(6), strict=True))
    first, *others = (plan.open_stream(order) for order in plan.orders)
    assert all({id(task) for task in other.tasks} == {id(task) for task in first.tasks} for other in others)
