"""The site's sources are complete: every public name, every citation, every page. Building them is `make docs`."""

import ast
import fnmatch
import importlib
import inspect
import posixpath
import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

import analysis
import manifold_cl
from manifold_cl import METHODS, RETRACTIONS, cli, lab, streams
from manifold_cl.continual import metrics
from manifold_cl.infeasible import INFEASIBLE_STEPS

ROOT = Path(manifold_cl.__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGES = ("manifold_cl", "analysis")
KEY = re.compile(r"\b[a-z]+(?:19|20)\d\d[a-z]+\b")
BY_HAND = re.compile(r"\.\. py:data:: (\S+)")

PUBLIC = [(module, name) for module in (manifold_cl, streams, lab, analysis) for name in module.__all__]
PUBLIC += [(metrics, function.__name__) for function in metrics.METRICS.values()]


@cache
def documented() -> frozenset[str]:
    """Dotted names that the directives of the API pages describe."""
    found = set()
    for page in sorted((DOCS / "api").glob("*.rst")):
        module = ""
        for line in page.read_text(encoding="utf-8").splitlines():
            if match := re.match(r"\.\. currentmodule:: (\S+)", line):
                module = match.group(1)
            elif match := re.match(r"\.\. auto(?:class|function|data|exception):: (\S+)", line) or BY_HAND.match(line):
                name = match.group(1)
                found.add(name if name.startswith(PACKAGES) else f"{module}.{name}")
    return frozenset(found)


@cache
def docstrings() -> tuple[str, ...]:
    """Every string of the packages that stands alone: docstrings, and comments on constants and fields."""
    return tuple(
        node.value.value
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    )


@cache
def commented_constants() -> frozenset[str]:
    """Names of module-level constants with a string below them."""
    names = set()
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            body = ast.parse(path.read_text(encoding="utf-8")).body
            for node, below in pairwise(body):
                if not (isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)):
                    continue
                targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return frozenset(names)


@cache
def described_by_hand() -> frozenset[str]:
    """Names of constants that an API page describes in its own words."""
    pages = sorted((DOCS / "api").glob("*.rst"))
    return frozenset(name for page in pages for name in BY_HAND.findall(page.read_text(encoding="utf-8")))


@cache
def bibliography() -> frozenset[str]:
    return frozenset(re.findall(r"^@\w+\{(\S+),$", (DOCS / "references.bib").read_text(encoding="utf-8"), re.M))


def source_pages() -> Iterator[str]:
    """Names of the pages in the repository; what a build generates is not among them."""
    generated = {"_build", "_ext", "_static", "_templates", "gallery", "tutorials"}
    for path in sorted([*DOCS.rglob("*.md"), *DOCS.rglob("*.rst")]):
        parts = path.relative_to(DOCS).with_suffix("").parts
        if parts[0] not in generated:
            yield "/".join(parts)


def children(page: str) -> set[str]:
    """The pages that a page's toctrees list."""
    path = next(p for suffix in (".md", ".rst") if (p := DOCS / f"{page}{suffix}").exists())
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        trees = re.findall(r"^<!-- \{toctree\}\n(.*?)^-->", text, re.M | re.S)
    else:
        trees = re.findall(r"^\.\. toctree::\n((?:[ ]+.*\n|\n)+)", text, re.M)
    pages = set(source_pages())
    listed = set()
    for tree in trees:
        for line in tree.splitlines():
            entry = re.sub(r".*<(.*)>", r"\1", line.strip())
            if entry and not entry.startswith(":"):
                target = posixpath.normpath(posixpath.join(posixpath.dirname(page), entry))
                listed |= set(fnmatch.filter(pages, target)) or {target}
    return listed


@pytest.mark.parametrize(("module", "name"), PUBLIC, ids=[f"{module.__name__}.{name}" for module, name in PUBLIC])
def test_public_names_are_on_an_api_page_and_say_what_they_are(module: ModuleType, name: str) -> None:
    assert f"{module.__name__}.{name}" in documented()
    value = getattr(module, name)
    if inspect.isclass(value) or inspect.isroutine(value):
        own = value.__doc__ or ""
        assert own.strip()
        assert not own.startswith(f"{name}(")  # what dataclasses and named tuples write by themselves
    else:
        assert name in commented_constants() | described_by_hand()


def test_what_a_registry_holds_is_on_an_api_page() -> None:
    """So that a reader finds the options of each method, and the formula of each retraction and step."""
    shown = {name.rpartition(".")[2] for name in documented()}
    held = {each.__name__ for each in METHODS.values()}
    held |= {type(each).__name__ for each in (*RETRACTIONS.values(), *INFEASIBLE_STEPS.values())}
    assert len(held) > 35
    assert held - shown == set()


def test_api_pages_name_nothing_that_is_gone() -> None:
    for name in documented():
        module, _, last = name.rpartition(".")
        assert hasattr(importlib.import_module(module), last), name


def test_every_key_that_a_docstring_cites_is_in_the_bibliography() -> None:
    cited = {key for text in docstrings() for key in KEY.findall(text)}
    assert cited
    assert cited <= bibliography()


def test_every_entry_of_the_bibliography_is_cited_somewhere() -> None:
    pages = [
        (DOCS / f"{page}.md").read_text(encoding="utf-8") for page in source_pages() if (DOCS / f"{page}.md").exists()
    ]
    cited = {key for text in (*docstrings(), *pages) for key in KEY.findall(text)}
    assert bibliography() <= cited


def test_every_page_is_reachable_from_the_home_page() -> None:
    reached, waiting = {"index"}, ["index"]
    pages = set(source_pages())
    while waiting:
        new = children(waiting.pop()) - reached
        reached |= new
        waiting += sorted(new & pages)
    assert pages <= reached
    assert reached - pages <= {"tutorials/index"}  # written by sphinx-gallery


def test_the_table_of_results_is_that_of_the_committed_study(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["compare", str(ROOT / "benchmarks/results/text-six"), "--markdown"])
    expected = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    page = (DOCS / "results.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in page if line.startswith("|")] == expected
    assert len(expected) == 17
