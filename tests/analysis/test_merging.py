"""Merged adapters, their errors and weights, and conflicts of sign, against dense float64 twins."""

import copy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from analysis import AdapterSet, against_chance, save_figure
from analysis.activations import InputMoments, input_moments, merged_answers
from analysis.adapters import merged, merging
from analysis.plots import plot_merge
from analysis.tables import (
    Resampling,
    drift_table,
    merge_table,
    merge_weights,
    sign_conflicts,
    together,
)

TASKS = ("a", "b", "c")
SHAPES = {"0": (7, 9), "2": (6, 7)}
QUICK = Resampling(samples=50)


class Net(nn.Module):
    """Two layers by the names of `SHAPES`."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 6, bias=False))
        draw = torch.Generator().manual_seed(5)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=draw)


def adapters(tasks: tuple[str, ...] = TASKS, rank: int = 2) -> AdapterSet:
    draw = torch.Generator().manual_seed(0)
    return AdapterSet.from_factors(
        {
            task: {
                layer: (torch.randn(m, rank, generator=draw), torch.randn(n, rank, generator=draw))
                for layer, (m, n) in SHAPES.items()
            }
            for task in tasks
        }
    )


def dense(updates: AdapterSet, task: str, layer: str) -> Tensor:
    left, right = updates.factors(task, layer)
    return left.double() @ right.double().mT


def inputs_of(updates: AdapterSet) -> tuple[list[InputMoments], list[dict[str, Tensor]], nn.Sequential]:
    """Moments of the given updates per task, and the inputs of every layer that they come from."""
    model = Net().net
    draw = torch.Generator().manual_seed(1)
    batches = [torch.randn(40, 9, generator=draw) * (1 + torch.arange(9) % (place + 2)) for place in range(len(TASKS))]
    with torch.no_grad():
        seen = [{"0": x.double(), "2": model[:2](x).double()} for x in batches]
    return [input_moments(model, updates, [x]) for x in batches], seen, model


def test_sums_are_exact_and_truncated_by_their_singular_values() -> None:
    updates = adapters()
    weights = {"a": 0.5, "b": -2.0, "c": 0.0}
    result = merged(updates, {"sum": dict.fromkeys(TASKS, 1.0), "some": weights})
    short = merged(updates, {"sum": dict.fromkeys(TASKS, 1.0)}, rank=2)
    for layer in SHAPES:
        total = sum(dense(updates, task, layer) for task in TASKS)
        torch.testing.assert_close(dense(result.adapters, "sum", layer), total, rtol=1e-5, atol=1e-5)
        some = 0.5 * dense(updates, "a", layer) - 2 * dense(updates, "b", layer)
        torch.testing.assert_close(dense(result.adapters, "some", layer), some, rtol=1e-5, atol=1e-5)
        u, values, vt = torch.linalg.svd(total)
        best = u[:, :2] * values[:2] @ vt[:2]
        torch.testing.assert_close(dense(short.adapters, "sum", layer), best, rtol=1e-4, atol=1e-4)
        kept = short.kept.set_index("layer").loc[layer]
        assert kept["kept"] == pytest.approx((values[:2].square().sum() / values.square().sum()).item(), rel=1e-5)
    assert result.kept[["rule", "layer", "rank"]].to_numpy().tolist() == [
        *(["sum", "0", 6], ["sum", "2", 6]),
        *(["some", "0", 4], ["some", "2", 4]),
    ]


@pytest.mark.parametrize("small", [1024, 2])
def test_functions_see_dense_updates_and_their_results_are_truncated(
    small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "SMALL", small)
    monkeypatch.setattr(merging, "EXTRA", 1)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("another device was seeded"))
    updates = adapters()
    state = torch.random.get_rng_state()
    result = merged(updates, {"cube": lambda layer, given: given.pow(3).sum(0)}, rank=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    for layer in SHAPES:
        cubes = sum(dense(updates, task, layer) ** 3 for task in TASKS)
        u, values, vt = torch.linalg.svd(cubes)
        best = u[:, :3] * values[:3] @ vt[:3]
        # power iterations in float32 leave the third direction slightly turned
        torch.testing.assert_close(dense(result.adapters, "cube", layer), best, rtol=0.02, atol=0.02 * values[0].item())
        kept = result.kept.set_index("layer").loc[layer, "kept"]
        assert kept == pytest.approx((values[:3].square().sum() / values.square().sum()).item(), rel=1e-3)


def test_the_table_of_a_merge_is_that_of_the_inputs_themselves() -> None:
    updates = adapters()
    result = merged(updates, {"sum": dict.fromkeys(TASKS, 1.0), "half": {"a": 0.5, "b": 0.5, "c": 0.0}}).adapters
    moments, seen, model = inputs_of(together(updates, result))
    table = merge_table(updates, result, moments, resampling=QUICK).set_index(["rule", "task", "metric"])
    for rule in ("sum", "half"):
        for place, task in enumerate(TASKS):
            parts = np.zeros(3)  # ⟨ΔW, ΔW⟩, ⟨M, ΔW⟩, |M − ΔW|², each relative to |W x|²
            for layer in SHAPES:
                x, weight = seen[place][layer], model[int(layer)].weight.detach().double()
                own, both = (x @ dense(each, name, layer).mT for each, name in ((updates, task), (result, rule)))
                scale = (x @ weight.mT).square().sum()
                products = ((own * own).sum(), (own * both).sum(), (both - own).square().sum())
                parts += np.array([float(part / scale) for part in products])
            assert table.loc[(rule, task, "retained"), "value"] == pytest.approx(parts[1] / parts[0], rel=1e-4)
            assert table.loc[(rule, task, "error"), "value"] == pytest.approx(parts[2] / parts[0], rel=1e-4)
            foreign = parts[2] / parts[0] - (1 - parts[1] / parts[0]) ** 2
            assert table.loc[(rule, task, "foreign"), "value"] == pytest.approx(foreign, rel=1e-3)
    assert (table["ci_low"] <= table["value"]).mean() > 0.9
    assert (table["ci_low"] < table["ci_high"]).all()


def test_without_inputs_errors_are_those_of_the_weights() -> None:
    updates = adapters()
    result = merged(updates, {"sum": dict.fromkeys(TASKS, 1.0)}).adapters
    table = merge_table(updates, result).set_index(["task", "metric"])
    others = sum((dense(updates, "b", layer) + dense(updates, "c", layer)).square().sum() for layer in SHAPES)
    own = sum(dense(updates, "a", layer).square().sum() for layer in SHAPES)
    assert table.loc[("a", "error"), "value"] == pytest.approx((others / own).item(), rel=1e-4)
    assert table["ci_low"].isna().all()


def test_weights_of_orthogonal_updates_are_known() -> None:
    """On white inputs the mean error of w is Σ_t [(1 − w_t)² + Σ_{s≠t} w_s² |s|² / |t|²]."""
    eye = torch.eye(6)
    sizes = {"a": 1.0, "b": 2.0}
    factors = {task: {"x": (size * eye[:, [k]], eye[:, [k]])} for k, (task, size) in enumerate(sizes.items())}
    weights = merge_weights(AdapterSet.from_factors(factors))
    assert weights["weight"].tolist() == pytest.approx([1 / (1 + 1 / 4), 1 / (1 + 4)])
    assert weights[["ci_low", "ci_high"]].isna().all(axis=None)
    same = {task: {"x": (eye[:, [0]], eye[:, [0]])} for task in TASKS}
    assert merge_weights(AdapterSet.from_factors(same))["weight"].sum() == pytest.approx(1)


def test_updates_on_separate_inputs_keep_their_full_weight() -> None:
    """Each task's inputs excite its own update only: the sum loses nothing. Without inputs this is not visible."""
    eye, model = torch.eye(8), nn.Sequential(nn.Linear(8, 8))
    factors = {task: {"0": (torch.ones(8, 1), eye[:, [k]])} for k, task in enumerate("ab")}
    updates = AdapterSet.from_factors(factors)
    moments = [input_moments(model, updates, [eye[[k, k, k, k]]]) for k in range(2)]
    assert merge_weights(updates, moments, resampling=QUICK)["weight"].tolist() == pytest.approx([1, 1])
    assert merge_weights(updates)["weight"].tolist() == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("criterion", ["mean", "worst"])
