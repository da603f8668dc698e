"""The tables of lm-four are what the searches measured, with equal budgets, and what the cells of the study hold."""

import json
from pathlib import Path

import pytest

import manifold_cl

ROOT = Path(manifold_cl.__file__).parents[1]
FOLDER = ROOT / "benchmarks" / "results" / "lm-four"
SEARCHES = {path.stem.removeprefix("tuning-"): json.loads(path.read_text()) for path in FOLDER.glob("tuning-*.json")}


def test_the_tables_are_made_from_the_searches_and_the_study(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import lm_four

    assert {search["method"] for search in SEARCHES.values()} == set(SEARCHES)
    assert len(SEARCHES) == 6
    assert lm_four.searches() == lm_four.SEARCHES.read_text(encoding="utf-8")
    assert lm_four.study() == lm_four.STUDY.read_text(encoding="utf-8")
    assert lm_four.seeds() == lm_four.SEEDS.read_text(encoding="utf-8")


def test_all_searches_are_equal_and_on_validation_parts() -> None:
    assert len({len(search["trials"]) for search in SEARCHES.values()}) == 1
    assert {(s["stream"], s["evaluate_on"], s["seed"]) for s in SEARCHES.values()} == {("lm-four", "validation", 100)}


@pytest.mark.parametrize("method", sorted(SEARCHES))
def test_the_winner_is_the_best_of_the_listed_trials(method: str) -> None:
    search = SEARCHES[method]
    listed = json.loads((ROOT / "benchmarks" / "search" / "lm-four" / f"{method}.json").read_text())
    assert all(trial["options"] in listed["trials"] for trial in search["trials"])
    assert search["winner"] == max(search["trials"], key=lambda trial: trial["mfn"])["options"]
