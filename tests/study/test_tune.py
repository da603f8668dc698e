"""The script that searches options notes what a study judges them by: which tasks, and which part of their data."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from toy import toy_stream

from manifold_cl.plugins import load_object
from manifold_cl.study.search import read_search

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "tune.py"
SEARCH = {"method": "sequential_merge", "stream": "toy", "seed": 5, "trials": [{"rank": 2, "lr": 0.03}]}


@pytest.fixture
def tune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, on the toy stream and a folder of its own."""
    tune = sys.modules[load_object(f"{SCRIPT}:tune").__module__]
    monkeypatch.setattr(tune, "HERE", tmp_path)
    monkeypatch.setattr(tune, "open_stream", lambda name: toy_stream(name=name))
    (tmp_path / "search").mkdir()
    return tune


@pytest.mark.parametrize("part", ["test", "validation"])
def test_a_search_notes_its_tasks_and_the_part_it_looked_at(part: str, tune: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "search" / "small.json"
    file.write_text(json.dumps({**SEARCH, "evaluate_on": part}))
    tune.tune("small")
    options, said = read_search(tmp_path, "results/tuning-small.json", "sequential_merge")
    assert options == {"rank": 2, "lr": 0.03}
    assert (said["tasks"], said["evaluate_on"]) == (["first", "second", "third"], part)
    other = {"test": "validation", "validation": "test"}[part]
    file.write_text(json.dumps({**SEARCH, "evaluate_on": other}))
    with pytest.raises(ValueError, match=r"tuning-small\.json holds trials on another stream or part of it: move it"):
        tune.tune("small")


def test_the_two_parts_give_other_scores(tune: ModuleType, tmp_path: Path) -> None:
    found = []
    for part in ("test", "validation"):
        (tmp_path / "search" / f"{part}.json").write_text(json.dumps({**SEARCH, "evaluate_on": part}))
        tune.tune(part)
        found.append(json.loads((tmp_path / "results" / f"tuning-{part}.json").read_text())["trials"][0]["mfn"])
    assert found[0] != found[1]
