"""Sizes that a reader can hold: files, functions, parameters, and files per package."""

import ast
from collections.abc import Iterator
from pathlib import Path

import manifold_cl

ROOT = Path(manifold_cl.__file__).parents[1]
FILES = sorted([*(ROOT / "manifold_cl").rglob("*.py"), *(ROOT / "analysis").rglob("*.py")])

LINES_PER_FILE = 400
LINES_PER_FUNCTION = 60
"""Without the docstring."""
PARAMETERS = 10
COMMANDS = ROOT / "manifold_cl" / "cli"
"""Functions here may have more parameters: each is an option of a command."""


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.FunctionDef))


def lines(function: ast.FunctionDef) -> int:
    first = function.body[0]
    documented = ast.get_docstring(function, clean=False) is not None
    docstring = first.end_lineno - first.lineno + 1 if documented and first.end_lineno else 0
    return (function.end_lineno or function.lineno) - function.lineno + 1 - docstring


def parameters(function: ast.FunctionDef) -> int:
    names = [each.arg for each in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def test_files_are_short() -> None:
    assert len(FILES) > 300
    counts = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: count for name, count in counts.items() if count > LINES_PER_FILE} == {}


def test_tests_scripts_and_examples_are_short_too() -> None:
    folders = [ROOT / name for name in ("tests", "benchmarks", "examples", "docs/gallery", "docs/_ext", ".ci")]
    counts = {path: len(path.read_text(encoding="utf-8").splitlines()) for f in folders for path in f.rglob("*.py")}
    assert len(counts) > 300
    assert {str(path.relative_to(ROOT)): count for path, count in counts.items() if count > LINES_PER_FILE} == {}


def test_no_file_has_a_name_without_a_subject() -> None:
    assert [str(path.relative_to(ROOT)) for path in FILES if path.stem in ("utils", "helpers", "common")] == []


def test_functions_are_short() -> None:
    large = [
        f"{path.relative_to(ROOT)}: {function.name}"
        for path in FILES
        for function in functions(path)
        if lines(function) > LINES_PER_FUNCTION
        or parameters(function) > (100 if path.is_relative_to(COMMANDS) else PARAMETERS)
    ]
    assert large == []


def test_sizes_are_measured_without_docstring_and_self() -> None:
    source = 'class A:\n    def f(self, a, *, b):\n        """One.\n\n        Two.\n        """\n        return a\n'
    (function,) = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
    assert (lines(function), parameters(function)) == (2, 2)


def test_the_optimizer_has_at_most_ten_files() -> None:
    assert len(list((ROOT / "manifold_cl" / "optim").rglob("*.py"))) <= 10
