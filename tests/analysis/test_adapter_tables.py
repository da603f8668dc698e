"""One pass over the layers serves every table, the command and its report."""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from analysis import (
    AdapterSet,
    AdapterTables,
    Gate,
    against_chance,
    component_table,
    interference_table,
    principal_angles,
    singular_values,
    spectrum_table,
)
from analysis.adapters import LayerUpdate
from analysis.formats import Checkpoint
from manifold_cl.cli import main

RANKS = {"news": 3, "films": 2}
SHAPES = {"h.0.q": (40, 24), "h.1.q": (40, 24), "h.0.mlp": (64, 24)}


def drawn() -> AdapterSet:
    draw = torch.Generator().manual_seed(0)
    return AdapterSet.from_factors(
        {
            task: {
                layer: (torch.randn(m, r, generator=draw), torch.randn(n, r, generator=draw))
                for layer, (m, n) in SHAPES.items()
            }
            for task, r in RANKS.items()
        }
    )


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> tuple[Counter[tuple[str, str]], list[int]]:
    """Reads of every update, and the columns of tall matrices that are decomposed."""
    reads: Counter[tuple[str, str]] = Counter()
    columns: list[int] = []
    read = AdapterSet.read

    def counting(self: AdapterSet, task: str, layers: Iterable[str]) -> Iterator[LayerUpdate]:
        for update in read(self, task, layers):
            reads[task, update.layer] += 1
            yield update

    monkeypatch.setattr(AdapterSet, "read", counting)
    for name in ("qr", "svd", "svdvals"):
        function = getattr(torch.linalg, name)

        def recorded(x: Tensor, *args: Any, _function: Any = function, **options: Any) -> Any:
            if x.shape[-2] > sum(RANKS.values()):
                columns.append(x.shape[:-2].numel() * x.shape[-1])
            return _function(x, *args, **options)

        monkeypatch.setattr(torch.linalg, name, recorded)
    return reads, columns


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["2GB", "1000"])
def test_the_command_and_its_report_decompose_every_adapter_once(
    tmp_path: Path, counted: tuple[Counter[tuple[str, str]], list[int]], budget: str
) -> None:
    drawn().save(tmp_path / "set")
    reads, columns = counted
    reads.clear()
    main(["analyze", str(tmp_path / "set"), "--out", str(tmp_path / "out"), "--memory-budget", budget])
    assert (tmp_path / "out" / "report.html").exists()
    assert reads == {(task, layer): 1 for task in RANKS for layer in SHAPES}
    # the left and the right factor of every layer, each column of them in one QR
    assert sum(columns) == 2 * len(SHAPES) * sum(RANKS.values())


def test_the_tables_are_those_of_the_functions() -> None:
    adapters, bases = drawn(), {layer: torch.eye(24)[:, :4] for layer in SHAPES}
    tables = AdapterTables(adapters, protected=bases, memory_budget=1)
    interference = interference_table(adapters, protected=bases)
    expected = {
        "singular_values": singular_values(adapters),
        "spectra": spectrum_table(adapters),
        "interference": interference,
        "against_chance": against_chance(interference),
        "components": component_table(adapters, protected=bases),
    }
    for name, table in expected.items():
        pd.testing.assert_frame_equal(getattr(tables, name), table, rtol=1e-12)
    keys = ["task_a", "task_b", "side", "layer", "index"]
    angles = [
        table.sort_values(keys, ignore_index=True) for table in (tables.principal_angles, principal_angles(adapters))
    ]
    pd.testing.assert_frame_equal(*angles, rtol=1e-12)
    assert tables.interference is tables.interference


def test_every_option_reaches_every_table() -> None:
    seen: list[tuple[int, int]] = []
    tables = AdapterTables(drawn(), memory_budget=1, progress=lambda done, total: seen.append((done, total)))
    for name in ("singular_values", "spectra", "interference", "components", "principal_angles"):
        assert len(getattr(tables, name)) > 0
    assert seen == [(1, 3), (2, 3), (3, 3)]  # one layer per batch, one pass for all tables
    with pytest.raises(ValueError, match=r"h\.0\.q.*\(7, 1\).*\(24, k\)"):
        _ = AdapterTables(drawn(), protected={"h.0.q": torch.ones(7, 1)}).spectra


def test_zero_updates_are_left_out_and_named() -> None:
    zero = torch.zeros(4, 1)
    tables = AdapterTables(
        AdapterSet.from_factors({"a": {"x": (torch.ones(4, 1), torch.ones(4, 1)), "y": (zero, zero)}})
    )
    assert set(tables.spectra["layer"]) == {"x"}
    assert tables.zeros == ["a, y", "a, y (sum of all updates so far)"]


def test_zero_updates_are_named_with_the_base_too_and_gates_see_them(tmp_path: Path) -> None:
    zero, one = torch.zeros(4, 2), torch.eye(4)[:, :2]
    adapters = AdapterSet.from_factors(
        {"a": {"x": (one, one), "y": (zero, one)}, "b": {"x": (one, one), "y": (one, one)}}
    )
    save_file({f"{layer}.weight": torch.eye(4) for layer in "xy"}, tmp_path / "model.safetensors")
    names = ["a, y", "a, y (sum of all updates so far)"]
    for base in (None, Checkpoint.load(tmp_path)):
        tables = AdapterTables(adapters, base=base)
        assert tables.zeros == names
        assert Gate.parse("frobenius_min<0.1").fails(tables.judged_spectra)
        assert Gate.parse("frobenius_min<0.1").value(tables.judged_spectra) == 0.0
        entropy = Gate.parse("entropy_min<0.1")
        assert (entropy.fails(tables.spectra), entropy.unknown(tables.judged_spectra)) == (False, ["a, y"])
        assert entropy.fails(tables.judged_spectra)


@pytest.mark.parametrize(("task", "layer", "remedy"), [("protected", "x", "tasks="), ("a", "total", "rename=")])
def test_names_that_tables_use_themselves_are_refused(task: str, layer: str, remedy: str) -> None:
    one = torch.ones(4, 1)
    with pytest.raises(ValueError, match=f"which tables call something else.*{remedy}"):
        AdapterSet.from_factors({task: {layer: (one, one)}, "b": {layer: (one, one)}})
