"""A study's file is checked whole before anything runs."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import toy
from records import editable

from manifold_cl.files import FileError
from manifold_cl.study import Cell, Study, StudyPlan, estimate, read_plan, validate_on_model

Write = Callable[..., Path]


def search(folder: Path, *, name: str = "found", **changes: Any) -> str:
    trials = [{"options": {"lr": lr}, "mfn": mfn} for lr, mfn in ((0.01, 80.0), (0.03, 85.5), (0.1, 70.0))]
    content = {"method": "sequential_merge", "stream": "text-val", "winner": {"lr": 0.03}, "trials": trials, **changes}
    (folder / f"{name}.json").write_text(json.dumps(content))
    return f"{name}.json"


def tuned(file: str, *, beside: str = "") -> tuple[str, str]:
    """Takes the first method's options from a search."""
    return "alpha = 8.0\nlr = 0.03\n\n[methods.ours]", f'winner_of = "{file}"\n{beside}\n[methods.ours]'


def test_a_file_becomes_cells_seed_by_seed(config: Write) -> None:
    plan = read_plan(config())
    assert (plan.name, plan.reference, plan.rank, plan.processes) == ("toy", "sequential_merge", 4, 2)
    assert plan.orders == {"default": ["first", "second", "third"]}
    assert [cell.name for cell in plan.cells] == [
        "sequential_merge-seed0",
        "ours-seed0",
        "sequential_merge-seed1",
        "ours-seed1",
    ]
    assert plan.cell("ours-seed1") == Cell("ours", "default", 1)
    method = plan.make_method("ours")
    assert (method.name, method.options()["rank"], method.options()["energy"]) == ("eblora", 4, 0.9)
    assert plan.make_training(3).epochs == 2
    assert plan.make_training(3).seed == 3


def test_orders_have_names_and_the_same_tasks(config: Write) -> None:
    more = '\n[orders]\nforth = ["first", "second", "third"]\nback = ["third", "second", "first"]\n'
    plan = read_plan(config(more=more))
    assert plan.cell("ours-back-seed1").order == "back"
    assert len(plan.cells) == 8
    assert plan.open_stream("back").task_names == ("third", "second", "first")
    with pytest.raises(ValueError, match=r"orders\.back has other tasks than orders\.forth: \['second'\]"):
        read_plan(config(more=more.replace('["third", "second", "first"]', '["third", "first"]')))


def test_a_plan_comes_back_from_its_folder(config: Write, tmp_path: Path) -> None:
    plan = read_plan(config(("epochs = 2", "epochs = [1, 2, 1]")))
    plan.save(tmp_path / "out")
    assert StudyPlan.load(tmp_path / "out") == plan
    assert plan.make_training(0).epochs == (1, 2, 1)


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"methods": {"../../../x": {"method": "eblora", "options": {}}}}, r"label '\.\./\.\./\.\./x' becomes a folder's"),
    ({"methods": {"x" * 300: {"method": "eblora", "options": {}}}}, "becomes a folder's name"),
    ({"methods": {"ours\n": {"method": "eblora", "options": {}}}}, r"label 'ours\\n' becomes a folder's name"),
    ({"methods": {"ours": {"method": ["eblora"], "options": {}}}}, r"methods\.ours\.method is the name of a method"),
    ({"methods": {"ours": {"method": "eblora", "options": 3}}}, r"methods\.ours\.options is a table, got 3"),
    ({"methods": {"ours": {"method": "eblora", "options": {}, "colour": 1}}}, "colour"),
    ({"methods": {"ours": 3}}, "holds no study"),
    ({"methods": [1]}, r"methods is a table of tables, got \[1\]"),
    ({"methods": None}, "methods is a table of tables, got None"),
    ({"orders": {"..": ["first"]}}, r"order '\.\.' becomes a folder's name"),
    ({"orders": {"a": [1]}}, r"orders\.a is a list of task names, got \[1\]"),
    ({"orders": {"a": "first"}}, r"orders\.a is a list of task names, got 'first'"),
    ({"orders": 3}, "orders is a table"),
    ({"seeds": ["../x"]}, r"seeds is a list of whole numbers from 0 on, got \['\.\./x'\]"),
    ({"seeds": 3}, "seeds is a list of whole numbers, got 3"),
    ({"seeds": [0, 0]}, "seeds must differ, 0 comes twice"),
    ({"seeds": [True]}, "seeds is a list of whole numbers from 0 on"),
    ({"name": "/etc"}, "the name of a study is part of a folder's name"),
    ({"reference": "theirs"}, "unknown reference 'theirs'"),
    ({"stream": 3}, "stream is text, got 3"),
    ({"training": [1]}, r"training is a table, got \[1\]"),
    ({"threads": 0}, "threads is at least 1, got 0"),
    ({"rank": "4"}, "rank is a whole number, got '4'"),
]


