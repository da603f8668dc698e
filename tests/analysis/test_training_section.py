"""Logs of trainings as sections of a report, in Python and on the command line."""

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from html_page import Page
from torch import Tensor, nn

from analysis import AdapterSet, TrainingWatch, read_training_log, write_report
from analysis.formats import save_lora
from analysis.report import find, read_subjects
from analysis.tables import Gate
from manifold_cl.cli import main

Factors = dict[str, tuple[Tensor, Tensor]]


def drawn(seed: int) -> Factors:
    draw = torch.Generator().manual_seed(seed)
    return {f"h.{k}.q": (torch.randn(30, 3, generator=draw), torch.randn(40, 3, generator=draw)) for k in range(3)}


def watched(folder: Path, now: Factors, *, earlier: Factors | None = None) -> Path:
    """The folder of a watch with two measurements."""
    past = None if earlier is None else AdapterSet.from_factors({"news": earlier})
    watch = TrainingWatch(folder, every=1, earlier=past, factors=lambda model: now, file_format="csv", page=False)
    for step in (10, 20):
        watch.measure(nn.Identity(), step)
    return folder


@pytest.mark.slow
def test_a_watch_in_the_folder_of_a_run_is_a_section_of_its_report(
    tmp_path: Path, write_run: Callable[..., Path]
) -> None:
    run = write_run(tmp_path / "run")
    watched(run / "watch", drawn(0), earlier=drawn(0))
    (subject,) = read_subjects(run)
    assert list(subject.training) == ["watch"]
    (finding,) = [one for one in find([subject]) if one.kind == "training"]
    assert (finding.level, finding.beyond_chance) == ("note", True)
    assert finding.number == "1.000 (chance 0.075)"  # 3 of 40 directions
    page = Page(write_report(tmp_path / "report.html", run))
    assert "The log of" in page.text
    assert "up to step 20" in page.text
    assert "2 measurements of 3 layers" in page.text
    alt = [image["alt"] or "" for image in page.images if "over the steps. At step 20" in (image["alt"] or "")]
    assert len(alt) == 1
    assert "overlap of input subspaces, news 1" in alt[0]


def test_an_unrelated_training_raises_no_alarm_and_one_alone_says_what_it_lacks(tmp_path: Path) -> None:
    watched(tmp_path / "random", drawn(2), earlier=drawn(3))
    watched(tmp_path / "alone", drawn(2))
    subjects = read_subjects([tmp_path / "random", tmp_path / "alone"])
    assert [subject.label for subject in subjects] == ["training"]
    alone, random = find(subjects)  # what is worth knowing comes first
    assert (random.level, random.beyond_chance) == ("fine", False)
    assert alone.level == "note"
    assert "no earlier task was given" in alone.headline


@pytest.mark.slow
@pytest.mark.parametrize("name", ["watch", "watch/log/step-0000000010.csv"])
def test_the_command_reads_a_watch_beside_adapters_and_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    now = drawn(0)
    save_lora(tmp_path / "ad", [("news", [("news", layer, *pair) for layer, pair in now.items()])])
    log = read_training_log(watched(tmp_path / "watch", now, earlier=drawn(1)))
    for number, paths in enumerate(([name], ["ad/01-news", name])):
        out = tmp_path / f"report-{number}"
        main(["analyze", *(str(tmp_path / path) for path in paths), "--out", str(out), "--json"])
        found = json.loads(capsys.readouterr().out)
        assert "training" in [one["kind"] for one in found["findings"]]
        written = pd.read_csv(found["paths"]["training"], keep_default_na=False)
        assert len(written) == len(log)
        assert set(written["training"]) == {"watch"}
        assert ("spectra" in found["paths"]) is (number == 1)


def test_gates_are_about_adapters_and_not_about_the_steps_of_a_training(tmp_path: Path) -> None:
    log = read_training_log(watched(tmp_path / "watch", drawn(0)))
    with pytest.raises(ValueError, match="no table has the metric 'stable_rank'"):
        Gate.parse("stable_rank_min<1").value(log)


def test_a_damaged_measurement_is_named(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    watched(tmp_path / "watch", drawn(0))
    damaged = tmp_path / "watch" / "log" / "step-0000000030.parquet"
    damaged.write_bytes(b"PAR1 and nothing")
    with pytest.raises(ValueError, match=r"step-0000000030\.parquet is no intact measurement"):
        read_subjects(tmp_path / "watch")
    damaged.unlink()
    (tmp_path / "watch" / "log" / "step-0000000030.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has no column 'step'"):
        read_subjects(tmp_path / "watch")


@pytest.mark.parametrize("lines", [-1, -0.5, 0])
def test_a_truncated_csv_measurement_is_named(tmp_path: Path, lines: float) -> None:
    watched(tmp_path / "watch", drawn(0), earlier=drawn(1))
    damaged = tmp_path / "watch" / "log" / "step-0000000020.csv"
    whole = damaged.read_text()
    kept = whole.splitlines(keepends=True)[:-1]  # cut between two lines, within a line, or all of them
    damaged.write_text({-1: "".join(kept), -0.5: whole[: len(whole) // 2], 0: kept[0]}[lines])
    with pytest.raises(ValueError, match=r"step-0000000020\.csv is no intact measurement"):
        read_subjects(tmp_path / "watch")


@pytest.mark.slow
def test_a_log_of_another_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_lora(tmp_path / "ad", [("news", [("news", f"other.{layer}", *pair) for layer, pair in drawn(0).items()])])
    watched(tmp_path / "ad" / "01-news" / "watch", drawn(0))
    main(["analyze", str(tmp_path / "ad" / "01-news"), "--out", str(tmp_path / "report"), "--json"])
    (notice,) = [one for one in json.loads(capsys.readouterr().out)["notices"] if "training" in one]
    assert "'watch' has no layer of these adapters: 'h.0.q' and not 'other.h.0.q'" in notice
    assert "no layer of these adapters" in Page(tmp_path / "report" / "report.html").text
    save_lora(tmp_path / "same", [("news", [("news", layer, *pair) for layer, pair in drawn(0).items()])])
    (subject,) = read_subjects([tmp_path / "same" / "01-news", watched(tmp_path / "own", drawn(0))])
    assert not [one for one in subject.notices if "training" in one]


def test_logs_of_one_name_are_called_by_their_paths(tmp_path: Path) -> None:
    paths = [watched(tmp_path / name / "watch", drawn(0)) for name in ("first", "second")]
    (subject,) = read_subjects([*paths, watched(tmp_path / "third", drawn(0))])
    assert list(subject.training) == [*(path.as_posix() for path in paths), "third"]
