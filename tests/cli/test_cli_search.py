"""``manifold-cl search`` on lists of trials, as a user calls it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import toy
from command import Call

from manifold_cl.study import CellFailure, Estimate, Resources, Search, SearchGroup, read_searches
from manifold_cl.study.search import read_search

STREAM = f"{Path(toy.__file__)}:toy_stream"
LIST: dict[str, Any] = {
    "method": "sequential_merge",
    "stream": STREAM,
    "seed": 5,
    "trials": [{"rank": 2, "lr": 0.03}, {"rank": 2, "lr": 0.001}],
}


ONE_TASK = f"""
import sys
from dataclasses import replace

sys.path.append({str(Path(toy.__file__).parent)!r})
from toy import ToyTask, toy_stream

class Nan(ToyTask):
    def scores(self, *_):
        return {{"accuracy": float("nan")}}

def one():
    return replace(toy_stream(), tasks=toy_stream().tasks[:1])

def nan():
    stream = one()
    stream.tasks[0].__class__ = Nan
    return stream
"""


def write(path: Path, **changes: Any) -> Path:
    content = {key: value for key, value in {**LIST, **changes}.items() if value is not None}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two searches, on different parts of the data, that ran through the command; results in ``out``."""
    from manifold_cl import cli

    folder: Path = tmp_path_factory.mktemp("search")
    lists = (
        write(folder / "plain.json", trials=LIST["trials"][:1]),
        write(folder / "held.json", evaluate_on="validation"),
    )
    cli.main(["search", *map(str, lists), "--out", str(folder / "out"), "--processes", "2"])
    return folder


def test_a_search_leaves_one_file_per_list(done: Path) -> None:
    assert sorted(path.name for path in (done / "out").iterdir()) == ["tuning-held.json", "tuning-plain.json"]
    scores = []
    for name, part, trials in (("plain", "test", 1), ("held", "validation", 2)):
        content = json.loads((done / "out" / f"tuning-{name}.json").read_text())
        assert (content["evaluate_on"], content["tasks"]) == (part, ["first", "second", "third"])
        assert content["machine"]["threads"] == 1
        assert content["criterion"] == "highest mfn"
        assert len(content["trials"]) == trials
        best = max(content["trials"], key=lambda trial: trial["mfn"])
        assert content["winner"] == best["options"] == {"rank": 2, "lr": 0.03}
        assert set(best) == {"options", "mft", "mfn", "maa", "bwt", "fwt", "seconds", "capacity", "updates"}
        assert best["updates"]["stable_rank"] > 1
        assert read_search(done / "out", f"tuning-{name}.json", "sequential_merge")[0] == best["options"]
        scores.append(best["mfn"])
    assert scores[0] != scores[1]  # of other parts of the data


def test_equal_scores_are_won_by_the_first_in_the_list_whichever_ended_first(tmp_path: Path) -> None:
    found = Search.read(write(tmp_path / "even.json"), tmp_path)
    figures = dict.fromkeys(("mft", "mfn", "maa", "bwt", "fwt"), 50.0)
    record: Any = SimpleNamespace(metrics=figures, timings=[], capacity=[{}], tasks=["first"], versions={}, machine={})
    for index in (1, 0):  # processes end in any order
        found.save(index, record, "cpu", {})
    content = json.loads(found.path.read_text())
    assert content["winner"] == LIST["trials"][0]
    assert [trial["options"] for trial in content["trials"]] == LIST["trials"]


def test_a_trial_has_the_numbers_of_a_plain_run(done: Path, tmp_path: Path) -> None:
    from manifold_cl.continual import ContinualRunner, Training, make_method

    method = make_method("sequential_merge", **LIST["trials"][0])
    record = ContinualRunner(toy.toy_stream(), method, tmp_path / "run", training=Training(seed=5)).run()
    (trial,) = json.loads((done / "out" / "tuning-plain.json").read_text())["trials"]
    assert {name: trial[name] for name in ("mft", "mfn", "bwt")} == {
        name: round(record.metrics[name], 2) for name in ("mft", "mfn", "bwt")
    }