def test_no_other_weights_have_a_smaller_error(criterion: str) -> None:
    updates = adapters()
    moments, _, _ = inputs_of(updates)
    found = merge_weights(updates, moments, criterion=criterion, resampling=QUICK)  # type: ignore[arg-type]
    weights = dict(zip(found["task"], found["weight"], strict=True))
    assert min(weights.values()) >= 0
    assert (found["ci_low"] <= found["ci_high"]).all()
    draw = np.random.default_rng(0)
    rules = {"best": weights}
    for number in range(20):
        near = {task: max(0.0, weight + 0.2 * draw.standard_normal()) for task, weight in weights.items()}
        rules[f"near {number}"] = near
    result = merged(updates, rules).adapters
    table = merge_table(updates, result, inputs_of(together(updates, result))[0], resampling=QUICK)
    errors = table[table["metric"] == "error"].pivot(index="rule", columns="task", values="value")
    scores = errors.mean(axis=1) if criterion == "mean" else errors.max(axis=1)
    assert scores["best"] <= scores.min() + 1e-6


def test_the_drift_of_every_update_on_every_data_set() -> None:
    updates = adapters()
    moments, seen, model = inputs_of(updates)
    table = drift_table(updates, dict(zip(TASKS, moments, strict=True)), resampling=QUICK).set_index(["data", "task"])
    ratios = []
    for layer in SHAPES:
        x, weight = seen[1][layer], model[int(layer)].weight.detach().double()
        ratios.append((x @ dense(updates, "c", layer).mT).square().sum() / (x @ weight.mT).square().sum())
    assert table.loc[("b", "c"), "value"] == pytest.approx(float(sum(ratios)) / 2, rel=1e-4)
    assert len(table) == 9


