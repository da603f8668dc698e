"""Names of Python that the sentences of a page show exist in the code: functions, classes, arguments, keys of files."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from snippets import BLOCKS, PAGES, ROOT

SOURCES = ("manifold_cl", "analysis", "benchmarks", "examples", "tests", "docs/_ext")
NAME = re.compile(r"\b(?:[a-z]+(?:_[a-z0-9]+)+|[A-Z][a-z]+(?:[A-Z][a-z0-9]*)+)\b")
"""Words with an underscore, and words with capitals inside: others are also words of English."""
FOREIGN = {
    *("KappaTuneSelector", "matrix_entropy", "create_riemannian_optimizer"),  # of other tools
    *("AdamWScheduleFree", "ScheduleFreeWrapper"),  # of schedulefree
    *("hada_t1", "hada_t2", "oft_r", "p_layer", "lambda_layer", "query_key_value"),  # tensors in files of others
    *("lora_r", "lora_scale", "cluster_utils", "runtime_env", "HiDe"),  # of EBLoRA's code, of Ray, a paper
    *("top4_energy", "beyond_the_budget"),  # made from a number; a key of committed results
}


def names_in(path: Path) -> Iterator[str]:
    """Names that a file defines, uses or holds in strings; not those of docstrings and comments."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    yield from path.with_suffix("").parts
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.arg, ast.keyword)):
            yield node.arg or ""
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield from node.name.split(".")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield from re.findall(r"\w+", node.value)


@cache
def known() -> frozenset[str]:
    files = {path for folder in SOURCES for path in (ROOT / folder).rglob("*.py")} - {Path(__file__).resolve()}
    return frozenset(name for path in files for name in names_in(path))


def unknown_names(text: str, shown: str) -> set[str]:
    """Names in the code of a page's sentences that neither the sources nor the page's own blocks have."""
    text = re.sub(r"^( *)```.*?^\1```", "", text, flags=re.M | re.S)
    pieces = re.findall(r"(?<![`:])`{1,2}([^`\n]+)`{1,2}(?!`)", text)
    named = {name for piece in pieces for name in NAME.findall(piece)}
    return named - known() - FOREIGN - set(re.findall(r"\w+", shown))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_names_of_a_page_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert unknown_names(text, " ".join(block.code for block in BLOCKS[page])) == set()


def test_an_old_name_is_found() -> None:
    assert unknown_names("Read `record.peak_memory_gb`, or call `SubspaceMemories.load()`.", "") == {
        "peak_memory_gb",
        "SubspaceMemories",
    }
    assert unknown_names("Call `grow_memory(memory, energy=0.97)`.\n\n```python\nold_name\n```\n", "") == set()