@pytest.mark.parametrize(("changes", "said"), CHANGES)
def test_a_plan_in_a_folder_is_checked_as_the_file_of_a_user(
    config: Write, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    read_plan(config()).save(tmp_path)
    path = tmp_path / "study.json"
    content = editable(path)
    if isinstance(methods := changes.get("methods"), dict):
        content["reference"] = next(iter(methods))
    path.write_text(json.dumps({**content, **changes}))
    with pytest.raises(FileError, match=said) as caught:
        StudyPlan.load(tmp_path)
    assert "study.json" in str(caught.value)
    path.write_text(json.dumps({key: value for key, value in content.items() if key not in changes}))
    if not changes.keys() <= {"rank", "orders", "training", "threads"}:  # these have defaults
        with pytest.raises(FileError, match=r"study\.json (lacks|holds no study)"):
            StudyPlan.load(tmp_path)


MARK = """
import pathlib
pathlib.Path(__file__).with_name("ran").touch()
import sys
sys.path.insert(0, {folder!r})
from toy import toy_stream as build
"""


def foreign(stream: str, straight: Path, folder: Path) -> Path:
    """A copy of the study whose stream is code in ``folder``."""
    out = shutil.copytree(straight, folder / "out")
    for name in ("mine.py", "mine_module.py"):
        (folder / name).write_text(MARK.format(folder=str(Path(toy.__file__).parent)))
    content = editable(out / "study.json")
    stream = stream.replace("ABSOLUTE", str(folder / "mine.py"))
    (out / "study.json").write_text(json.dumps({**content, "stream": stream}))
    return out


@pytest.mark.slow
def test_a_worker_runs_no_code_that_a_folder_names(straight: Path, tmp_path: Path) -> None:
    out = foreign("mine_module:build", straight, tmp_path)
    command = [sys.executable, "-m", "manifold_cl.study.worker", str(out), "ours-seed0"]
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    ended = subprocess.run(command, input="", capture_output=True, text=True, env=paths)
    assert ended.returncode != 0
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["mine.py:build", "ABSOLUTE:build", "mine_module:build"])
def test_code_that_a_folder_names_runs_only_where_it_is_asked_for(
    stream: str, config: Write, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, ran = foreign(stream, straight, tmp_path), tmp_path / "ran"
    monkeypatch.syspath_prepend(str(tmp_path))
    plan = StudyPlan.load(out)
    for call in (
        Study(plan, out).validate,
        Study(plan, out).run,
        lambda: plan.open_stream("default"),
        lambda: plan.make_runner(plan.cells[0], out),
        lambda: validate_on_model(plan),
        lambda: estimate(plan, {}),
    ):
        with pytest.raises(ValueError, match=r"the stream .*build' is code, which runs only on request"):
            call()
    with pytest.raises(FileError, match="another configuration: stream"):
        Study(read_plan(config()), out).validate()
    assert not ran.exists()
    asked = StudyPlan.load(out, code_folder=tmp_path)
    assert asked.open_stream("default").task_names == ("first", "second", "third")
    assert ran.exists()
    sys.modules.pop("mine_module", None)


def test_where_a_study_s_files_lie_is_no_part_of_its_identity(tmp_path: Path) -> None:
    plans = []
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "mine.py").write_text(MARK.format(folder=str(Path(toy.__file__).parent)))
        (tmp_path / place / "study.toml").write_text('stream = "mine.py:build"\n[methods.zero_shot]\n')
        plans.append(read_plan(tmp_path / place / "study.toml"))
    assert plans[0].stream == "mine.py:build"
    assert plans[0].identity() == plans[1].identity()
    plans[0].save(tmp_path)
    assert str(tmp_path) not in (tmp_path / "study.json").read_text()
    Study(plans[1], tmp_path).validate()
    older = replace(plans[0], stream=f"{tmp_path / 'here' / 'mine.py'}:build")  # as earlier versions wrote it
    older.save(tmp_path)
    Study(plans[1], tmp_path).validate()