def test_examples_of_every_data_set_are_drawn_for_themselves() -> None:
    updates = adapters()
    twins = AdapterSet.from_factors(
        {task: {layer: updates.factors("c" if task == "c" else "a", layer) for layer in SHAPES} for task in TASKS}
    )
    result = merged(twins, {"third": {"a": 0.0, "b": 0.0, "c": 1.0}}).adapters
    moments, _, _ = inputs_of(together(twins, result))
    # two tasks of one update, on one data set: equal numbers, but not the same draws of examples
    table = merge_table(twins, result, [moments[0], moments[0], moments[2]], resampling=QUICK)
    first, second = (table[table["task"] == task].set_index("metric") for task in ("a", "b"))
    assert first["value"].tolist() == pytest.approx(second["value"].tolist())
    assert (first["ci_low"] != second["ci_low"]).all()
    drift = drift_table(updates, dict.fromkeys(("x", "y"), inputs_of(updates)[0][0]), resampling=QUICK)
    first, second = (drift[drift["data"] == name] for name in ("x", "y"))
    assert first["value"].tolist() == pytest.approx(second["value"].tolist())
    assert (first["ci_low"].to_numpy() != second["ci_low"].to_numpy()).all()


def test_opposite_signs_are_counted_and_compared_with_their_law() -> None:
    updates = adapters(rank=3)
    table = sign_conflicts(updates).set_index(["task_a", "task_b", "layer"])
    opposite = {layer: (dense(updates, "a", layer) * dense(updates, "c", layer) < 0).double() for layer in SHAPES}
    assert table.loc[("a", "c", "0"), "value"] == pytest.approx(opposite["0"].mean().item())
    sizes = {layer: m * n for layer, (m, n) in SHAPES.items()}
    total = table.loc[("a", "c", "total")]
    assert total["value"] == pytest.approx(sum(each.sum().item() for each in opposite.values()) / sum(sizes.values()))
    assert total["chance"] == 0.5
    assert total["chance_std"] == pytest.approx(0.5 / sum(sizes.values()) ** 0.5)
    same = AdapterSet.from_factors({task: dict(zip(SHAPES, updates_of(updates, "a"), strict=True)) for task in "xy"})
    tested = against_chance(sign_conflicts(same))
    assert (tested["value"] == 0).all()
    assert (tested["p"] < 0.01).all()  # two-sided: agreement is no chance either


def updates_of(updates: AdapterSet, task: str) -> list[tuple[Tensor, Tensor]]:
    return [updates.factors(task, layer) for layer in SHAPES]


def test_random_pairs_have_small_p_as_often_as_the_level_says() -> None:
    draw = torch.Generator().manual_seed(0)
    layers = {f"h.{i}": (12, 10) for i in range(600)}
    sides = [[torch.randn(size, 2, generator=draw) for size in shape] for shape in [*layers.values()] * 2]
    pairs = [(left, right) for left, right in sides]
    factors = {"a": dict(zip(layers, pairs[:600], strict=True)), "b": dict(zip(layers, pairs[600:], strict=True))}
    table = against_chance(sign_conflicts(AdapterSet.from_factors(factors)))
    layers_only = table[table["layer"] != "total"]
    assert layers_only["z"].std() == pytest.approx(1, abs=4 * (0.5 * 5 / 600) ** 0.5)  # kurtosis up to 9
    assert (layers_only["p"] < 0.05).mean() <= 0.05 + 3 * (0.05 * 0.95 / 600) ** 0.5


