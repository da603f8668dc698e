"""Causes as tables: effects of changes and of factors by hand, and partial ranks that find the planted one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis import StudyResults
from analysis.causes import (
    change_effects,
    changed_table,
    factor_effects,
    layer_table,
    mediation_table,
    spectra_table,
)
from analysis.plots import plot_dose_response, plot_mediation, plot_sizes
from analysis.plots.causes import NORMS
from analysis.statistics.partial import partial_ranks

TASKS = ["a", "b", "c"]


def cell(score: list[float], loss: list[float], entropy: float = 0.5, size: float = 1.0) -> dict[str, Any]:
    norms = {"frobenius": size, "spectral": size, "nuclear": size}
    spectrum = {"entropy": entropy, "between_layers": 0.9, **norms}
    return {"score": score, "loss": loss, "spectrum": spectrum if entropy else {}}


def changed_file(folder: Path, seed: int, gain: float, changes: dict[str, Any] | None = None) -> Path:
    """Two tasks after the first; the update as trained costs 10 and 6 points, flattened ``gain`` points less."""
    cells = {
        "b": {
            "before": cell([60, 30], [1.0, 2.0], 0),
            "trained": cell([50, 70], [1.5, 1.0]),
            "flatten 1 frobenius": cell([50 + gain, 69], [1.4, 1.1], 1.0),
            "sharpen 1 frobenius": cell([45, 65], [1.8, 1.2], 0.2),
            "scale 0.5": cell([58, 50], [1.1, 1.5], 0.5, 0.5),
        },
        "c": {
            "before": cell([50, 70, 20], [1.0, 1.0, 3.0], 0),
            "trained": cell([44, 64, 80], [1.2, 1.4, 1.0]),
            "flatten 1 frobenius": cell([44 + gain, 64 + gain, 79], [1.1, 1.3, 1.1], 1.0),
            "sharpen 1 frobenius": cell([40, 60, 75], [1.5, 1.7, 1.3], 0.2),
            "scale 0.5": cell([48, 68, 50], [1.0, 1.1, 2.0], 0.5, 0.5),
        },
    }
    for task, extra in (changes or {}).items():
        cells[task] |= extra
    head = {"format": "manifold_cl.changed_updates", "version": 1, "run": "x", "method": "sequential_merge"}
    path = folder / f"plain-seed{seed}.json"
    path.write_text(json.dumps({**head, "stream": "s", "tasks": TASKS, "seed": seed, "split": "test", "cells": cells}))
    return path


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [changed_file(tmp_path, seed, gain) for seed, gain in enumerate((4.0, 5.0, 6.0))]


def test_outcomes_of_a_change_by_hand(files: list[Path]) -> None:
    table = changed_table(files[:1]).set_index(["task", "change"])
    assert list(table.columns[:6]) == ["run", "method", "replicate", "position", "forgetting", "learning"]
    trained = table.loc[("c", "trained")]
    assert (trained["forgetting"], trained["learning"], trained["position"]) == (6.0, 60.0, 2)
    assert trained["forgetting_loss"] == pytest.approx(0.3)
    assert trained["learning_loss"] == pytest.approx(2.0)
    assert table.loc[("b", "flatten 1 frobenius"), "forgetting"] == 6.0
    assert "before" not in table.index.get_level_values("change")


def test_effects_of_changes_are_paired_over_replicates(files: list[Path]) -> None:
    effects = change_effects(changed_table(files)).set_index(["outcome", "change"])
    flat = effects.loc[("forgetting", "flatten 1 frobenius")]
    assert (flat["n"], flat["tasks"]) == (3, 6)
    assert flat["mean"] == pytest.approx(8.0 - 5.0)
    assert flat["difference"] == pytest.approx(-5.0)
    half = 4.302653 / 3**0.5  # Student's quantile for two degrees of freedom, sd 1
    assert (flat["difference_low"], flat["difference_high"]) == pytest.approx((-5 - half, -5 + half), rel=1e-5)
    assert flat["p_holm"] == pytest.approx(flat["p"])  # the other two are equal in every replicate: no test
    trained = effects.loc[("forgetting", "trained")]
    assert (trained["mean"], trained["difference"]) == (8.0, 0.0)
    assert np.isnan(trained["p"])


def test_one_replicate_has_no_interval_and_unfinished_tasks_do_not_count(tmp_path: Path) -> None:
    path = changed_file(tmp_path, 0, 4.0, {"b": {"redirect both": cell([59, 30], [1.0, 2.1])}})
    effects = change_effects(changed_table([path])).set_index(["outcome", "change"])
    row = effects.loc[("forgetting", "redirect both")]
    assert (row["n"], row["tasks"], row["mean"]) == (1, 1, 1.0)
    assert effects.loc[("forgetting", "trained"), "mean"] == 10.0  # of task b alone: c lacks the new change
    assert row[["low", "high", "difference_low", "p"]].isna().all()


def test_runs_without_a_common_task_and_change_are_named(tmp_path: Path) -> None:
    extra = {
        task: {"redirect both": cell([59, 30, 1][: n + 2], [1.0, 2.1, 1.0][: n + 2])} for n, task in enumerate("bc")
    }
    other = {task: {"truncate 1 frobenius": cells["redirect both"]} for task, cells in extra.items()}
    paths = [changed_file(tmp_path, 0, 4.0, extra), changed_file(tmp_path, 1, 4.0, other)]
    with pytest.raises(ValueError, match="b of plain-seed0 lacks truncate 1 frobenius"):
        change_effects(changed_table(paths))


def test_damaged_and_foreign_files_are_named(tmp_path: Path, files: list[Path]) -> None:
    for text, message in (
        ("{", "truncated or not JSON"),
        ('{"format": "other"}', "format is 'other', 'manifold_cl.changed_updates' was expected"),
        ('{"format": "manifold_cl.changed_updates", "version": 1, "checksum": "0"}', "does not match its 'checksum'"),
    ):
        files[0].write_text(text)
        with pytest.raises(ValueError, match=rf"plain-seed0\.json.* {message}"):
            changed_table(files)
    files[0].write_text('{"format": "manifold_cl.changed_updates", "version": 1, "method": "x", "seed": 0}')
    with pytest.raises(ValueError, match=r"plain-seed0\.json lacks tasks, cells"):
        changed_table(files)
    with pytest.raises(ValueError, match=r"'manifold_cl\.layer_forgetting' was expected"):
        layer_table(files[1:])


def test_a_replicate_does_not_count_twice(files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    copy = tmp_path / "other" / "again.json"
    copy.write_text(files[0].read_text())
    with pytest.raises(
        ValueError, match=r"again\.json and .*plain-seed0\.json are both of sequential_merge, a>b>c seed 0"
    ):
        changed_table([*files, copy])


def test_spectra_of_runs_are_read(tmp_path: Path) -> None:
    summary = cell([], [], 0.7, 2.0)["spectrum"]
    head = {"format": "manifold_cl.update_spectra", "version": 1, "method": "eblora", "tasks": TASKS, "seed": 4}
    (tmp_path / "e.json").write_text(json.dumps({**head, "updates": dict.fromkeys(TASKS, summary)}))
    table = spectra_table([tmp_path / "e.json"])
    assert list(table["task"]) == TASKS
    assert set(table["replicate"]) == {"a>b>c seed 4"}
    assert (table["entropy"].mean(), table["frobenius"].mean()) == (pytest.approx(0.7), pytest.approx(2.0))


LEVELS = {"core": ["scalar", "diagonal", "full"], "restriction": ["none", "input"]}


def study_of(folder: Path, value: Any, seeds: int = 3, skip: str = "") -> StudyResults:
    """A study of 3 × 2 cells whose MFN is a function of core, restriction and seed."""
    labels = {
        f"{core}-{restriction}": (core, restriction) for core in LEVELS["core"] for restriction in LEVELS["restriction"]
    }
    cells = []
    for label, levels in labels.items():
        for seed in range(seeds):
            name = f"{label}-seed{seed}"
            cells.append({"label": label, "order": "default", "seed": seed, "folder": f"cells/{name}"})
            if name == skip:
                continue
            final = value(*levels, seed)
            record = {
                "format": "manifold_cl.record", "version": 1, "name": name, "method": "factorial", "stream": "s",
                "config": {}, "tasks": ["a", "b"], "status": "complete", "primary": "known",
                "zero_shot": {"known": [0.0, 0.0]}, "accuracy": {"known": [[final, 0.0], [final, final]]},
                "metrics": {"mfn": final},
                "timings": [{}, {}], "losses": [[], []], "constraints": [{}, {}], "capacity": [{}, {}],
                "peak_memory_mb": 1.0, "versions": {}, "machine": {}, "provenance": {}, "started": "", "finished": "",
            }  # fmt: skip
            (folder / "cells" / name).mkdir(parents=True)
            (folder / "cells" / name / "record.json").write_text(json.dumps(record))
    study = {
        "format": "manifold_cl.study", "version": 1, "name": "f", "stream": "s", "reference": "scalar-none",
        "seeds": list(range(seeds)), "orders": {"default": ["a", "b"]}, "training": {}, "rank": 4, "examples": None,
        "device": "cpu", "threads": 1, "processes": 1, "common": {}, "cells": cells,
        "methods": {label: {"method": "factorial", "options": {}, "search": None} for label in labels},
    }  # fmt: skip
    (folder / "study.json").write_text(json.dumps(study))
    return StudyResults.load(folder)


FACTORS = {f"{c}-{r}": {"core": c, "restriction": r} for c in LEVELS["core"] for r in LEVELS["restriction"]}


def test_effects_of_factors_by_hand(tmp_path: Path) -> None:
    """Full costs 3 points, the restriction brings 10, and 4 more with a full core; seeds shift the last."""
    study = study_of(
        tmp_path,
        lambda c, r, s: 50 - 3 * (c == "full") + (10 + s) * (r == "input") + 4 * (c == "full" and r == "input"),
    )
    table = factor_effects(study, LEVELS, FACTORS, figures=["mfn"]).set_index("effect")
    assert list(table["kind"]) == ["main"] * 3 + ["interaction"] * 2
    assert table.loc["core: diagonal − scalar", "estimate"] == pytest.approx(0.0)
    assert table.loc["core: full − scalar", "estimate"] == pytest.approx(-3 + 4 / 2)
    restriction = table.loc["restriction: input − none"]
    assert restriction["estimate"] == pytest.approx(11 + 4 / 3)
    half = 4.302653 / 3**0.5
    assert restriction["high"] - restriction["estimate"] == pytest.approx(half, rel=1e-5)
    assert table.loc["core: full − scalar × restriction: input − none", "estimate"] == pytest.approx(4.0)
    assert (table["n"] == 3).all()


def test_replicates_without_every_cell_do_not_count(tmp_path: Path) -> None:
    study = study_of(tmp_path, lambda c, r, s: 50 + s, skip="full-none-seed1")
    assert (factor_effects(study, LEVELS, FACTORS, figures=["mfn"])["n"] == 2).all()
    with pytest.raises(ValueError, match="no label has the levels scalar, none: 1 of 6 cells are missing"):
        factor_effects(study, LEVELS, {k: v for k, v in FACTORS.items() if k != "scalar-none"})
    with pytest.raises(ValueError, match="figure is 'mnf', choose from mfn, minutes"):
        factor_effects(study, LEVELS, FACTORS, figures=["mnf"])
    with pytest.raises(ValueError, match="again and scalar-none are the same cell"):
        factor_effects(study, LEVELS, {**FACTORS, "again": FACTORS["scalar-none"]})


def test_partial_ranks_find_the_cause_and_not_its_shadow() -> None:
    draw = np.random.default_rng(0)
    groups = np.repeat(np.arange(12), 30)
    cause = draw.normal(size=360)
    shadow = cause + 0.5 * draw.normal(size=360)
    outcome = np.exp(2 * cause + 0.5 * draw.normal(size=360) + groups)  # groups of other scales, a monotone law
    found = partial_ranks(outcome, {"cause": cause, "shadow": shadow, "constant": np.ones(360)}, groups, samples=499)
    assert found["cause"].value > 0.8
    assert found["cause"].p == 1 / 500
    assert abs(found["shadow"].value) < 0.15
    assert found["shadow"].p > 0.01
    assert np.isnan(found["constant"].value)
    marginal = partial_ranks(outcome, {"shadow": shadow}, groups, samples=99)["shadow"]
    assert marginal.value > 0.7  # alone, the shadow looks like a cause


def test_means_of_units_are_removed() -> None:
    units, groups = np.tile(np.arange(20), 10), np.repeat(np.arange(10), 20)
    x = units + 0.0
    noise = np.random.default_rng(1).normal(size=200)
    assert partial_ranks(units + 0.1 * noise, {"x": x}, groups, samples=99)["x"].value > 0.9
    assert np.isnan(partial_ranks(units + noise, {"x": x}, groups, units=units, samples=99)["x"].value)


@pytest.mark.slow
def test_the_null_of_partial_ranks_keeps_its_level() -> None:
    draw = np.random.default_rng(2)
    groups = np.repeat(np.arange(5), 12)
    ps = []
    for _ in range(100):
        z = draw.normal(size=60)
        x, y = z + draw.normal(size=60), z + draw.normal(size=60)
        ps.append(partial_ranks(y, {"x": x, "z": z}, groups, samples=99, seed=int(draw.integers(10**6)))["x"].p)
    assert np.mean(np.array(ps) <= 0.05) <= 0.12  # 5 % expected; 0.12 is beyond three standard errors


@pytest.mark.slow
def test_the_null_keeps_its_level_where_rows_of_a_unit_depend_on_each_other() -> None:
    """Pairs of one task share its update: the measure, and most of the outcome, are the same in all of them."""
    draw = np.random.default_rng(3)
    tasks, units = np.repeat([1, 2, 2, 3, 3, 3], 12), np.tile(np.arange(12), 6)
    ps = []
    for _ in range(200):
        x, shared = draw.normal(size=(2, 4, 12))
        y = shared[tasks, units] + 0.5 * draw.normal(size=72)
        groups = np.repeat(np.arange(6), 12)
        ps.append(partial_ranks(y, {"x": x[tasks, units]}, groups, units=units, samples=49, seed=len(ps))["x"].p)
    assert np.mean(np.array(ps) <= 0.06) <= 0.11  # 6 % expected; permuting each group alone gives 24 %


def test_units_that_a_group_lacks_are_refused() -> None:
    groups, units = np.repeat([0, 1], 10), [*range(10), *range(9), 0]
    with pytest.raises(ValueError, match="2 of 20 pairs of a group and a unit"):
        partial_ranks(np.arange(20.0), {"x": np.arange(20.0)}, groups, units=units)


def layer_file(folder: Path, seed: int, method: str = "plain") -> Path:
    """Twelve layers whose part in forgetting follows drift, and nothing else."""
    draw = np.random.default_rng(seed)
    layers = [f"l{i}" for i in range(12)]
    spectra = {t: {name: sorted(draw.uniform(0.1, 1, 4).tolist(), reverse=True) for name in layers} for t in TASKS}
    pairs: dict[str, Any] = {}
    for position, task in enumerate(TASKS[1:], start=1):
        pairs[task] = {}
        for old in TASKS[: position + 1]:
            drift = draw.uniform(0.1, 1, 12)
            rows = {
                name: {
                    "effect": value + 0.05 * float(draw.normal()),
                    "overlap": float(draw.uniform()),
                    "overlap_inputs": 0.5,
                    "drift": value,
                }
                for name, value in zip(layers, drift, strict=True)
            }
            pairs[task][old] = {"before": 1.0, "after": 1.0 + float(drift.sum()), "layers": rows}
    head = {"format": "manifold_cl.layer_forgetting", "version": 1, "run": "x", "method": method, "stream": "s"}
    path = folder / f"{method}-seed{seed}.json"
    content = {**head, "tasks": TASKS, "seed": seed, "split": "test", "spectra": spectra, "pairs": pairs}
    path.write_text(json.dumps(content))
    return path


def test_mediation_finds_the_planted_measure(tmp_path: Path) -> None:
    table = layer_table([layer_file(tmp_path, seed) for seed in range(3)])
    assert len(table) == 3 * (2 + 3) * 12
    assert table["imbalance"].between(0, 1).all()
    rows = mediation_table(table, samples=199).set_index("measure")
    assert rows.loc["drift", "value"] > 0.9
    assert rows.loc["drift", "p_holm"] == pytest.approx(4 / 200)
    assert rows.loc["drift", "low"] > 0.8
    assert (rows.loc[["imbalance", "norm", "overlap"], "p_holm"] > 0.05).all()
    assert (rows["n"] == 3).all()


def test_equal_measures_are_no_variation_and_small_ones_are(tmp_path: Path) -> None:
    """An imposed norm differs by float32 rounding between layers; drifts of 1e-9 differ by their own size."""
    table = layer_table([layer_file(tmp_path, seed) for seed in range(2)])
    noise = np.random.default_rng(0).normal(size=(2, len(table)))
    small = table.assign(norm=0.75 * (1 + 3e-8 * noise[0]), drift=1e-9 * table["drift"], imbalance=2e-14 * noise[1])
    rows = mediation_table(small, samples=99).set_index("measure")
    assert rows.loc["norm", "n"] == rows.loc["imbalance", "n"] == 0
    assert rows.loc["drift", "value"] > 0.9
    first = small["run"] == small["run"].iloc[0]
    one = small.assign(norm=small["norm"].where(~first, table["norm"]))  # varies in the first run alone
    again = mediation_table(one, samples=99).set_index("measure")
    assert again.loc["norm", "n"] == 1
    assert again.loc["norm", "p"] > 0


def test_figures_of_causes_draw_the_tables(files: list[Path], tmp_path: Path) -> None:
    effects = change_effects(changed_table(files))
    figure = plot_dose_response(effects, "sequential_merge")
    (curve,) = [line for line in figure.axes[0].lines if line.get_label() == "flattened, sharpened"]
    assert list(curve.get_xdata()) == pytest.approx([0.2, 0.5, 1.0])
    assert [axes.get_title().lower() for axes in figure.axes[:3]] == [f"{norm} norm stays" for norm in NORMS]
    assert [axes.get_xlabel() for axes in figure.axes] == [""] * 3 + ["spectral entropy / ln r"] * 3
    assert list(curve.get_ydata()) == pytest.approx([0.7, 0.4, 0.3])
    with pytest.raises(
        ValueError, match="no changes of shape of 'eblora' in the table; its methods are sequential_merge"
    ):
        plot_dose_response(effects, "eblora")
    (axes,) = plot_sizes(effects, ["sequential_merge"]).axes
    assert list(axes.lines[0].get_xdata()) == pytest.approx([0.75, 1.5])
    (cross,) = [line for line in axes.lines if line.get_label() == "sequential_merge, flattened"]
    assert (cross.get_xdata()[0], cross.get_ydata()[0]) == (pytest.approx(1.4), pytest.approx(0.3))
    with pytest.raises(ValueError, match="no changes of size"):
        plot_sizes(effects, ["other"])
    table = mediation_table(layer_table([layer_file(tmp_path, 7)]), samples=99)
    (axes,) = plot_mediation(table).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["imbalance", "norm", "overlap", "drift"]
    explained = "open: p of 0.05 or more" in {text.get_text() for text in axes.get_legend().get_texts()}
    assert explained == bool((table["p_holm"] >= 0.05).any())
    with pytest.raises(ValueError, match="is empty"):
        plot_mediation(pd.DataFrame(columns=table.columns))
