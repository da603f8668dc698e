"""The page about a study: alone, escaped, complete, and honest about what is missing or was not tuned."""

import base64
import re
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from blank_figures import figures
from html_page import Page, squeezed

from analysis import StudyResults, write_study_report

NASTY = "<b>ours & theirs</b>"
NAMED = {
    "plain": {"method": "sequential_merge", "options": {"lr": 0.001}},
    NASTY: {
        "method": "eblora",
        "options": {"lr": 0.006, "source": None},
        "search": {"file": "results/tuning.json", "stream": "text-val", "trials": 7, "mfn": 89.5},
    },
    "joint": {"method": "joint"},
}
STORED = {
    "plain": {"updates": 3e6, "state": 0, "old_examples": 0},
    NASTY: {"updates": 3e6, "state": 1.5e6, "old_examples": 0},
    "joint": {"updates": 1e6, "state": 0, "old_examples": 120},
}
PLAIN = [[[60.0, 41, 31], [50, 70, 31], [level, 60, 80]] for level in (40.0, 43.0, 46.0)]
OURS = [[[60.0, 42, 32], [59, 70, 32], [level, 68, 78]] for level in (58.0, 61.0, 64.0)]
JOINT = [[[70.0, 75, 80]] * 3] * 3
HALF = [[60.0, 42, 32], [None] * 3, [None] * 3]


@pytest.fixture
def study(tmp_path: Path, write_study: Callable[..., Path]) -> StudyResults:
    runs = {"plain": PLAIN, NASTY: [*OURS[:2], HALF], "joint": JOINT}
    return StudyResults.load(write_study(tmp_path / "study", runs, named=NAMED, stored=STORED))