def test_options_of_a_winner_are_read_from_the_search(config: Write, tmp_path: Path) -> None:
    plan = read_plan(config(tuned(search(tmp_path))))
    entry = plan.entries[0]
    assert entry.options == {"lr": 0.03}
    assert entry.search == {"file": "found.json", "stream": "text-val", "trials": 3, "mfn": 85.5}


def test_options_beside_a_winner_make_it_an_untried_setting(config: Write, tmp_path: Path) -> None:
    file = search(tmp_path)
    assert read_plan(config(tuned(file, beside="lr = 0.03\n"))).entries[0].options == {"lr": 0.03}
    for beside, named in (("lr = 0.04\n", "lr"), ("alpha = 8.0\n", "alpha"), ("lr = 1\nalpha = 8.0\n", "lr, alpha")):
        said = rf"methods\.sequential_merge sets {named} beside winner_of, .* the search in found\.json did not try"
        with pytest.raises(ValueError, match=said):
            read_plan(config(tuned(file, beside=beside)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "olora"}, r"found\.json is a search for olora, not for sequential_merge"),
        ({"winner": {"lr": 7.0}}, r"the winner in .*found\.json is none of its trials"),
        (
            {"stream": "STREAM"},
            r"sequential_merge was tuned on the test parts of first, second, third \(stream .*toy_stream\)",
        ),
        ({"tasks": ["nouns", "second"]}, r"test parts of second \(stream text-val\), which are reported: search on"),
        ({"tasks": ["second"], "evaluate_on": "test"}, "search on a stream of other tasks, or on validation parts"),
        ({"stream": "texts"}, r"found\.json does not name the tasks it searched on, .* 'texts' is none of text-six"),
        ({"stream": "texts.py:build"}, r"its stream 'texts\.py:build' is none of text-six"),
        ({"trials": 3}, r"found\.json holds no search, its trials is 3, not a list of trials"),
        ({"trials": [7]}, r"holds no search, trials\[0\] is 7, not a table"),
        ({"trials": [{"mfn": 3.0}]}, r"holds no search, trials\[0\] has no table of options"),
        ({"trials": [{"options": {"lr": 0.03}, "mfn": math.nan}]}, r"holds no search, trials\[0\] has no number mfn"),
        ({"trials": [{"options": {"lr": 0.03}, "mfn": True}]}, r"holds no search, trials\[0\] has no number mfn"),
        ({"evaluate_on": "train"}, r"holds no search, its evaluate_on is 'train', not test or validation"),
        ({"trials": [{"options": {"lr": 0.03}}]}, r"holds no search, trials\[0\] has no number mfn"),
        ({"winner": [0.03]}, r"holds no search, its winner is \[0\.03\], not the options that won"),
        ({"tasks": "second"}, r"holds no search, its tasks are 'second', not a list of names"),
    ],
)
def test_a_search_that_does_not_fit_is_refused(
    config: Write, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    file = search(tmp_path)
    path = config(tuned(file))
    stream = read_plan(path).stream
    search(tmp_path, **{key: stream if value == "STREAM" else value for key, value in changes.items()})
    with pytest.raises(ValueError, match=message):
        read_plan(path)


@pytest.mark.parametrize(
    ("changes", "training"),
    [
        ({"tasks": ["nouns"]}, "epochs = 2"),
        ({"stream": "ucit"}, "epochs = 2"),
        ({"tasks": ["second"], "evaluate_on": "validation"}, "epochs = 2"),
        ({"tasks": ["second"]}, 'evaluate_on = "validation"'),  # then no test part is reported
    ],
)
def test_a_search_on_other_tasks_or_parts_is_taken(
    config: Write, tmp_path: Path, changes: dict[str, Any], training: str
) -> None:
    plan = read_plan(config(tuned(search(tmp_path, **changes)), ("epochs = 2", training)))
    said = plan.entries[0].search
    assert said is not None
    assert {key: said[key] for key in changes} == changes  # and noted
    plan.save(tmp_path / "out")
    assert StudyPlan.load(tmp_path / "out") == plan


def test_a_search_that_is_no_table_or_no_text_is_refused(config: Write, tmp_path: Path) -> None:
    path = config(tuned("found.json"))
    for text, said in (
        ("[]", "holds no search, but list"),
        ("{", "is damaged or truncated"),
        ("[" * 100_000, "is damaged or truncated"),
        (None, "does not exist"),
        ("folder", "is no file"),
    ):
        if text is None:
            (tmp_path / "found.json").unlink()
        elif text == "folder":
            (tmp_path / "found.json").mkdir()
        else:
            (tmp_path / "found.json").write_text(text)
        with pytest.raises(FileError, match=rf"winner_of: .*found\.json {said}"):
            read_plan(path)


def test_searches_of_unequal_budgets_are_refused(config: Write, tmp_path: Path) -> None:
    first, second = search(tmp_path), search(tmp_path, name="more", trials=[{"options": {"lr": 0.03}, "mfn": 85.5}])
    more = f'\n[methods.other]\nmethod = "sequential_merge"\nwinner_of = "{second}"\n'
    swap = tuned(first)
    with pytest.raises(ValueError, match=r"unequal budgets of trials \(sequential_merge 3, other 1\)"):
        read_plan(config(swap, more=more))
    plan = read_plan(config(swap, ("rank = 4", "rank = 4\nunequal_budgets = true"), more=more))
    assert [entry.label for entry in plan.entries] == ["sequential_merge", "ours", "other"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (("seeds", "sedes"), ValueError, r"study\.toml: unknown key 'sedes', did you mean seeds"),
        (('method = "eblora"', 'method = "ebolra"'), ValueError, "unknown method 'ebolra', did you mean eblora"),
        (("[methods.ours]", "[methods.eblroa]"), None, ""),  # a label is free where the method is named
        (("scale_lr", "scael_lr"), ValueError, r"methods\.ours: unknown option of eblora 'scael_lr', did you mean sc"),
        (("energy = 0.9", 'energy = "much"'), TypeError, r"methods\.ours: eblora: energy is a number"),
        (
            ("energy = 0.9", "energy = 1.9"),
            ValueError,
            r"methods\.ours: eblora: energy is a share in \(0, 1\], got 1\.9",
        ),
        (("energy = 0.9", "rank = 8"), ValueError, r"methods\.ours sets rank 8: methods are compared at one rank"),
        (("epochs", "epoch"), ValueError, "unknown key of training 'epoch', did you mean epochs"),
        (("epochs = 2", "epochs = [1, 2]"), ValueError, "epochs has 2 entries for 3 tasks"),
        (("epochs = 2", "rates = [1.0]"), ValueError, "rates has 1 entries for 3 tasks"),
        (("epochs = 2", "epochs = 0"), ValueError, "epochs must be at least 1, got 0"),
        (("epochs = 2", "epochs = 1.5"), ValueError, r"epochs is a whole number, got 1\.5"),
        (("epochs = 2", 'batch_size = "16"'), ValueError, "batch_size is a whole number, got '16'"),
        (("epochs = 2", "warmup = 5.0"), ValueError, r"warmup is a share in \[0, 1\], got 5\.0"),
        (
            ("epochs = 2", 'evaluate_on = "tets"'),
            ValueError,
            "evaluate_on is one of .* got 'tets'",
        ),
        (
            ("scale_lr = 0.1", "scale_lr = -1"),
            ValueError,
            r"methods\.ours: eblora: scale_lr is a positive number, got -1",
        ),
        (("seeds = [0, 1]", "seeds = [0, 0]"), ValueError, "seeds must differ, 0 comes twice"),
        (("seeds = [0, 1]", "seeds = []"), ValueError, r"seeds is a list of whole numbers from 0 on, got \[\]"),
        (("seeds = [0, 1]", "seeds = [0, 1e3]"), ValueError, r"seeds is a list of whole numbers from 0 on"),
        (("seeds = [0, 1]", "seeds = [9223372036854775808]"), ValueError, r"the largest is 2\*\*63 - 1"),
        (("seeds = [0, 1]", "seeds = 3"), TypeError, "seeds is a list of whole numbers, got 3"),
        (("processes = 2", "processes = 0"), ValueError, "processes is at least 1, got 0"),
        (("rank = 4", 'rank = 4\nreference = "our"'), ValueError, "unknown reference 'our', did you mean ours"),
        (
            ('method = "eblora"', 'method = ["x"]'),
            TypeError,
            r"methods\.ours\.method is the name of a method, got \['x",
        ),
        (("rank = 4", "rank = 4\norders.a = 3"), TypeError, r"orders\.a is a list of task names, got 3"),
        (("rank = 4", "rank = 4\norders.a = [1, 2]"), TypeError, r"orders\.a is a list of task names, got \[1, 2\]"),
        (("rank = 4", 'rank = 4\norders.a = "nouns"'), TypeError, r"orders\.a is a list of task names, got 'nouns'"),
        (
            ("rank = 4", 'rank = 4\ndevice = "gpu"'),
            ValueError,
            "device is cpu, cuda or another device of torch, got 'gpu'",
        ),
        ((":toy_stream", ":toy_steam"), ValueError, "unknown name 'toy_steam', did you mean toy_stream"),
        (("name =", "name = ="), FileError, "is not a TOML file"),
        (('name = "toy"', 'name = "../toy"'), ValueError, "the name of a study is part of a folder's name"),
        (("[methods.ours]", f"[methods.{'o' * 101}]"), ValueError, "becomes a folder's name: .* up to 100 of them"),
        (("rank = 4", "rank = 4\norders.'../x' = ['first']"), ValueError, r"order '\.\./x' becomes a folder's name"),
    ],
)
def test_what_cannot_be_is_named(
    config: Write, change: tuple[str, str], error: type[Exception] | None, message: str
) -> None:
    path = config(change)
    if error is None:
        read_plan(path)
        return
    with pytest.raises(error, match=message):
        read_plan(path)


