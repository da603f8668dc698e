"""A study's folder as tables: means, intervals and tests of hand-made scores; what is missing; what contradicts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis import StudyResults
from analysis.plots.methods import method_values
from analysis.statistics import holm
from analysis.studies.results import COSTS

PLAIN = [
    [[60.0, 41, 31], [50, 70, 31], [40, 60, 80]],  # MFT 70, MFN 60, BWT −15
    [[62.0, 41, 31], [50, 72, 31], [40, 64, 82]],  # MFT 72, MFN 62, BWT −15
    [[64.0, 41, 31], [50, 70, 31], [46, 60, 82]],  # MFT 72, MFN 62 2/3, BWT −14
]
OURS = [
    [[60.0, 42, 32], [59, 70, 32], [58, 68, 78]],  # MFT 69 1/3, MFN 68, BWT −2
    [[62.0, 42, 32], [60, 70, 32], [62, 70, 80]],  # MFT 70 2/3, MFN 70 2/3, BWT 0
    [[62.0, 42, 32], [60, 70, 32], [61, 69, 80]],  # MFT 70 2/3, MFN 70, BWT −1
]
BOUND = [[[70.0, 75, 80]] * 3] * 3
STORED = {
    "plain": {"updates": 3e6, "state": 0, "old_examples": 0},
    "ours": {"updates": 3e6, "state": 1.5e6, "old_examples": 0},
    "all at once": {"updates": 1e6, "state": 0, "old_examples": 120},
}
ALL = {"plain": PLAIN, "ours": OURS, "all at once": BOUND}
METHODS = {
    "plain": {"method": "sequential_merge"},
    "ours": {"method": "eblora", "options": {"lr": 0.006}, "search": {"file": "tuning.json", "trials": 7}},
    "all at once": {"method": "joint"},
}


@pytest.fixture
def study(tmp_path: Path, write_study: Callable[..., Path]) -> StudyResults:
    return StudyResults.load(write_study(tmp_path / "study", ALL, named=METHODS, stored=STORED))


def row(table: pd.DataFrame, **wanted: str) -> dict[str, Any]:
    for column, value in wanted.items():
        table = table[table[column] == value]
    (found,) = table.to_dict("records")
    return {str(key): value for key, value in found.items()}


def test_a_study_is_read_with_its_labels_in_order(study: StudyResults) -> None:
    assert (study.name, study.reference, study.labels) == ("small", "plain", ("plain", "ours", "all at once"))
    assert list(study.records)[:2] == [("plain", "default", 0), ("plain", "default", 1)]
    assert study.missing == ()
    assert study.methods["ours"].search == {"file": "tuning.json", "trials": 7}
    assert study.methods["plain"].search is None
    assert StudyResults.load(study.plan.file).records.keys() == study.records.keys()  # the file may be named directly


def test_figures_are_tidy_and_costs_follow_the_timings(study: StudyResults) -> None:
    table = study.figures()
    assert list(table.columns) == ["label", "method", "order", "seed", "figure", "value"]
    assert len(table) == 9 * (4 + len(COSTS))  # zero_shot, mft, mfn and bwt are in these records
    ours = table[(table["label"] == "ours") & (table["seed"] == 1)].set_index("figure")["value"]
    assert ours["mfn"] == pytest.approx(212 / 3, rel=1e-12)  # float64
    assert (ours["bwt"], ours["zero_shot"]) == (0.0, 40.0)
    assert ours["minutes"] == pytest.approx(3 * (1 + 2 + 0.5 + 9) / 60, rel=1e-12)  # the optimizer's share is no time
    assert ours["train_minutes"] == pytest.approx(3 * (1 + 2 + 0.5) / 60, rel=1e-12)  # float64
    assert list(ours[["peak_memory_mb", "updates_mb", "state_mb", "old_examples"]]) == [900.0, 3.0, 1.5, 0.0]
    assert "forgetting_just_learned" not in set(table["figure"])  # no record here has it


def test_a_method_that_does_not_train_takes_no_minutes_to_learn(
    tmp_path: Path, write_study: Callable[..., Path], record: dict[str, Any]
) -> None:
    record["timings"] = [{"evaluate": 6.0, "steps": 0}] * 3
    record["stored"] = None
    figures = StudyResults.load(write_study(tmp_path / "a", {"zero_shot": BOUND})).summary().set_index("figure")["mean"]
    assert (figures["train_minutes"], figures["minutes"]) == (0.0, pytest.approx(0.3, rel=1e-12))  # float64
    record["timings"] = []
    figures = StudyResults.load(write_study(tmp_path / "b", {"zero_shot": BOUND})).summary().set_index("figure")["mean"]
    assert np.isnan(figures[["minutes", "train_minutes", "updates_mb", "state_mb", "old_examples"]]).all()


def slow_down_all_but_the_last(folder: Path) -> None:
    """Cells beside other work: seed 0 takes three times as long, seed 1 twice."""
    for path in folder.glob("cells/*/record.json"):
        record = json.loads(path.read_text())
        factor = max(1, 3 - record["config"]["seed"])
        record["timings"] = [{phase: factor * time for phase, time in row.items()} for row in record["timings"]]
        path.write_text(json.dumps(record))


def test_the_fastest_cell_stands_for_a_methods_time(tmp_path: Path, write_study: Callable[..., Path]) -> None:
    folder = write_study(tmp_path, {"plain": PLAIN, "ours": OURS})
    slow_down_all_but_the_last(folder)
    study = StudyResults.load(folder)
    assert study.fastest() == pytest.approx({"plain": 0.625, "ours": 0.625}, rel=1e-12)  # float64
    assert study.fastest("train_minutes") == pytest.approx({"plain": 0.175, "ours": 0.175}, rel=1e-12)
    assert row(study.summary(), label="ours", figure="minutes")["mean"] == pytest.approx(2 * 0.625, rel=1e-12)
    drawn, *interval = method_values(study, 0.95, ())["ours", "minutes"]
    assert drawn == pytest.approx(0.625, rel=1e-12)
    assert np.isnan(interval).all()
    with pytest.raises(ValueError, match="'mfn' is not a time; the times are minutes, train_minutes"):
        study.fastest("mfn")


def test_joint_training_has_no_forward_transfer(tmp_path: Path, write_study: Callable[..., Path]) -> None:
    folder = write_study(tmp_path, {"joint": [OURS[0]], "plain": [OURS[0]]})
    for path in folder.glob("cells/*/record.json"):
        record = json.loads(path.read_text())
        record["metrics"] |= {"fwt": 75.0, "fwt_flat": 75.0}
        path.write_text(json.dumps(record))
    table = StudyResults.load(folder).figures()
    assert set(table[table["figure"].isin(["fwt", "fwt_flat"])]["label"]) == {"plain"}


def test_figures_that_no_record_has_are_in_no_comparison(tmp_path: Path, write_study: Callable[..., Path]) -> None:
    alone = {"all at once": METHODS["all at once"]}
    joint = StudyResults.load(write_study(tmp_path / "joint", {"all at once": BOUND}, named=alone))
    assert joint.paired().empty  # was an error about fwt
    with pytest.raises(ValueError, match="no record has the figure 'fwt'"):
        joint.paired(figures=["fwt"])


def test_accuracy_has_a_row_a_stage_and_task(study: StudyResults) -> None:
    table = study.accuracy()
    assert len(table) == 9 * 4 * 3
    ours = table[(table["label"] == "ours") & (table["seed"] == 0)]
    assert list(ours[ours["after"] == 0]["value"]) == [50.0, 40.0, 30.0]  # the pre-trained model
    assert row(ours[ours["after"] == 2], task="films") == {
        "label": "ours",
        "method": "eblora",
        "order": "default",
        "seed": 0,
        "after": 2,
        "task": "films",
        "position": 3,
        "score": "accuracy",
        "value": 32.0,
    }


def test_means_and_intervals_by_hand(study: StudyResults) -> None:
    found = row(study.summary(), label="ours", figure="bwt")
    assert (found["n"], found["mean"], found["sd"]) == (3, -1.0, 1.0)
    # 4.302653 is the 97.5 % quantile of Student's law with two degrees of freedom, printed to six decimals
    assert (found["low"], found["high"]) == pytest.approx((-1 - 4.302653 / 3**0.5, -1 + 4.302653 / 3**0.5), rel=1e-6)
    narrow = row(study.summary(level=0.5), label="ours", figure="bwt")
    assert narrow["high"] - narrow["low"] < found["high"] - found["low"]
    same = row(study.summary(), label="all at once", figure="mfn")
    assert (same["sd"], same["low"], same["high"]) == (0.0, 75.0, 75.0)


def test_paired_differences_are_those_of_scipy_and_holm_counts_the_labels(study: StudyResults) -> None:
    table = study.paired(figures=("bwt", "mfn"))
    assert list(table["label"]) == ["ours", "all at once"] * 2
    found = row(table, label="ours", figure="mfn")
    ours, plain = np.array([68, 212 / 3, 70]), np.array([60, 62, 188 / 3])
    expected = stats.ttest_rel(ours, plain)
    assert found["n"] == 3
    assert found["difference"] == pytest.approx((ours - plain).mean(), rel=1e-12)  # float64
    assert (found["t"], found["p"]) == pytest.approx((expected.statistic, expected.pvalue), rel=1e-9)  # float64
    interval = expected.confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high), rel=1e-9)  # float64
    for figure in ("bwt", "mfn"):
        part = table[table["figure"] == figure]
        assert part["p"].notna().all()
        np.testing.assert_array_equal(part["p_holm"], [part["p"].iloc[0], np.nan])  # joint training is a bound
    other = study.paired("ours", figures=["mfn"])
    assert row(other, label="plain")["difference"] == pytest.approx(-found["difference"], rel=1e-12)  # float64


def test_holm_corrects_over_the_methods_that_compete(tmp_path: Path, write_study: Callable[..., Path]) -> None:
    """A bound beside them, or one that keeps old data, changes no p of theirs."""
    draw = np.random.default_rng(0)
    labels = ("plain", "ours", "third", "zero_shot", "joint")
    runs = {label: [[[60.0, 0, 0], [0, 60, 0], [60 + draw.normal()] * 3] for _ in range(4)] for label in labels}
    stored = {label: {"updates": 1, "state": 1, "old_examples": 0} for label in labels}
    table = (
        StudyResults.load(write_study(tmp_path / "all", runs, stored=stored)).paired(figures=["mfn"]).set_index("label")
    )
    assert table["p"].notna().all()
    np.testing.assert_array_equal(table.loc[["ours", "third"], "p_holm"], holm(table.loc[["ours", "third"], "p"]))
    assert table.loc[["zero_shot", "joint"], "p_holm"].isna().all()
    stored["third"]["old_examples"] = 9
    fewer = (
        StudyResults.load(write_study(tmp_path / "fewer", runs, stored=stored))
        .paired(figures=["mfn"])
        .set_index("label")
    )
    assert fewer.loc["ours", "p_holm"] == table.loc["ours", "p"]
    assert np.isnan(fewer.loc["third", "p_holm"])


def test_pairs_are_cells_of_the_same_seed(tmp_path: Path, write_study: Callable[..., Path]) -> None:
    """Unpaired means would differ by 0; pair by pair the first two seeds differ by 6."""
    up = [[[60.0, 0, 0], [0, 60, 0], [level] * 3] for level in (66.0, 76.0)]
    down = [[[60.0, 0, 0], [0, 60, 0], [level] * 3] for level in (60.0, 70.0, 83.0)]
    study = StudyResults.load(write_study(tmp_path, {"down": down, "up": [*up, None]}))
    found = row(study.paired(figures=["mfn"]), label="up")
    assert (found["n"], found["difference"]) == (2, 6.0)
    assert (found["low"], found["high"]) == (6.0, 6.0)
    assert np.isnan([found["t"], found["p"], found["p_holm"]]).all()  # both differences are 6: no spread


def test_orders_are_paired_apart(tmp_path: Path, write_study: Callable[..., Path]) -> None:
    folder = write_study(tmp_path, {"plain": PLAIN, "ours": OURS})
    said = json.loads((folder / "study.json").read_text())
    said["orders"]["reversed"] = ["films", "nouns", "news"]
    for cell in said["cells"]:
        if cell["seed"] == 2:
            cell["order"] = "reversed"
            file = folder / cell["folder"] / "record.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"tasks": said["orders"]["reversed"]}))
    (folder / "study.json").write_text(json.dumps(said))
    study = StudyResults.load(folder)
    assert row(study.paired(figures=["bwt"]), label="ours")["difference"] == pytest.approx(
        (13 + 15 + 13) / 3, rel=1e-12
    )  # float64
    table = study.accuracy()
    assert set(table[(table["order"] == "reversed") & (table["task"] == "news")]["position"]) == {3}
    assert "3 seeds and 2 orders of the tasks" in study.note()
    assert study.note().endswith(
        "and nothing about other tasks. Cells of one order share that order's effect and count as independent here: "
        "over further orders the mean may vary more than the interval says."
    )


def test_one_seed_has_means_and_no_intervals(tmp_path: Path, write_study: Callable[..., Path]) -> None:
    study = StudyResults.load(write_study(tmp_path, {"plain": PLAIN[:1], "ours": OURS[:1]}))
    found = row(study.summary(), label="ours", figure="mfn")
    assert (found["n"], found["mean"]) == (1, 68.0)
    assert np.isnan([found["sd"], found["low"], found["high"]]).all()
    found = row(study.paired(figures=["mfn"]), label="ours")
    assert (found["n"], found["difference"]) == (1, 8.0)
    assert np.isnan([found[key] for key in ("low", "high", "t", "p", "p_holm")]).all()
    assert study.note().startswith("No method has two complete cells: there are no intervals")


def test_an_interval_says_what_it_is_over(study: StudyResults) -> None:
    assert study.note(0.9) == (
        "Intervals: 90 %, Student's t, over 3 seeds. Tasks and test texts are the same in every cell, so an interval "
        "says where the mean over more such cells lies, and nothing about other tasks."
    )


def test_who_competes(study: StudyResults, tmp_path: Path, write_study: Callable[..., Path]) -> None:
    assert study.competing == ("plain", "ours")
    assert [study.keeps_old_data(label) for label in study.labels] == [False, False, True]
    replay = {**STORED, "plain": {"updates": 1, "state": 1, "old_examples": 5}}
    assert StudyResults.load(write_study(tmp_path / "a", ALL, named=METHODS, stored=replay)).competing == ("ours",)
    older = StudyResults.load(write_study(tmp_path / "b", {**ALL, "zero_shot": PLAIN}, named=METHODS))
    assert older.keeps_old_data("ours") is None
    assert older.competing == ("plain", "ours")  # joint and zero_shot are bounds even where costs are unknown


def test_missing_cells_say_how_far_they_came(tmp_path: Path, write_study: Callable[..., Path]) -> None:
    half = [[60.0, 42, 32], [59, 70, 32], [None] * 3]
    study = StudyResults.load(write_study(tmp_path, {"plain": PLAIN, "ours": [OURS[0], half, None], "new": [None] * 3}))
    assert study.labels == ("plain", "ours")
    assert [(one.cell, one.started, one.done, one.tasks) for one in study.missing] == [
        (("ours", "default", 1), True, 2, 3),
        (("ours", "default", 2), False, 0, 3),
        *((("new", "default", seed), False, 0, 3) for seed in range(3)),
    ]
    assert row(study.summary(), label="ours", figure="mfn")["n"] == 1
    assert row(study.paired(figures=["mfn"]), label="ours")["n"] == 1


def test_a_cell_that_only_scored_the_pre_trained_model_has_learned_nothing(
    tmp_path: Path, write_study: Callable[..., Path]
) -> None:
    folder = write_study(tmp_path, {"plain": PLAIN})
    path = folder / "cells/2/record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"accuracy": {}, "metrics": {}, "status": "running"}))
    assert [(one.started, one.done) for one in StudyResults.load(folder).missing] == [(True, 0)]


def test_a_study_that_has_not_started_has_empty_tables(tmp_path: Path, write_study: Callable[..., Path]) -> None:
    study = StudyResults.load(write_study(tmp_path, {"plain": [None, None]}))
    assert (study.labels, len(study.missing)) == ((), 2)
    assert [len(table) for table in (study.figures(), study.accuracy(), study.summary())] == [0, 0, 0]
    with pytest.raises(ValueError, match="reference 'plain' has no complete cell; there are none"):
        study.paired()


def test_unknown_references_and_figures_are_named(study: StudyResults) -> None:
    with pytest.raises(ValueError, match="reference 'theirs' has no complete cell; there are plain, ours, all at once"):
        study.paired("theirs")
    with pytest.raises(
        ValueError, match="no record has the figure 'fwt'; the figures are zero_shot, mft, mfn, bwt, min"
    ):
        study.paired(figures=["mfn", "fwt"])
    with pytest.raises(ValueError, match="level is 95, a number between 0 and 1 was expected"):
        study.summary(level=95)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "manifold_cl.record"}, "format is 'manifold_cl.record', 'manifold_cl.study' was expected"),
        ({"version": 2}, "version 2 of manifold_cl.study is unknown"),
        ({"stream": None}, r"study\.json: 'stream' is None, text was expected"),
        ({"methods": []}, r"'methods' is \[\], an object was expected"),
        ({"methods": {"plain": "eblora"}}, r"methods: 'plain' is 'eblora', an object was expected"),
        ({"methods": {"plain": {}}}, r"methods\['plain'\]: 'method' is missing, text was expected"),
        ({"methods": {"plain": {"method": "a", "search": 7}}}, r"'search' is 7, an object or null was expected"),
        (
            {"methods": {"plain": {"method": "a", "options": [1]}}},
            r"\['plain'\]: 'options' is \[1\], an object or null",
        ),
        ({"training": -1}, r"study\.json: 'training' is -1, an object or null was expected"),
        ({"training": "\0"}, r"study\.json: 'training' is '\\x00', an object or null was expected"),
        ({"common": [["a", 1]]}, r"study\.json: 'common' is \[\['a', 1\]\], an object or null was expected"),
        ({"orders": {"default": 7}}, r"study\.json: orders: 'default' is 7, a list was expected"),
        ({"orders": {"default": ["a", 1]}}, r"orders: 'default' is \['a', 1\], a list was expected whose members"),
        ({"orders": {"default": ["a", "a"]}}, r"orders: 'default' is \['a', 'a'\], a list was expected whose members"),
        ({"seeds": [0, [1]]}, r"study\.json: 'seeds' is \[0, \[1\]\], a list was expected whose members"),
        ({"seeds": [0, True]}, r"study\.json: 'seeds' is \[0, True\], a list was expected whose members"),
        ({"reference": "nobody"}, "reference 'nobody' is not among the methods: plain"),
        ({"seeds": [7]}, r"cells\[0\] has the seed 0, which is not among \[7\]"),
        ({"orders": {"other": ["a"]}}, r"cells\[0\] has the order 'default', which is not among \['other'\]"),
        ({"cells": ["plain"]}, r"cells\[0\] is a str, an object was expected"),
        ({"cells": [{"label": "plain", "order": "default", "folder": "x"}]}, r"cells\[0\]: 'seed' is missing, a whole"),
        (
            {"cells": [{"label": "plane", "order": "default", "seed": 0, "folder": "x"}]},
            r"cells\[0\] has the method 'plane', which is not among \['plain'\]",
        ),
        (
            {"cells": [{"label": "plain", "order": "default", "seed": 0, "folder": "../x"}]},
            r"cells\[0\] has the folder '\.\./x', outside the study's folder",
        ),
        (
            {"cells": [{"label": "plain", "order": "default", "seed": 0, "folder": "x"}] * 2},
            "'plain', order 'default', seed 0 is listed twice among the cells",
        ),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(
    tmp_path: Path, write_study: Callable[..., Path], changes: dict[str, Any], message: str
) -> None:
    folder = write_study(tmp_path, {"plain": PLAIN}, **changes)
    with pytest.raises(ValueError, match=message):
        StudyResults.load(folder)


def test_broken_files_are_named(tmp_path: Path, write_study: Callable[..., Path]) -> None:
    with pytest.raises(FileNotFoundError, match=r"study\.json does not exist"):
        StudyResults.load(tmp_path / "study.json")
    folder = write_study(tmp_path / "study", {"plain": PLAIN})
    (folder / "cells" / "1" / "record.json").write_text('{"format": "manifold')
    with pytest.raises(ValueError, match=r"cells/1/record\.json is truncated or not JSON"):
        StudyResults.load(folder)
    (folder / "study.json").write_text('{"format": "manifold')
    with pytest.raises(ValueError, match=r"study\.json is truncated or not JSON"):
        StudyResults.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "gpm"}, "method is 'gpm', not 'plain'"),
        ({"stream": "text-six"}, "stream is 'text-six', not 'toy'"),
        ({"tasks": ["nouns", "news", "films"]}, r"tasks is \['nouns', 'news', 'films'\], not \['news'"),
        ({"config": {"seed": 5}}, "seed is 5, not 1"),
        ({"config": {"seed": 1, "rank": 8, "epochs": 2}}, "epochs is 2, not 1; rank is 8, not 3"),
    ],
)
def test_a_record_of_another_run_is_refused(
    tmp_path: Path, write_study: Callable[..., Path], changes: dict[str, Any], message: str
) -> None:
    folder = write_study(tmp_path, {"plain": PLAIN})
    file = folder / "cells" / "1" / "record.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=rf"is not the run that study\.json describes .*seed 1: {message}.* Move it"):
        StudyResults.load(folder)
