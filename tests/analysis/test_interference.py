from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from analysis import AdapterSet, interference_table
from analysis.tables.interference import COLUMNS

EYE = torch.eye(8)


def value(table: pd.DataFrame, metric: str, layer: str, task_a: str, task_b: str, column: str = "value") -> float:
    keys = {"metric": metric, "layer": layer, "task_a": task_a, "task_b": task_b}
    return float(table[(table[list(keys)] == pd.Series(keys)).all(axis=1)][column].item())


def pair(left: Tensor, right: Tensor) -> AdapterSet:
    return AdapterSet.from_factors({"a": {"x": (left[0], right[0])}, "b": {"x": (left[1], right[1])}})


def columns(*indices: int) -> Tensor:
    return EYE[:, list(indices)]


def test_overlap_of_hand_made_subspaces() -> None:
    """Inputs {0, 1} and {1, 2, 3} share one of min(2, 3) directions; outputs are the same for both."""
    scales = torch.tensor([5.0, 0.1])  # overlap does not depend on them
    adapters = AdapterSet.from_factors(
        {
            "a": {"x": (columns(0, 1) * scales, columns(0, 1))},
            "b": {"x": (columns(0, 1, 2), columns(1, 2, 3))},
        }
    )
    table = interference_table(adapters)
    eps = 1e-14  # tens of float64 roundings of numbers up to 2
    assert value(table, "input_overlap", "x", "a", "b") == pytest.approx(0.5, abs=eps)
    assert value(table, "output_overlap", "x", "a", "b") == pytest.approx(1.0, abs=eps)
    assert value(table, "input_overlap", "x", "a", "b", "chance") == pytest.approx(3 / 8, abs=eps)
    assert value(table, "alignment", "x", "a", "b", "chance") == 0.0


def test_overlap_is_the_mean_squared_cosine_of_principal_angles() -> None:
    angle = 0.3
    turned = columns(0) * np.cos(angle) + columns(5) * np.sin(angle)
    table = interference_table(pair((columns(0), columns(0)), (columns(0), turned)))
    # the direction is rounded to float32
    assert value(table, "input_overlap", "x", "a", "b") == pytest.approx(np.cos(angle) ** 2, abs=2e-7)


def test_directions_that_an_update_never_uses_do_not_overlap() -> None:
    """The second column of b's left factor is zero, so its second input direction, shared with a, is unused."""
    left = columns(0, 1) * torch.tensor([1.0, 0.0])
    table = interference_table(pair((columns(0), left), (columns(1), columns(2, 1))))
    assert value(table, "input_overlap", "x", "a", "b") == pytest.approx(0.0, abs=1e-14)


def test_alignment_is_the_cosine_of_the_dense_updates() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    drawn = {
        task: {"x": (draw(9, r), draw(7, r)), "y": (draw(9, r), draw(7, r)), "z": (draw(4, r), draw(7, r))}
        for task, r in (("a", 2), ("b", 3), ("c", 3))
    }
    table = interference_table(AdapterSet.from_factors(drawn))

    def flat(task: str, layers: tuple[str, ...]) -> Tensor:
        products = [drawn[task][layer][0].double() @ drawn[task][layer][1].double().T for layer in layers]
        return torch.cat([product.ravel() for product in products])

    for a, b in (("a", "b"), ("a", "c"), ("b", "c")):
        for name, layers in (("x", ("x",)), ("z", ("z",)), ("total", ("x", "y", "z"))):
            expected = torch.cosine_similarity(flat(a, layers), flat(b, layers), dim=0).item()
            assert value(table, "alignment", name, a, b) == pytest.approx(expected, abs=1e-12)  # ~100 roundings


def test_alignment_has_a_sign() -> None:
    left, right = torch.randn(8, 2), torch.randn(8, 2)
    table = interference_table(pair((left, -3 * left), (right, right)))
    assert value(table, "alignment", "x", "a", "b") == pytest.approx(-1.0, abs=1e-12)


def test_pairs_occur_once_in_the_order_of_learning() -> None:
    one = {"h.2": (columns(0), columns(0)), "h.10": (columns(0), columns(0))}
    table = interference_table(AdapterSet.from_factors({"late": one, "early": one, "mid": one}))
    assert table.columns.tolist() == COLUMNS
    found = table[["task_a", "task_b"]].drop_duplicates().to_numpy().tolist()
    assert found == [["late", "early"], ["late", "mid"], ["early", "mid"]]
    assert table["layer"].tolist() == ["h.2", "h.10", "total"] * 3 * table["metric"].nunique()


def test_a_zero_update_has_no_direction() -> None:
    table = interference_table(pair((columns(0), columns(0) * 0), (columns(0), columns(0))))
    later = ["forward_subspace", "forward_corruption", "forward_corruption_energy", "forward_corruption_max"]
    inside = table["metric"].isin(later)
    assert table[~inside]["value"].isna().all()
    assert (table[inside]["value"] == 0.0).all()  # what is not there corrupts nothing


def test_one_task_has_nothing_to_meet() -> None:
    table = interference_table(AdapterSet.from_factors({"a": {"x": (columns(0), columns(0))}}))
    assert table.empty
    assert table.columns.tolist() == COLUMNS


def test_leakage_is_the_share_of_energy_on_the_protected_subspace(
    tmp_path: Path,
    write_run: Callable[..., Path],
    write_adapter: Callable[..., Path],
    write_memory: Callable[..., None],
) -> None:
    """ΔW has energies 9 on coordinate 0 and 1 on coordinate 3; F is spanned by the coordinates 0 and 1."""
    run = write_run(tmp_path / "run", tasks=["a", "b"], status="running", zero_shot={}, accuracy={"s": [[1, 2]] * 2})
    run = _only(run, primary="s")
    left = {"x": columns(4, 5) * torch.tensor([3.0, 1.0]), "y": columns(4, 5)}
    for number, task in enumerate("ab", start=1):
        tensors = {f"{layer}.left": factor for layer, factor in left.items()}
        tensors |= {f"{layer}.right": columns(0, 3) for layer in left}
        folder = write_adapter(run / "tasks" / f"{number:02d}-{task}", task, tensors, scaling=1.0)
        write_memory(folder, task, {"x": columns(0, 1), "y": columns(1)})
    table = interference_table(AdapterSet.load(run))
    eps = 1e-14
    assert value(table, "leakage", "x", "protected", "b") == pytest.approx(0.9, abs=eps)
    assert value(table, "leakage", "y", "protected", "b") == pytest.approx(0.0, abs=eps)
    assert value(table, "leakage", "total", "protected", "b") == pytest.approx(9 / 12, abs=eps)
    assert value(table, "leakage", "x", "protected", "b", "chance") == pytest.approx(2 / 8, abs=eps)
    assert value(table, "leakage", "total", "protected", "b", "chance") == pytest.approx((10 / 4 + 2 / 8) / 12)
    assert set(table[table["metric"] == "leakage"]["task_b"]) == {"b"}  # nothing is protected before the first task


def _only(run: Path, *, primary: str) -> Path:
    """The run folder with its record but without its tasks."""
    for file in sorted(run.rglob("tasks/*/*")):
        file.unlink()
    text = (run / "record.json").read_text().replace('"primary": "accuracy"', f'"primary": "{primary}"')
    (run / "record.json").write_text(text)
    return run
