import base64
import json
import re
import shutil
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from blank_figures import figures
from html_page import Page

from analysis import interference_table, write_report
from analysis.adapters.adapter_set import AdapterSet
from analysis.adapters.batches import layer_batches
from analysis.report import read_subjects

SHARED = 3 + 2  # two figures of forgetting, one of imbalance; spectra of updates and of their sums
SINGLE = 8  # accuracy, two maps, four kinds of interference, principal angles
PROTECTING = 2  # leakage and capacity


@pytest.fixture(autouse=True)
def _figures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Figures are drawn in the tests that read them, and blank in the other ones."""
    with figures(drawn=request.node.get_closest_marker("drawn") is not None):
        yield


@pytest.fixture
def runs(tmp_path: Path, write_run: Callable[..., Path]) -> list[Path]:
    other = {"method": "sequential_merge", "name": "<b>seq</b>", "metrics": {"mft": 85.25, "mfn": 60.0, "bwt": -25.0}}
    return [
        write_run(tmp_path / "ours"),
        write_run(tmp_path / "theirs", seed=1, memory=False, constraints=[], capacity=[], **other),
    ]


@pytest.mark.slow
@pytest.mark.drawn
def test_the_page_needs_nothing_but_itself(tmp_path: Path, runs: list[Path]) -> None:
    page = Page(write_report(tmp_path / "out" / "report.html", runs))
    assert page.open == []
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.links)
    assert len(page.images) == SHARED + 2 * SINGLE + PROTECTING
    assert len(page.evidence) == 5  # scores of both runs, relations, protection, spectra
    for image in [*page.evidence, *page.images]:
        assert image["alt"]
        svg = base64.b64decode((image["src"] or "").partition(",")[2])
        assert ElementTree.fromstring(svg).tag.endswith("svg")
    style = re.search(r"<style>(.*?)</style>", (tmp_path / "out" / "report.html").read_text(), re.DOTALL)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]


def test_the_page_says_the_numbers(tmp_path: Path, runs: list[Path]) -> None:
    page = write_report(tmp_path / "report.html", runs, title="Two runs & more").read_text(encoding="utf-8")
    assert "<title>Two runs &amp; more</title>" in page
    assert "&lt;b&gt;seq&lt;/b&gt;" in page  # names are text, never markup
    assert '<td class="best">−7.5</td>' in page  # the better BWT, with a true minus
    assert "<td>−25.0</td>" in page
    assert "<td>–</td>" in page  # the second run has no MAA
    assert "1.2e−07" in page
    assert "<dt>optimizer.lr</dt><dd>0.001</dd>" in page
    assert page.count("Leakage: share") == 1  # only the first run protects


@pytest.mark.slow
def test_bounds_are_shown_and_never_best(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    bounds = {
        "joint": {"mft": 99.0, "mfn": 98.0, "bwt": 0.0, "fwt": 97.0},
        "zero_shot": {"mft": 40.0, "mfn": 40.0, "bwt": 5.0, "fwt": 95.0},
        "plain": {"mft": 70.0, "mfn": 60.0, "bwt": -20.0, "fwt": 37.0},
    }
    rests = [{"prepare": 1.0, "train": 600.0, "finish": 11.0}, {"evaluate": 1.0}, {"evaluate": 1.0}]
    runs = [write_run(tmp_path / "ours", memory=False)]
    for name, metrics in bounds.items():
        runs.append(write_run(tmp_path / name, method=name, name=name, metrics=metrics, timings=rests, memory=False))
        shutil.rmtree(runs[-1] / "tasks")
    page = Page(write_report(tmp_path / "report.html", runs))
    best = re.findall(r'class="best">(.*?)<', (tmp_path / "report.html").read_text(encoding="utf-8"))
    assert best == ["80.0", "75.0", "−7.5", "37.0"]  # of two runs that compete; only one of them has an MAA
    rows = {row[0].split()[0]: row for row in page.tables[0]}
    assert rows["joint"][2:7] == ["99.0", "98.0", "–", "0.0", "–"]  # no task is unseen after its first stage
    assert rows["joint"][-1] == "612"
    assert rows["zero_shot"][6] == "95.0"


@pytest.mark.slow
def test_adapter_folders_and_names_of_ones_own(tmp_path: Path, runs: list[Path]) -> None:
    folders = [runs[0] / "tasks" / "01-news", runs[0] / "tasks" / "02-nouns"]
    page = write_report(tmp_path / "a.html", {"mine": folders, "a run": runs[1]}).read_text(encoding="utf-8")
    assert page.count('<span class="swatch"') == 1 + 2 + 2  # results, spectra, two sections
    alone = Page(write_report(tmp_path / "b.html", folders[0]))
    assert len(alone.images) == 2  # one task: spectra and a map, no sum and nothing to compare
    assert "Results" not in alone.text


def held(columns: int, size: float = 1.0) -> AdapterSet:
    """Two tasks, two layers; the inputs of the tasks differ in one coordinate."""
    eye = torch.eye(8)
    return AdapterSet.from_factors(
        {
            task: {f"h.{i}.q": (size * eye[:, :columns], eye[:, at : at + columns]) for i in range(2)}
            for at, task in enumerate("ab")
        }
    )


@pytest.mark.slow
@pytest.mark.drawn
def test_updates_of_rank_one_have_a_page(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path / "report.html", {"thin": held(1)}))
    means = page.table("entropy / ln\u00a0r")["thin"]
    assert (means["entropy / ln\u00a0r"], means["effective rank (energy)"]) == ("–", "1.00")
    assert "one singular value is neither balanced nor not" in page.text
    assert len(page.images) == 2 + 1 + 4 + 1  # spectra; a map of the sums only; how updates meet; angles
    saved = held(1).save(tmp_path / "saved")
    folders = [saved / "01-a", saved / "02-b"]
    assert len(Page(write_report(tmp_path / "peft.html", {"peft": folders})).images) == len(page.images)


@pytest.mark.drawn
def test_updates_that_are_all_zero_have_a_page(tmp_path: Path) -> None:
    protected = {"h.0.q": torch.eye(8)[:, :2]}
    page = Page(write_report(tmp_path / "report.html", {"nothing": held(2, 0.0)}, protected=protected))
    assert set(page.table("entropy / ln\u00a0r")["nothing"].values()) == {"nothing", "–"}
    assert "Left out, because they are zero: a, h.0.q; a, h.1.q; a, h.0.q (sum" in " ".join(page.text.split())
    leaks = page.table("worst layer")["a"]
    assert (leaks["all layers"], leaks["worst layer"], leaks["which"], leaks["random"]) == ("–", "–", "–", "–")


def test_the_worst_layer_is_one_that_has_an_update(tmp_path: Path) -> None:
    eye = torch.eye(8)
    layers = {"h.0.q": (0 * eye[:, :2], eye[:, :2]), "h.1.q": (eye[:, :2], eye[:, 1:3])}
    protected = dict.fromkeys(layers, eye[:, :2])
    page = Page(write_report(tmp_path / "r.html", {"x": AdapterSet.from_factors({"a": layers})}, protected=protected))
    leaks = page.table("worst layer")["a"]
    assert (leaks["all layers"], leaks["worst layer"], leaks["which"]) == ("5.0e−01", "5.0e−01", "h.1.q")


def test_an_unfinished_run_without_adapters(
    tmp_path: Path, write_run: Callable[..., Path], record: dict[str, Any]
) -> None:
    nothing = {"accuracy": [[None] * 3] * 3}
    run = write_run(tmp_path / "run", status="running", accuracy=nothing, zero_shot={}, metrics={}, timings=[])
    for file in run.glob("tasks/*/*"):
        file.unlink()
    page = Page(write_report(tmp_path / "report.html", run))
    assert "No adapters were saved" in page.text
    assert "(running)" in page.text


def test_a_failing_report_leaves_the_old_page(
    tmp_path: Path, runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out" / "report.html"
    path.parent.mkdir()
    path.write_text("old")
    with pytest.raises(ValueError, match="give at least one run folder or adapter folder"):
        write_report(path, [])
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        write_report(path, tmp_path / "nowhere")
    monkeypatch.setattr("analysis.files.os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report(path, runs[0] / "tasks" / "01-news")
    assert path.read_text() == "old"
    assert [found.name for found in path.parent.iterdir()] == ["report.html"]


@pytest.mark.slow
def test_reading_a_report_does_not_need_the_runs_to_agree(tmp_path: Path, runs: list[Path]) -> None:
    """Different streams get their own panels."""
    for file in (runs[1] / "record.json", runs[1] / "tasks" / "03-films" / "adapter.json"):
        file.write_text(file.read_text().replace('"films"', '"plays"'))
    page = Page(write_report(tmp_path / "report.html", runs))
    assert [AdapterSet.load(run).tasks[-1] for run in runs] == ["films", "plays"]
    # each run has its own curves and spectra, one figure has the imbalance of both, and there is no common summary
    assert len(page.images) == 4 + 2 * 2 + 1 + 2 * SINGLE + PROTECTING


@pytest.mark.slow
def test_every_part_of_a_report_keeps_to_its_options(
    tmp_path: Path, runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, Any]] = []

    def record(adapters: AdapterSet, **options: Any) -> Any:
        given.append(options)
        return layer_batches(adapters, **options)

    monkeypatch.setattr("analysis.tables.adapter_tables.layer_batches", record)
    page = Page(write_report(tmp_path / "report.html", runs, memory_budget=12_345_678))
    assert len(page.images) == SHARED + 2 * SINGLE + PROTECTING
    assert [(options["memory_budget"], options["device"]) for options in given] == [(12_345_678, "cpu")] * 2
    # adapters are read once, with the options that they were read with: here layers that the runs' records lack
    subjects = read_subjects({run.name: run for run in runs}, transposed="query")
    shutil.rmtree(runs[0] / "tasks")  # a file that is read again would be missed
    assert all(subject.adapters is not None and subject.adapters.transposed for subject in subjects)


def test_a_given_subspace_replaces_those_of_a_run(tmp_path: Path, runs: list[Path]) -> None:
    adapters = AdapterSet.load(runs[0])
    held = {layer: torch.eye(adapters.shape("news", layer)[1])[:, 4:6] for layer in adapters.layers}
    page = Page(write_report(tmp_path / "report.html", runs[0], protected=held))
    leaks = page.table("worst layer")
    table = interference_table(adapters, protected=held)
    total = table[(table["metric"] == "leakage") & (table["layer"] == "total")].set_index("task_b")["value"]
    assert list(leaks) == list(adapters.tasks)  # the first task too, which is free in the run itself
    for task in adapters.tasks:
        assert float(leaks[task]["all layers"].replace("−", "-")) == pytest.approx(total[task], rel=0.06)  # one decimal


ODD = (
    *("$x$", "price in $ and \\bad{$", "\\$5", "50 %", "a\x1b[31mb", "two\nlines", "x\u202ey", "_hidden", "^a_b"),
    *("<script>alert(1)</script>", "&lt;", '"quoted" & so', "n" * 300, " "),
)


@pytest.mark.slow
def test_what_lies_beside_the_updates_is_on_the_page(tmp_path: Path, runs: list[Path]) -> None:
    folders = [runs[0] / "tasks" / "01-news", runs[0] / "tasks" / "02-nouns"]
    plain = AdapterSet.load(*folders)
    noted = replace(plain, notices=("<i>news</i>: not read: a.bias", "news: was\x1b assumed"))
    path = write_report(tmp_path / "report.html", {"noted": noted, "plain": plain})
    text = path.read_text(encoding="utf-8")
    assert text.count('<ul class="notices">') == 1  # the other set has none
    assert "<li>&lt;i&gt;news&lt;/i&gt;: not read: a.bias</li>" in text
    assert "<li>news: was\\x1b assumed</li>" in text
    assert Page(path).open == []


@pytest.mark.slow
@pytest.mark.drawn
def test_names_of_any_kind_have_a_page(tmp_path: Path, runs: list[Path]) -> None:
    draw = torch.Generator().manual_seed(0)
    pair = (torch.randn(8, 2, generator=draw), torch.randn(6, 2, generator=draw))
    many = AdapterSet.from_factors({"one": dict.fromkeys(ODD, pair)})
    tasks = AdapterSet.from_factors({name: {"layer": pair} for name in ODD[:7]})
    record = json.loads((runs[0] / "record.json").read_text())
    record |= {"name": ODD[9], "method": ODD[4], "stream": ODD[6], "tasks": [ODD[0], ODD[12], ODD[7]], "primary": "$"}
    record |= {"accuracy": {"$": record["accuracy"]["accuracy"]}, "zero_shot": {}, "config": {ODD[4]: ODD[9]}}
    (runs[0] / "record.json").write_text(json.dumps(record))
    shutil.rmtree(runs[0] / "tasks")
    path = write_report(tmp_path / "report.html", {"_layers": many, ODD[4]: tasks, "$run$": runs[0]})
    page = Page(path)
    assert page.open == []
    assert "<script>alert" not in path.read_text(encoding="utf-8")
    assert "<script>alert(1)</script>" in page.text
    assert not any(unicodedata.category(letter) in ("Cc", "Cf", "Cs") for letter in page.text.replace("\n", ""))
    for image in page.images:
        svg = base64.b64decode((image["src"] or "").partition(",")[2])
        assert ElementTree.fromstring(svg).tag.endswith("svg")  # a control character would break it


def test_names_that_are_no_text_are_refused(tmp_path: Path, runs: list[Path]) -> None:
    with pytest.raises(ValueError, match=r"'half \\ud800' is no text"):
        AdapterSet.from_factors({"half \ud800": {"layer": (torch.ones(2, 1), torch.ones(2, 1))}})
    record = json.loads((runs[0] / "record.json").read_text())
    (runs[0] / "record.json").write_text(json.dumps({**record, "name": "half \ud800"}))
    with pytest.raises(ValueError, match=r"record\.json holds an unpaired surrogate"):
        write_report(tmp_path / "report.html", runs)