@pytest.fixture(autouse=True)
def _figures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Figures are drawn in the tests that read them, and blank in the other ones."""
    with figures(drawn=request.node.get_closest_marker("drawn") is not None):
        yield


@pytest.fixture
def page(tmp_path: Path, study: StudyResults) -> Page:
    return Page(write_study_report(tmp_path / "out" / "study.html", study))


@pytest.mark.slow
@pytest.mark.drawn
def test_the_page_needs_nothing_but_itself(tmp_path: Path, page: Page) -> None:
    assert page.open == []
    assert set(page.links) == {"#missing", *(image["src"] for image in page.images)}
    assert all((image["src"] or "").startswith("data:image/svg+xml;base64,") for image in page.images)
    assert len(page.images) == 3 + 3  # overview, cost, a matrix a method
    assert all(image["alt"] for image in page.images)
    text = (tmp_path / "out" / "study.html").read_text(encoding="utf-8")
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert style is not None
    assert "url(" not in style[1]
    assert "<b>ours" not in text  # labels are text, never markup
    assert "&lt;b&gt;ours &amp; theirs&lt;/b&gt;" in text
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["study.html"]


def test_the_page_says_what_was_run(page: Page) -> None:
    text = squeezed(page.text)
    for said in (
        "small: 3 methods on toy",
        "news → nouns → films",
        "0, 1, 2",
        "epochs 1",
        "rank 3",
        "8 of 9 complete",
        "device cpu, threads 1, processes 2",
        "torch 2.13.0",
    ):
        assert said in text


def test_results_are_means_with_intervals_and_the_best_competing_one_is_marked(page: Page) -> None:
    table = page.table("MFN")
    assert table["plain (reference)"]["MFN"] == "61.0 ± 2.5"  # 60, 61, 62: t 4.302653 / √3
    assert table["plain (reference)"]["BWT"] == "−13.5 ± 3.7"  # −15, −13.5, −12: sd 1.5
    assert table[NASTY]["MFN"] == "68.5 ± 6.4"  # 68 and 69: t 12.7062, sd 1 / √2
    assert (table[NASTY]["cells"], table["plain (reference)"]["cells"]) == ("2", "3")
    assert table["joint (not competing)"]["MFN"] == "75.0 ± 0.0"
    assert table["plain (reference)"]["FWT"] == "–"  # not in these records
    assert len(page.marked) == 3  # MFT of the reference, MFN and BWT of ours; joint does not compete
    assert page.text.count("nothing about other tasks") == 5  # wherever intervals are shown


def test_the_comparison_has_p_and_the_adjusted_p(page: Page, study: StudyResults) -> None:
    table = page.table("p, Holm")
    assert set(table) == {NASTY, "joint"}
    assert table[NASTY]["pairs"] == "2"
    assert table[NASTY]["MFN"].startswith("+8.0 ±")
    found = study.paired(figures=["mfn"]).set_index("label")
    assert table["joint"]["p of MFN"] == f"{found.loc['joint', 'p']:.4f}"
    assert table[NASTY]["p of MFN"] == "–"  # both differences are 8: no spread to test against


def test_costs_and_tuning_are_told(page: Page) -> None:
    cost = page.table("old data")
    assert (cost[NASTY]["updates (MB)"], cost[NASTY]["state (MB)"], cost[NASTY]["old data"]) == ("3.00", "1.50", "none")
    assert cost["joint"]["old data"] == "120 examples"
    assert cost["plain"]["learning (min)"] == "0.17"  # 3 × 3.5 s
    tuned = page.table("trials")
    assert tuned[NASTY] == {
        "method": NASTY,
        "is": "eblora",
        "options": "lr 0.006",
        "search": "results/tuning.json",
        "stream": "text-val",
        "trials": "7",
        "best MFN there": "89.50",
    }
    assert tuned["plain"]["search"] == "not tuned"


def test_missing_cells_are_named_and_all_others_listed(page: Page) -> None:
    assert "1 of 9 cells are missing" in squeezed(page.text)
    assert page.table("came as far as")[NASTY] == {
        "method": NASTY,
        "order": "default",
        "seed": "2",
        "came as far as": "1 of 3 tasks",
    }
    (cells,) = [rows for rows in page.tables if rows[0][-1] == "folder"]
    assert len(cells) == 1 + 8
    assert cells[1][-1] == "0"


def test_records_without_costs_get_dashes(tmp_path: Path, write_study: Callable[..., Path]) -> None:
    study = StudyResults.load(write_study(tmp_path / "study", {"plain": PLAIN, "ours": OURS}))
    page = Page(write_study_report(tmp_path / "a.html", study, title="Old & new", highlight=["ours"]))
    row = page.table("old data")["plain"]
    assert [row[key] for key in ("updates (MB)", "state (MB)", "old data")] == ["–", "–", "–"]
    assert "Old & new" in page.text
    assert "missing" not in page.text.lower().replace("missing cells", "")


@pytest.mark.slow
@pytest.mark.drawn
def test_one_method_or_one_seed_compares_with_nothing(tmp_path: Path, write_study: Callable[..., Path]) -> None:
    alone = StudyResults.load(write_study(tmp_path / "alone", {"plain": PLAIN}))
    assert "no other method has a complete cell" in Page(write_study_report(tmp_path / "a.html", alone)).text
    lost = StudyResults.load(write_study(tmp_path / "lost", {"plain": [None], "ours": OURS[:1]}))
    page = Page(write_study_report(tmp_path / "b.html", lost))
    assert "reference has no complete cell" in squeezed(page.text)
    assert page.table("MFN")["ours"]["MFN"] == "68.0"  # one cell has no interval
    once = StudyResults.load(write_study(tmp_path / "once", {"plain": PLAIN[:1], "ours": OURS[:1]}))
    row = Page(write_study_report(tmp_path / "c.html", once)).table("p, Holm")["ours"]
    assert (row["pairs"], row["MFN"], row["p of MFN"], row["p, Holm"]) == ("1", "+8.0", "–", "–")


def test_training_that_sets_nothing_is_the_defaults(tmp_path: Path, write_study: Callable[..., Path]) -> None:
    study = StudyResults.load(write_study(tmp_path / "study", {"plain": PLAIN}, training={}))
    page = write_study_report(tmp_path / "a.html", study)
    assert "<dt>training</dt><dd>the defaults</dd>" in page.read_text(encoding="utf-8")


def test_orders_have_matrices_of_their_own(tmp_path: Path, write_study: Callable[..., Path]) -> None:
    orders = {"default": ["news", "nouns", "films"], "again": ["news", "nouns", "films"]}
    cells = [
        {"label": "plain", "order": order, "seed": seed, "folder": f"cells/{seed}"}
        for seed, order in enumerate(["default", "default", "again"])
    ]
    study = StudyResults.load(write_study(tmp_path / "study", {"plain": PLAIN}, orders=orders, cells=cells))
    page = Page(write_study_report(tmp_path / "a.html", study))
    assert "3 seeds and 2 orders of the tasks" in squeezed(page.text)
    assert "plain, default, 2 cells" in squeezed(page.text)
    assert "plain, again, 1 cell" in squeezed(page.text)
    assert len(page.images) == 2 + 2


def test_a_study_without_complete_cells_has_no_page(tmp_path: Path, write_study: Callable[..., Path]) -> None:
    study = StudyResults.load(write_study(tmp_path / "study", {"plain": [None]}))
    with pytest.raises(ValueError, match="no cell of the study 'small' is complete: there is nothing to report yet"):
        write_study_report(tmp_path / "a.html", study)
    assert not (tmp_path / "a.html").exists()


@pytest.mark.slow
@pytest.mark.drawn
def test_labels_of_any_kind_have_a_page(tmp_path: Path, write_study: Callable[..., Path]) -> None:
    matrix = [[60.0, 40, 30], [50, 70, 30], [55, 60, 80]]
    labels = ["$x_{$", "a\x1b[31mb", "_hidden", "<script>alert(1)</script>", "n" * 300, "two\nlines", "x\u202ey", ""]
    study = write_study(tmp_path / "study", {label: [matrix] for label in labels}, name="$\x1b$")
    path = write_study_report(tmp_path / "report.html", StudyResults.load(study), highlight=["_hidden"])
    page = Page(path)
    assert page.open == []
    assert "<script>alert" not in path.read_text(encoding="utf-8")
    assert not any(unicodedata.category(letter) in ("Cc", "Cf") for letter in page.text.replace("\n", ""))
    assert {"$x_{$ (reference)", "a\\x1b[31mb", "_hidden", "two\\nlines", "x\\u202ey"} <= set(page.table("cells"))
    for image in page.images:
        svg = base64.b64decode((image["src"] or "").partition(",")[2])
        assert ElementTree.fromstring(svg).tag.endswith("svg")