def test_a_complete_search_prints_its_table_and_a_longer_list_runs_the_rest(
    done: Path, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[list[str]] = []

    def run(group: SearchGroup, *_: object) -> list[CellFailure]:
        began.append([group.trials[cell][0].trials[group.trials[cell][1]]["lr"] for cell in group.pending()])
        return [CellFailure(cell, "it broke") for cell in group.pending()]

    monkeypatch.setattr(SearchGroup, "run", run)
    code, out, err = call("search", done / "plain.json", "--out", done / "out")
    assert code == 0
    assert "plain: sequential_merge on" in out
    assert "rank=2, lr=0.03" in out
    assert "1 of 1 trials have results" in err
    longer = write(tmp_path / "plain.json", trials=[{"rank": 2, "lr": 0.1}, *LIST["trials"]])
    code, _, err = call("search", longer, "--out", done / "out")
    assert code == 1
    assert began == [[], [0.1, 0.001]]
    assert "failed: plain-1-" in err
    assert "it broke" in err
    code, out, _ = call("search", done / "plain.json", done / "held.json", "--out", done / "out", "--json")
    tables = json.loads(out)
    assert [(table["search"], len(table["trials"])) for table in tables] == [("plain", 1), ("held", 2)]
    mfn = [trial["mfn"] for trial in tables[1]["trials"]]
    assert mfn == sorted(mfn, reverse=True)


def test_a_dry_run_measures_one_trial_per_list(
    done: Path, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    original = SearchGroup.estimate

    def estimate(group: SearchGroup, engine: Any, on_label: Any) -> list[Estimate]:
        return original(group, engine, lambda label: told.append(label))

    monkeypatch.setattr(SearchGroup, "estimate", estimate)
    lists = [write(tmp_path / "fresh.json"), write(tmp_path / "plain.json")]
    (tmp_path / "out").mkdir()
    (tmp_path / "out/tuning-plain.json").write_bytes((done / "out/tuning-plain.json").read_bytes())
    code, out, _ = call("search", *lists, "--out", tmp_path / "out", "--dry-run", "--json", "--processes", 2)
    assert code == 0
    content = json.loads(out)
    rows = {row["search"]: row for row in content["searches"]}
    assert {name: (row["trials"], row["to_run"], row["estimate_from"]) for name, row in rows.items()} == {
        "fresh": (2, 2, "measured"),
        "plain": (2, 1, "mean of 1 done"),
    }
    assert [label.rpartition("-")[0] for label in told] == ["fresh-1"]
    fresh, plain = rows["fresh"]["seconds_per_trial"], rows["plain"]["seconds_per_trial"]
    assert content["seconds"] == pytest.approx(fresh + plain)  # two at once, then the third
    assert not (tmp_path / "out" / "trials").exists()
    code, out, _ = call("search", done / "plain.json", "--out", done / "out", "--dry-run")
    assert "1 trials, 0 to run" in out
    assert "all done" in out


@pytest.mark.slow
def test_an_interrupted_search_keeps_what_is_done(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second trial is interrupted after its first task; the next call trains the other two only."""
    from manifold_cl.study import LocalEngine
    from manifold_cl.study.engine import workers

    def interrupted(self: LocalEngine, plan: Any, folder: Path, cells: Any) -> Any:
        import queue

        events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        with workers(plan, folder, events) as start:
            for cell in cells:
                start(cell)
                while not (event := events.get()).ends:
                    yield event
                    if cell == cells[1] and event.kind == "progress" and event.task == 1:
                        raise KeyboardInterrupt
                yield event

    path, out = write(tmp_path / "list.json"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(LocalEngine, "run", interrupted)
        code, _, err = call("search", path, "--out", out)
    assert code == 130
    assert "the same command resumes from there" in err
    assert len(json.loads((out / "tuning-list.json").read_text())["trials"]) == 1
    (folder,) = (p for p in (out / "trials" / "cells").iterdir() if p.is_dir())
    first = (folder / "tasks" / "01-first" / "learned.json").stat().st_mtime_ns
    kept: list[int] = []
    finish = SearchGroup._finished

    def watch(group: SearchGroup, event: Any, updates: Any) -> Any:
        place = group.folder / "cells" / event.cell.name / "tasks" / "01-first" / "learned.json"
        kept.append(place.stat().st_mtime_ns)
        return finish(group, event, updates)

    monkeypatch.setattr(SearchGroup, "_finished", watch)
    (other := out / "trials" / "cells" / "another-list" / "record.json").parent.mkdir()
    other.write_text("{}")
    (notes := out / "trials" / "notes.txt").write_text("of the user")
    code, _, _ = call("search", path, "--out", out)
    assert code == 0
    assert kept == [first]
    assert sorted(p.name for p in (out / "trials" / "cells").iterdir()) == ["another-list"]  # not this list's to remove
    assert not list((out / "trials" / "logs").glob("*"))
    shutil.rmtree(other.parent)
    write(path, trials=[*LIST["trials"], {"rank": 2, "lr": 0.01}])
    code, _, _ = call("search", path, "--out", out)
    assert code == 0
    assert list((out / "trials").iterdir()) == [notes]
    assert len(json.loads((out / "tuning-list.json").read_text())["trials"]) == 3


def test_a_stream_of_one_task_has_no_backward_transfer_and_a_nan_score_no_result(call: Call, tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(ONE_TASK)
    one = write(tmp_path / "one.json", stream="one.py:one", trials=LIST["trials"][:1])
    code, out, _ = call("search", one, "--out", tmp_path / "out")
    assert code == 0
    assert "–" in out
    (trial,) = json.loads((tmp_path / "out" / "tuning-one.json").read_text())["trials"]
    assert trial["bwt"] is None
    assert trial["mfn"] > 0
    code, _, err = call("search", write(one, stream="one.py:nan", trials=LIST["trials"][:1]), "--out", tmp_path / "nan")
    assert code == 1
    assert "failed: one-1-" in err
    assert "MFN is nan" in err
    assert not (tmp_path / "nan" / "tuning-one.json").exists()


def test_a_search_stays_out_of_a_study_s_folder_and_on_one_device(done: Path, call: Call, tmp_path: Path) -> None:
    path = write(tmp_path / "plain.json")
    group = read_searches([path], tmp_path / "out", Resources())[0]
    (tmp_path / "out" / "trials").mkdir(parents=True)
    replace(group.plan, name="rates").save(tmp_path / "out" / "trials")
    before = (tmp_path / "out" / "trials" / "study.json").read_bytes()
    code, _, err = call("search", path, "--out", tmp_path / "out")
    assert code == 2
    assert "holds the study rates" in err
    assert (tmp_path / "out" / "trials" / "study.json").read_bytes() == before
    content = json.loads((done / "out" / "tuning-plain.json").read_text())
    (tmp_path / "out" / "tuning-plain.json").write_text(json.dumps({**content, "device": "cuda"}))
    code, _, err = call("search", path, "--out", tmp_path / "out")
    assert code == 2
    assert "ran on cuda, and the rest would run on cpu: choose --device cuda" in err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "eblroa"}, "wrong.json: unknown method 'eblroa', did you mean eblora"),
        ({"trials": [{"rank": 2}, {"lrr": 1}]}, "wrong.json: trials[1]: "),
        ({"trials": [{"rank": 2}, {"rank": 2}]}, "trials[1] equals trials[0]"),
        ({"trials": []}, "trials is empty"),
        ({"trials": {"rank": 2}}, "trials is a list of tables of options, got {'rank': 2}"),
        ({"trials": [3]}, "trials[0] is a table of options, got 3"),
        ({"seed": -1}, "seeds is a list of whole numbers from 0 on, got [-1]"),
        ({"seed": "5"}, "seed is a whole number, got '5'"),
        ({"seed": None}, "seed is missing"),
        ({"evaluate_on": "tests"}, "evaluate_on is test or validation, got 'tests'"),
        ({"evaluated_on": "test"}, "unknown key 'evaluated_on', did you mean evaluate_on?"),
        ({"stream": "text-vall"}, "wrong.json: stream: unknown stream 'text-vall', did you mean text-val"),
        ({"trials": [{"rank": 40}]}, "wrong.json: trials[0]: inner: rank 40 does not fit a weight of shape (16, 24)"),
    ],
)
def test_a_malformed_list_is_an_error_with_its_name(
    changes: dict[str, Any], message: str, call: Call, tmp_path: Path
) -> None:
    code, _, err = call("search", write(tmp_path / "wrong.json", **changes), "--out", tmp_path / "out")
    assert code == 2
    assert message in err
    assert not (tmp_path / "out").exists()


def test_other_wrong_input_is_refused_too(done: Path, call: Call, tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "row.json").write_text("[]")
    (tmp_path / "twice.json").write_text(json.dumps(LIST).replace('"seed": 5', '"seed": 5, "seed": 6'))
    other = write(tmp_path / "other" / "plain.json")
    moved = write(tmp_path / "plain.json", evaluate_on="validation", seed=6)
    good = done / "plain.json"
    for arguments, message in (
        ((tmp_path / "broken.json",), "broken.json is not JSON"),
        ((tmp_path / "twice.json",), "twice.json is not JSON (the key 'seed' comes twice)"),
        (
            (tmp_path / "row.json",),
            "row.json: a search is a table with method, stream, seed, trials, evaluate_on, got list",
        ),
        ((tmp_path / "none.json",), "none.json does not exist: give the list of trials"),
        ((good, other), "two lists are named plain, so both would write"),
        (
            (moved, "--out", done / "out"),
            "another search (seed 5 instead of 6, evaluate_on 'test' instead of 'validation')",
        ),
        ((good, "--engine", "rya"), "unknown engine 'rya', did you mean ray?"),
        ((good, "--address", "auto"), "--address=auto is for --engine=ray"),
        ((good, "--processes", "0"), "it is at least 1, got 0"),
        ((good, "--gpus", "0.5"), "--gpus 0.5 is for --engine ray"),
        ((good, "--engine", "ray", "--gpus", "1.5"), "--gpus is a number from 0 on"),
        ((good, "--engine", "ray", "--processes", "2"), "--processes 2 is for --engine local"),
    ):
        code, _, err = call("search", *arguments)
        assert code == 2, message
        assert message in err


LISTS = Path(__file__).parents[2] / "benchmarks" / "search"


@pytest.mark.parametrize("path", sorted(LISTS.rglob("*.json")), ids=lambda path: str(path.relative_to(LISTS)))
def test_the_project_s_own_lists_are_valid_and_know_their_results(path: Path) -> None:
    search = Search.read(path, LISTS.parent / "results" / path.parent.relative_to(LISTS))
    assert len(search.pending()) + len(search.results()) >= len(search.trials)
