"""Tutorials: a reader and a verdict on geometry in the first line, links that exist, one pair of rates, short times."""

import ast
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

import manifold_cl

ROOT = Path(manifold_cl.__file__).parents[1]
DOCS = ROOT / "docs"
PATHS = sorted((DOCS / "gallery").glob("plot_*.py"))
TIMES = ROOT / "benchmarks/results/docs.json"
IDS = [path.stem for path in PATHS]
LANDING = {"your-own"}
"""Pages that other work adds; a link to one of them may come first."""

ONE_PAIR = {"lr": 6e-3, "scale_lr": 2e-2}
OTHER_OPTIMIZERS = {"RiemannianSGD": {"lr": 0.2}, "RiemannianAdam": {"lr": 1e-2}}
"""Optimizers whose rate has another meaning; tutorial 6 says so."""


def rates(call: ast.Call) -> dict[str, float]:
    return {str(word.arg): ast.literal_eval(word.value) for word in call.keywords if "lr" in str(word.arg)}


def named(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def extension(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / "_ext" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", PATHS, ids=IDS)
def test_the_first_lines_name_the_reader_and_the_geometry_needed(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    first = " ".join(text.split("\n\n")[1].split())
    assert first.startswith("For ")
    assert re.search(r"[Gg]eometry|[Gg]eodesics", first)
    assert re.search(r"\bneed(ed|s)\b", first)


@pytest.mark.parametrize("path", PATHS, ids=IDS)
def test_linked_pages_exist(path: Path) -> None:
    for target in re.findall(r":doc:`(?:[^`]*<)?([^`>]+)>?`", path.read_text("utf-8").replace("\n# ", " ")):
        if target.lstrip("/") in LANDING:
            continue
        page = DOCS / target.lstrip("/") if target.startswith("/") else DOCS / "gallery" / target
        assert any(page.with_name(f"{page.name}{suffix}").exists() for suffix in (".md", ".rst", ".py")), target


@pytest.mark.parametrize("path", PATHS, ids=IDS)
def test_adapters_train_at_the_one_pair_of_rates(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    expected = {
        id(argument): OTHER_OPTIMIZERS[name]
        for name in OTHER_OPTIMIZERS
        for node in ast.walk(tree)
        if named(node, name)
        for argument in node.args
    }
    for node in ast.walk(tree):
        if named(node, "param_groups"):
            assert rates(node) == expected.get(id(node), ONE_PAIR), ast.unparse(node)


def test_tutorials_are_numbered_without_gaps_and_two_tasks_come_first() -> None:
    assert [name[5:7] for name in IDS] == [f"{number:02}" for number in range(1, len(IDS) + 1)]
    assert IDS[:2] == ["plot_01_two_tasks", "plot_02_the_manifold"]


def test_a_line_per_tutorial_has_its_time_and_an_estimate() -> None:
    pytest.importorskip("sphinx")  # `make docs` has it, and runs this
    module = extension("tutorial_times")
    expected = dict.fromkeys(IDS, 10.0)
    times = module.Times(expected)
    assert f" 1 of {len(IDS)}" in times.before(IDS[0])
    times.tutorial_began -= 20  # twice as slow as expected
    line = times.after(IDS[0])
    assert "20 s" in line
    assert times.left(IDS[0]) == pytest.approx(20 * (len(IDS) - 1), rel=0.01)
    assert times.left(IDS[-1]) == 0
    assert module.Times({}).left(IDS[0]) == 0
    assert module.words(201) == "3 min 21 s"


def test_every_tutorial_is_measured_and_short() -> None:
    times = json.loads(TIMES.read_text(encoding="utf-8"))
    assert sorted(times["tutorials"]) == IDS
    assert times["threads"] <= 2
    for name, row in times["tutorials"].items():
        assert row["cpu_seconds"] / 2 < 60, name  # of two cores: other work hardly changes it
    assert times["site"]["cpu_seconds"] / 2 < 8 * 60
    site, longest = (
        f"{seconds / 60:.1f}"
        for seconds in (times["site"]["seconds"], max(row["seconds"] for row in times["tutorials"].values()))
    )
    page = (DOCS / "install.md").read_text(encoding="utf-8")
    assert f"takes {site} minutes on two busy cores, of which the longest tutorial takes {longest} (" in page
