"""The table of rates on docs/choosing.md is what the searches found, and what the method classes start from."""

import ast
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

import manifold_cl
from manifold_cl import searched_rates
from manifold_cl.continual import make_method

ROOT = Path(manifold_cl.__file__).parents[1]
PAGE = (ROOT / "docs/choosing.md").read_text(encoding="utf-8")


def table_of(folder: str) -> list[list[str]]:
    """The rows of the page that link a search in this folder of the results."""
    lines = [line for line in PAGE.splitlines() if f"(../benchmarks/results/{folder}tuning-" in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


ROWS, WIDER = table_of(""), table_of("lm-four/")
ALTERNATIVES = ("official", "full", "cheaper")
"""Rows whose options are no defaults: of a method's second search, and of `best`."""


def options_of(row: list[str]) -> dict[str, Any]:
    """Every option that a row states: in its first cell, as a rate, or among the others."""
    named = ", ".join(re.findall(r"`(\w+=[^`]+)`", " ".join((row[0], row[3]))))
    call = ast.parse(f"f({named})", mode="eval").body
    assert isinstance(call, ast.Call)
    options = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    return {
        **options,
        **{name: float(cell.strip("`")) for name, cell in (("lr", row[1]), ("scale_lr", row[2])) if cell},
    }


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_a_row_is_the_winner_of_the_search_that_it_links(row: list[str]) -> None:
    link = re.search(r"\((\.\./benchmarks/results/tuning-[\w-]+\.json)\)", row[5])
    assert link
    search = json.loads((ROOT / "docs" / link.group(1)).read_text(encoding="utf-8"))
    assert row[0].startswith(f"`{search['method']}`")
    assert options_of(row) == search["winner"]
    assert float(row[4]) == max(trial["mfn"] for trial in search["trials"])


@pytest.mark.parametrize("row", [row for row in ROWS if not any(word in row[0] for word in ALTERNATIVES)], ids=str)
def test_a_row_is_the_default_of_its_method(row: list[str]) -> None:
    method = re.match(r"`(\w+)`", row[0])
    assert method
    options = options_of(row)
    of_the_step = {name: options[name] for name in ("step", "direction") if "direction" in options}
    defaults = make_method(method.group(1), **of_the_step).options()
    assert {name: defaults[name] for name in options_of(row)} == options_of(row)


def test_best_starts_from_a_trial_of_half_the_statistics_within_half_a_point_of_its_winner() -> None:
    """decisions/0032: a tie by the noise of one run is decided by time."""
    search = json.loads((ROOT / "benchmarks/results/tuning-best.json").read_text(encoding="utf-8"))
    options = {**search["winner"], "statistics_during": search["winner"]["statistics_during"] / 2}
    (trial,) = (
        trial
        for trial in search["beyond_the_budget"]
        if trial["options"].keys() == options.keys() and trial["options"] == pytest.approx(options, rel=0.02)
    )
    assert trial["mfn"] > max(each["mfn"] for each in search["trials"]) - 0.5
    defaults = make_method("best").options()
    assert {name: defaults[name] for name in options} == trial["options"]


@pytest.mark.parametrize("row", WIDER, ids=[row[0] for row in WIDER])
def test_a_row_of_the_wider_model_is_the_best_trial_that_never_diverged(row: list[str]) -> None:
    link = re.search(r"\((\.\./benchmarks/results/lm-four/tuning-[\w-]+\.json)\)", row[5])
    assert link
    search = json.loads((ROOT / "docs" / link.group(1)).read_text(encoding="utf-8"))
    assert row[0].startswith(f"`{search['method']}`")
    left_out = [search["winner"]] if search["method"] == "eblora" else []  # with seed 2 (docs/results.md)
    best = max((t for t in search["trials"] if t["options"] not in left_out), key=lambda trial: trial["mfn"])
    assert options_of(row) == best["options"]
    assert float(row[4]) == pytest.approx(best["mfn"], abs=0.005)


def test_the_table_of_the_package_is_that_of_the_searches() -> None:
    """New searches join by their file: ``python benchmarks/rates.py`` writes the table anew."""
    script = runpy.run_path(str(ROOT / "benchmarks/rates.py"))
    assert json.loads(script["TABLE"].read_text(encoding="utf-8")) == script["rows"]()
    files = {str(path.relative_to(script["RESULTS"])) for path in script["RESULTS"].rglob("tuning-*.json")}
    assert {row["file"] for row in script["rows"]()} == files
    assert {row["file"]: row["diverged"] for row in script["rows"]() if "diverged" in row} == {
        "lm-four/tuning-eblora.json": ["eblora-seed2"]
    }
    shown = {row[5] for row in (*ROWS, *WIDER)}
    assert {name for name in files if not any(f"results/{name})" in cell for cell in shown)} == set()


def test_the_rates_of_a_model_are_those_of_the_search_nearest_in_width() -> None:
    text, decoder = searched_rates(384), searched_rates(576)
    assert text == {name: make_method("eblora").options()[name] for name in ("lr", "scale_lr")}
    assert decoder == {"lr": 6e-3, "scale_lr": 2e-2}
    assert searched_rates(64) == searched_rates(420) == text
    assert searched_rates(570) == decoder
    assert searched_rates(4 * 576) == {"lr": 3e-3, "scale_lr": 2e-2}  # half the rate, twice the root of the width
    assert searched_rates(576, "sequential_merge") == {"lr": 6e-4}
    assert searched_rates(torch.nn.Sequential(torch.nn.Linear(576, 3))) == decoder
    with pytest.raises(ValueError, match="eblora"):
        searched_rates(384, "eblorra")
    with pytest.raises(TypeError, match="number"):
        searched_rates("llama")


def test_the_page_shows_the_rates_by_width() -> None:
    for row in PAGE.splitlines():
        if row.startswith('| `searched_rates(n)["lr"]`'):
            shown = [float(cell) for cell in row.strip("|").split("|")[1:]]
    assert shown == [float(f"{searched_rates(n)['lr']:.1e}") for n in (384, 576, 1024, 2048, 4096)]


def test_the_page_on_adapters_shows_what_a_merge_into_bfloat16_was_measured_to_lose() -> None:
    measured = json.loads((ROOT / "benchmarks/results/bf16-merge.json").read_text(encoding="utf-8"))["rows"]
    page = (ROOT / "docs/adapters.md").read_text(encoding="utf-8")
    for title, key in (("lost, median layer", "median"), ("lost, worst layer", "most")):
        cells = " | ".join(f"{100 * row[key]:.0f} %" for row in measured)
        assert f"| {title} | {cells} |" in page
    assert f"| {' | '.join(str(row['singular_value']) for row in measured)} |" in page


def test_sources_and_thresholds_have_the_figures_of_the_search() -> None:
    """The same four trials stand on two pages."""
    search = json.loads((ROOT / "benchmarks/results/tuning-eblora.json").read_text(encoding="utf-8"))
    decision = (ROOT / "docs/decisions/0005-what-the-memory-protects.md").read_text(encoding="utf-8")
    found = 0
    for trial in (*search["trials"], *search["beyond_the_budget"]):
        options = trial["options"]
        if (options["lr"], options["scale_lr"], options["initial_scale"]) == (6e-3, 2e-2, -0.05):
            found += 1
            source, energy, scores = (
                options["source"],
                f"{options['energy']:.2f}",
                f"{trial['mft']:.1f} | {trial['mfn']:.1f}",
            )
            mean, fullest = (f"{100 * trial['capacity'][key]:.0f} %" for key in ("mean_fraction", "max_fraction"))
            assert f'| `"{source}"` | {energy} | {scores} | {mean} | {fullest} |' in PAGE
            assert f"| {source} | {energy} | {scores} | {trial['bwt']:.1f} | {mean} |".replace("-", "−") in decision
    assert found == 4


def test_every_search_has_a_row() -> None:
    files = {path.name for path in (ROOT / "benchmarks/results").glob("tuning-*.json")}
    assert {re.search(r"tuning-[\w-]+\.json", row[5]).group() for row in ROWS} == files  # type: ignore[union-attr]


def row_of(trial: dict[str, Any]) -> str:
    """A trial of `benchmarks/one_change.py` as a row of the table of symptoms."""
    method = "" if trial["method"] == "eblora" else f"`{trial['method']}`"
    changed = ", ".join(filter(None, [method, *(f"`{name}={value:g}`" for name, value in trial["options"].items())]))
    sizes = ", ".join(f"{value:.2f}" for value in trial["largest_singular_value"])
    figures = " | ".join(f"{trial[figure]:.1f}" for figure in ("mft", "mfn", "bwt"))
    losses = f"{trial['first_loss'][1]:.2f} → {trial['last_loss'][1]:.2f}"
    return f"| {changed or 'nothing'} | {figures} | {losses} | {sizes} |".replace("-", "−").replace("=−", "=-")


TRIALS = json.loads((ROOT / "benchmarks/results/one-change.json").read_text(encoding="utf-8"))["trials"]


@pytest.mark.parametrize("trial", TRIALS, ids=[str(trial["options"]) for trial in TRIALS])
def test_a_row_of_symptoms_is_what_was_measured(trial: dict[str, Any]) -> None:
    assert row_of(trial) in PAGE.splitlines()


RATES = re.compile(
    r"(?:param_groups|TrainerOptimizer|RiemannianAdamW)\b.*?\blr\"?\s*[=:]\s*([\d.e-]+)(?:.*?scale_lr\"?\s*[=:]\s*([\d.e-]+))?"
)
SHOWN = [
    ROOT / "README.md",
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / "docs/api").glob("*.rst"),
    *(ROOT / "examples").glob("*.py"),
]


@pytest.mark.parametrize("path", sorted(SHOWN), ids=lambda path: path.name)
def test_examples_use_the_pair_of_the_table_or_give_a_reason(path: Path) -> None:
    defaults = make_method("eblora").options()
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        for lr, scale_lr in RATES.findall(line):
            same = float(lr) == defaults["lr"] and float(scale_lr or defaults["scale_lr"]) == defaults["scale_lr"]
            comments = " ".join(each.partition("#")[2] for each in lines[max(number - 3, 0) : number + 1])
            assert same or re.search(r"\b(lr|rates?)\b", comments), line