def test_the_figure_shows_every_rule_and_task(tmp_path: Path) -> None:
    rows = [
        (rule, task, "error", 0.1 * k, 0.05 * k, 0.2 * k)
        for k, (rule, task) in enumerate((rule, task) for rule in ("sum", "ties") for task in "ab")
    ]
    table = pd.DataFrame(rows, columns=["rule", "task", "metric", "value", "ci_low", "ci_high"])
    axes = plot_merge(table)
    assert [text.get_text() for text in axes.get_xticklabels()] == ["sum", "ties"]
    points = [line for line in axes.lines if line.get_label() in ("a", "b")]
    assert [line.get_ydata().tolist() for line in points] == [[0.0, pytest.approx(0.2)], [0.1, pytest.approx(0.3)]]
    assert save_figure(axes.get_figure(), tmp_path / "merge.svg").exists()
    with pytest.raises(ValueError, match="no 'retained' in the table; the metrics are error"):
        plot_merge(table, metric="retained")


def test_wrong_rules_and_data_are_named() -> None:
    updates = adapters()
    for rules, message in (
        ({}, "at least one rule"),
        ({"sum": {"a": 1.0, "b": 1.0}}, "'c' has no weight"),
        ({"sum": {"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0}}, "'d' has no weight or is no task"),
        ({"sum": dict.fromkeys(TASKS, 0.0)}, "not all zero"),
        ({"sum": {"a": 1.0, "b": 1.0, "c": float("nan")}}, "finite"),
        ({"odd": lambda layer, given: given}, r"shape \(3, 7, 9\), not \(7, 9\)"),
        ({"odd": lambda layer, given: given[0] * torch.nan}, "NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            merged(updates, rules)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rank is 0"):
        merged(updates, {"sum": dict.fromkeys(TASKS, 1.0)}, rank=0)
    moments, _, _ = inputs_of(updates)
    with pytest.raises(ValueError, match="2 data sets for 3 tasks"):
        merge_weights(updates, moments[:2])
    with pytest.raises(ValueError, match="criterion is 'median'"):
        merge_weights(updates, criterion="median")  # type: ignore[arg-type]
    zero = AdapterSet.from_factors(
        {"a": {"x": (torch.zeros(3, 1), torch.ones(3, 1))}, "b": {"x": (torch.ones(3, 1),) * 2}}
    )
    with pytest.raises(ValueError, match="a: the update changes no output"):
        merge_weights(zero)


def test_answers_are_compared_with_those_of_each_tasks_own_adapter() -> None:
    updates = adapters()
    result = merged(updates, {"sum": dict.fromkeys(TASKS, 1.0), "half": dict.fromkeys(TASKS, 0.5)}).adapters
    model, draw = Net().net, torch.Generator().manual_seed(2)
    data = {task: [torch.randn(size, 9, generator=draw) for size in (3, 5)] for task in TASKS}
    table = merged_answers(model, updates, result, data)

    def answered(update: AdapterSet | None, task: str, x: Tensor) -> Tensor:
        changed = copy.deepcopy(model)
        for layer in updates.layers if update is not None else ():
            left, right = update.factors(task, layer)  # type: ignore[union-attr]
            changed.get_submodule(layer).weight.data += left @ right.T
        with torch.no_grad():
            return changed(x).double().log_softmax(-1)

    assert set(table["rule"]) == {"", "sum", "half"}
    for (rule, task), rows in table.groupby(["rule", "task"]):
        x = torch.cat(data[str(task)])
        own = answered(updates, str(task), x)
        other = answered(result if rule else None, str(rule), x)
        each = (own.exp() * (own - other)).sum(-1)
        row = rows.set_index("metric").loc["kl"]
        assert row["value"] == pytest.approx(float(each.mean()), rel=1e-4)
        assert row["ci_low"] <= row["value"] <= row["ci_high"]
        assert row["examples"] == 8
        changed = (own.argmax(-1) != other.argmax(-1)).double().mean()
        assert rows.set_index("metric").loc["top1_change", "value"] == pytest.approx(float(changed))
    with pytest.raises(ValueError, match=f"task {TASKS[1]!r} has no data"):
        merged_answers(model, updates, result, {TASKS[0]: data[TASKS[0]]})
