"""The page of causes is made from committed files, its verdicts hold in them, and its studies are what it says."""

import json
import math
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

import manifold_cl
from analysis import StudyResults
from manifold_cl.continual import make_method

ROOT = Path(manifold_cl.__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
TABLES: dict[str, Any] = json.loads((BENCHMARKS / "results" / "causes" / "tables.json").read_text(encoding="utf-8"))
STUDIES = {name: tomllib.loads((BENCHMARKS / f"{name}.toml").read_text("utf-8")) for name in ("causes", "six-orders")}
UPDATES = tomllib.loads((BENCHMARKS / "causes-updates.toml").read_text("utf-8"))


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_the_page_is_made_from_the_tables() -> None:
    import causes_page

    assert causes_page.page(TABLES) == (ROOT / "docs" / "causes.md").read_text(encoding="utf-8")
    assert causes_page.contrasts(causes_page.COMMITTED) == TABLES["contrasts"]


def test_the_verdicts_on_named_methods_hold() -> None:
    rows = {(row["contrast"], row["figure"]): row for row in TABLES["contrasts"]}
    names = list(dict.fromkeys(name for name, _ in rows))
    mfn = [rows[name, "mfn"] for name in names]
    assert all(row["n"] == 3 and row["p_holm"] > 0.05 for row in mfn)
    assert [row["low"] > 0 for row in mfn] == [True, False, True, False, True]
    assert mfn[1]["difference"] < 0 < mfn[1]["high"]
    assert max(row["difference"] for row in mfn) == mfn[2]["difference"]
    bwt = [rows[name, "bwt"] for name in names]
    assert bwt[1]["difference"] < 0 < bwt[1]["high"]
    assert bwt[2]["low"] < 0
    study = StudyResults.load(BENCHMARKS / "results" / "text-six").figures()
    grid = study[study["figure"] == "mfn"].pivot(index="seed", columns="label", values="value")
    assert (grid["svd_eq"] > grid["sequential_merge"]).all()
    kept = study[study["figure"] == "bwt"].pivot(index="seed", columns="label", values="value")
    assert (kept["svd_eq"] > kept["sequential_merge"]).all()
    assert (kept["balanced"] < kept["sequential_merge"]).all()
    assert (grid["balanced"] < grid["sequential_merge"]).all()
    assert 0 < (grid["eblora"] > grid["restricted"]).sum() < 3
    fwt = study[study["figure"] == "fwt"].pivot(index="seed", columns="label", values="value")
    assert ((fwt["sequential_merge"] < fwt["eblora"]) & (fwt["eblora"] < fwt["zero_shot"])).all()


def test_the_factorial_has_every_cell_at_one_rate() -> None:
    import causes_page

    study = STUDIES["causes"]
    expected = math.prod(len(levels) for levels in causes_page.LEVELS.values())
    assert len(study["methods"]) == expected == 24
    for label, options in study["methods"].items():
        core, restriction, start, norm = label.split("-")
        assert (options["core"], options["restriction"], options["start"]) == (core, restriction, start)
        assert options.get("update_norm") == (0.75 if norm == "imposed" else None)
        given = {key: value for key, value in options.items() if key != "method"}
        assert given.items() <= make_method(options["method"], **given).options().items()
    rates = [make_method(name).options() for name in ("balanced", "eblora", "restricted")]
    for rate in ("lr", "scale_lr"):
        mean = math.prod(options[rate] for options in rates) ** (1 / 3)
        (own,) = {options[rate] for options in study["methods"].values()}
        assert own == pytest.approx(mean)


def test_replicates_and_options_are_those_of_the_main_study() -> None:
    for study in (STUDIES["causes"], UPDATES):
        for key in ("stream", "orders", "seeds", "paired", "rank", "threads"):
            assert study[key] == STUDIES["six-orders"][key], key
    assert UPDATES["methods"].items() <= STUDIES["six-orders"]["methods"].items()


def test_changes_of_the_script_are_those_of_the_page() -> None:
    import causes

    names = [*causes.shapes(), *causes.sizes()]
    assert len(set(names)) == len(names) == 3 * 7 + 3 + 6
    page = (ROOT / "docs" / "causes.md").read_text(encoding="utf-8")
    for kind in {name.split()[0] for name in names}:
        assert f"`{kind}" in page or kind == "scale"


@pytest.mark.slow
def test_a_folder_without_results_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither the page of another folder, nor a page without results."""
    import causes
    import causes_page

    with pytest.raises(ValueError, match="empty has no results"):
        causes_page.write(tmp_path / "empty", tmp_path / "docs")
    assert not list(tmp_path.iterdir())
    updates = BENCHMARKS / "results" / "causes" / "pilot" / "updates"
    for arguments, names in (
        (["page", "--out", "empty"], "empty has no results"),
        (["change", "nowhere"], "nowhere/study.json"),
        (["spectra", str(updates), "--cells", "ebl"], "among --cells ebl"),
        (["spectra", str(updates), "--out", "out"], "no finished run with its updates: .*sequential_merge-seed0"),
    ):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["causes.py", *arguments])
        with pytest.raises(SystemExit) as end:
            causes.main()
        assert end.value.code == 2
        assert re.search(names, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_the_leads_of_the_pilot_hold_in_its_run() -> None:
    rows = TABLES["pilot"]["changed"]
    of = {(row["change"], row["outcome"]): row["mean"] for row in rows if row["method"] == "sequential_merge"}
    forgetting, learning = (
        {change: of[change, f"{kind}_loss"] for change, _ in of} for kind in ("forgetting", "learning")
    )
    assert {row["n"] for row in rows} == {1}
    for norm in ("frobenius", "nuclear", "spectral"):
        line = [f"flatten 1 {norm}", f"flatten 0.5 {norm}", "trained", f"sharpen 0.5 {norm}", f"sharpen 1 {norm}"]
        values = [forgetting[change] for change in line]
        assert values == sorted(values, reverse=norm == "spectral")
    assert learning["scale 0.5"] > 0.9 * learning["trained"]
    assert forgetting["scale 0.5"] < 0.4 * forgetting["trained"]
    flat, sizes = "flatten 1 frobenius", [change for change in forgetting if change.startswith(("scale", "trained"))]
    assert learning[flat] > max(learning[change] for change in sizes)
    assert all(forgetting[flat] < forgetting[size] for size in sizes if learning[size] > 0.97 * learning["trained"])
    level = {
        (row["method"], row["outcome"]): row["mean"] / trained["mean"]
        for row in rows
        for trained in rows
        if row["change"] == "level 1" and trained["change"] == "trained"
        if (row["method"], row["outcome"]) == (trained["method"], trained["outcome"])
    }
    assert level["balanced", "forgetting_loss"] < 0.5
    assert 0.94 < level["balanced", "learning_loss"] < 1
    assert all(0.9 < level["sequential_merge", f"{kind}_loss"] < 1.1 for kind in ("forgetting", "learning"))
    between = {row["method"]: row["between_layers"] for row in TABLES["pilot"]["spectra"]}
    assert between["balanced"] < between["sequential_merge"]
    for side in ("both", "input", "output"):
        assert abs(forgetting[f"redirect {side}"]) < 0.1 * forgetting["trained"]
        assert abs(learning[f"redirect {side}"]) < 0.1 * learning["trained"]