def test_joint_beside_epochs_by_task_is_refused_before_anything_runs(config: Write) -> None:
    path = config(("epochs = 2", "epochs = [1, 2, 1]"), more="\n[methods.joint]\n")
    with pytest.raises(ValueError, match=r"study\.toml: methods\.\w+: joint learns all tasks at once"):
        read_plan(path)


def test_a_missing_file_and_empty_ones_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"none\.toml does not exist"):
        read_plan(tmp_path / "none.toml")
    for text, message in (
        ("", "'stream' is missing"),
        ('stream = "text-three"', "'methods' is missing"),
        ('stream = "text-three"\n[methods]', "lists no methods"),
        ('stream = "text-three"\n[methods]\neblora = 1', r"methods\.eblora is a table of options, got 1"),
        ('stream = "text-three"\n[methods."a b"]\nmethod = "eblora"', "label 'a b' becomes a folder's name"),
    ):
        path = tmp_path / "study.toml"
        path.write_text(text)
        with pytest.raises((ValueError, TypeError), match=message):
            read_plan(path)


def test_a_rank_above_a_layers_is_refused_before_anything_runs(config: Write) -> None:
    plan = read_plan(config(("rank = 4", "rank = 17")))
    with pytest.raises(ValueError, match=r"methods\.sequential_merge: inner: rank 17 does not fit a weight of shape"):
        validate_on_model(plan)
