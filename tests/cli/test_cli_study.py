"""``manifold-cl study`` and ``compare`` on its folder, as a user calls them."""

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import toy
from command import Call

from manifold_cl import cli
from manifold_cl.study import CellFailure, Study

CONFIG = f"""
stream = "{Path(toy.__file__)}:toy_stream"
rank = 4
seeds = [0, 1]
processes = 2

[methods.sequential_merge]
lr = 0.03

[methods.zero_shot]
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that ran through the command: its file, and its results in ``out``."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "toys.toml").write_text(CONFIG)
    cli.main(["study", str(folder / "toys.toml"), "--out", str(folder / "out")])
    return folder


def test_a_study_leaves_tables_and_a_report(done: Path) -> None:
    out = done / "out"
    figures = pd.read_parquet(out / "figures.parquet")
    assert set(figures["label"]) == {"sequential_merge", "zero_shot"}
    assert sorted(figures["seed"].unique()) == [0, 1]
    accuracy = pd.read_parquet(out / "accuracy.parquet")
    assert len(accuracy) == 2 * 2 * 2 * 4 * 3  # methods, seeds, scores, rows with the pre-trained model, tasks
    assert "<h1" in (out / "report.html").read_text()
    assert {path.name for path in (out / "cells").iterdir() if path.is_dir()} == {
        f"{label}-seed{seed}" for label in ("sequential_merge", "zero_shot") for seed in (0, 1)
    }


def test_compare_prints_the_table_of_a_study(done: Path, call: Call) -> None:
    code, out, _ = call("compare", done / "out")
    assert code == 0
    assert "interval over seeds and orders" in out
    row = next(line for line in out.splitlines() if "zero_shot" in line)
    assert re.search(r"zero_shot *2 *[\d.]+ ±0\.0", row)  # it has no seed to differ in
    code, out, _ = call("compare", done / "out", "--json")
    tables = json.loads(out)
    mean = {(r["label"], r["figure"]): r["mean"] for r in tables["summary"]}
    assert mean["zero_shot", "bwt"] == 0
    assert mean["sequential_merge", "mft"] > mean["zero_shot", "mft"]
    assert {r["label"] for r in tables["paired"]} == {"zero_shot"}
    code, out, _ = call("compare", done / "out/cells/zero_shot-seed0", done / "out/cells/zero_shot-seed1")
    assert code == 0
    assert "zero_shot-seed1" in out
    code, _, err = call("compare", done / "out", done / "out/cells/zero_shot-seed0")
    assert code == 2
    assert "folders of runs and of studies do not stand in one table" in err


def test_the_same_table_in_markdown(done: Path, call: Call) -> None:
    code, out, _ = call("compare", done / "out", "--markdown")
    assert code == 0
    head, ruler, *rows = out.splitlines()
    assert head.startswith("| method | n | MFT | MFN |")
    assert head.count("|") == ruler.count("|")
    assert [row.split("|")[1].strip() for row in rows] == ["`sequential_merge`", "`zero_shot`"]
    for wrong, said in (
        (("compare", done / "out", "--markdown", "--json"), "--json and --markdown exclude each other"),
        (("compare", done / "out/cells/zero_shot-seed0", "--markdown"), "--markdown prints studies"),
    ):
        code, _, err = call(*wrong)
        assert code == 2
        assert said in err


@pytest.mark.parametrize(("width", "parts"), [("150", 1), ("80", 2), ("60", 4), ("40", 8)])
def test_a_narrow_terminal_gets_more_tables_and_whole_numbers(
    width: str, parts: int, done: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich's word for: this is a terminal
    code, out, _ = call("compare", done / "out")
    assert code == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out)
    assert "…" not in plain
    assert max(map(len, plain.splitlines())) <= int(width)
    heads = [line.split() for line in plain.splitlines() if line.lstrip().startswith("method")]
    assert len(heads) == parts
    whole = ["n", "MFT", "MFN", "BWT", "FWT", "Δ", "MFN", "p", "minutes", "peak", "MB", "kept", "MB", "old", "data"]
    assert [word for head in heads for word in head[1:]] == whole


def test_runs_on_a_narrow_terminal_keep_whole_numbers_too(
    done: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("FORCE_COLOR", "1")
    code, out, _ = call("compare", done / "out/cells/zero_shot-seed0", done / "out/cells/sequential_merge-seed0")
    assert code == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out)
    assert "…" not in plain
    heads = [line.split()[1:] for line in plain.splitlines() if line.lstrip().startswith("run ")]
    assert [word for head in heads for word in head] == [
        "ZERO-SHOT",
        "MFT",
        "MFN",
        "MAA",
        "BWT",
        "FWT",
        "minutes",
        "peak",
        "MB",
        "constraint",
    ]


def test_a_study_that_went_well_ends_with_what_it_wrote(done: Path, call: Call) -> None:
    code, out, err = call("study", done / "toys.toml", "--out", done / "out")
    assert code == 0
    assert out.rstrip().endswith("report.html")
    assert "tries these again" not in err


def test_compare_says_which_cells_are_not_complete(done: Path, call: Call, tmp_path: Path) -> None:
    shutil.copytree(done / "out", tmp_path / "part")
    for seed in (0, 1):
        shutil.rmtree(tmp_path / f"part/cells/zero_shot-seed{seed}")
    code, out, err = call("compare", tmp_path / "part")
    assert code == 0
    assert "2 of 4 cells are not complete: zero_shot, seed 0 (not begun) and 1 more" in err
    assert "zero_shot" not in out


def without(done: Path, folder: Path, *cells: str) -> Path:
    """A copy of the study that lacks some cells."""
    shutil.copytree(done / "out", folder)
    for cell in cells:
        shutil.rmtree(folder / "cells" / cell)
    return folder


@pytest.mark.parametrize(
    ("left_out", "methods"),
    [
        (("sequential_merge-seed0", "sequential_merge-seed1"), 1),  # the reference has no complete cell
        (("sequential_merge-seed0", "zero_shot-seed1"), 2),  # none that both have
    ],
)
def test_what_nothing_can_be_compared_with_has_dashes(
    left_out: tuple[str, ...], methods: int, done: Path, call: Call, tmp_path: Path
) -> None:
    part = without(done, tmp_path / "part", *left_out)
    code, out, _ = call("compare", part, "--markdown")
    assert code == 0
    head, _, *rows = ([cell.strip() for cell in row.split("|")[1:-1]] for row in out.splitlines())
    assert len(rows) == methods
    for row in rows:
        shown = dict(zip(head, row, strict=True))
        assert (shown["Δ MFN"], shown["p"], shown["n"]) == ("–", "–", str(3 - methods))
    code, out, _ = call("compare", part, "--json")
    tables = json.loads(out)
    assert [row["difference"] for row in tables["paired"]] == [None] * 5 * (methods - 1)
    assert {row["label"] for row in tables["summary"]} >= {"zero_shot"}


def test_failures_are_printed_and_tables_written_where_the_reference_failed(
    done: Path, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = without(done, tmp_path / "part", "sequential_merge-seed0", "sequential_merge-seed1")
    for name in ("report.html", "figures.parquet"):
        (part / name).unlink()
    monkeypatch.setattr(Study, "_run", lambda _, waiting, *__: [CellFailure(cell, "it broke") for cell in waiting])
    code, out, err = call("study", done / "toys.toml", "--out", part)
    assert code == 1
    assert "failed: sequential_merge-seed0: it broke" in err
    assert "zero_shot" in out
    assert "the reference has no complete cell" in " ".join((part / "report.html").read_text().split())
    assert set(pd.read_parquet(part / "figures.parquet")["label"]) == {"zero_shot"}

    def fails(*_: object, **__: object) -> None:
        raise ValueError("no table today")

    monkeypatch.setattr("analysis.write_table", fails)
    code, _, err = call("study", done / "toys.toml", "--out", part)
    assert code == 2
    assert "failed: sequential_merge-seed1: it broke" in err
    assert "no table today" in err


def test_a_dry_run_says_how_long_and_runs_nothing(done: Path, call: Call, tmp_path: Path) -> None:
    code, out, _ = call("study", done / "toys.toml", "--out", tmp_path / "none", "--dry-run")
    assert code == 0
    assert "toys: 4 cells on" in out
    assert "4 to run" in out
    assert re.search(r"about 0:00:\d\d \(h:min:s\) with 2 cells at a time", out)
    assert not (tmp_path / "none").exists()
    code, out, _ = call("study", done / "toys.toml", "--out", tmp_path / "none", "--dry-run", "--json")
    told = json.loads(out)
    assert [(row["method"], row["cells"], row["to_run"]) for row in told["methods"]] == [
        ("sequential_merge", 2, 2),
        ("zero_shot", 2, 2),
    ]
    slow, fast = sorted((row["seconds_per_cell"] for row in told["methods"]), reverse=True)
    assert told["processes"] == 2
    assert slow + fast <= told["seconds"] * (1 + 1e-9) <= 2 * slow * (1 + 1e-6)  # each process runs two of the cells
    code, out, _ = call("study", done / "toys.toml", "--out", done / "out", "--dry-run")
    assert "0 to run" in out
    assert "all done" in out


def test_a_complete_study_only_writes_its_tables_again(done: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the model is loaded, though nothing is left to run")

    monkeypatch.setattr("manifold_cl.study.validate_on_model", refuse)
    monkeypatch.setattr("manifold_cl.study.processes.subprocess.Popen", refuse)
    (done / "out" / "report.html").unlink()
    code, out, err = call("study", done / "toys.toml", "--out", done / "out")
    assert code == 0
    assert "4 of 4 cells are complete" in err
    assert "sequential_merge" in out
    assert (done / "out" / "report.html").exists()


def test_wrong_input_ends_with_code_two_before_anything_runs(done: Path, call: Call, tmp_path: Path) -> None:
    for old, new, message in (
        ("zero_shot", "zero_shoot", "unknown method 'zero_shoot', did you mean zero_shot?"),
        ("methods.zero_shot", "methods.mine", 'a label of your own needs method = "NAME" in the table [methods.mine]'),
        ("lr = 0.03", "lr = 0.3", "holds a study of another configuration: methods.sequential_merge.options.lr: 0.03"),
        ("rank = 4", "rank = 40", "holds a study of another configuration: rank: 4 there, 40 here"),
    ):
        path = tmp_path / "toys.toml"
        path.write_text(CONFIG.replace(old, new))
        code, _, err = call("study", path, "--out", done / "out")
        assert code == 2
        assert message in err
    code, _, err = call("study", path, "--out", tmp_path / "fresh")
    assert code == 2
    assert "toys.toml: methods.sequential_merge: inner: rank 40 does not fit a weight of shape (16, 24)" in err
    assert not (tmp_path / "fresh").exists()


def test_an_interrupted_study_says_how_to_go_on(
    done: Path, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Study, "_run", stop)
    code, _, err = call("study", done / "toys.toml", "--out", tmp_path / "out")
    assert code == 130
    assert "interrupted: finished tasks are kept; the same command resumes from there" in err
    assert "--resume" not in err
