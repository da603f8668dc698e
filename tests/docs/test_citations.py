"""Citations in the code exist: pages and section titles of `docs/`, and no document that readers do not have."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import manifold_cl

ROOT = Path(manifold_cl.__file__).parents[1]
FOLDERS = ("manifold_cl", "analysis", "tests", "benchmarks", "examples", "docs/gallery")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")) if path != Path(__file__)]
IDS = [str(path.relative_to(ROOT)) for path in FILES]

CITATION = re.compile(r"""docs/([\w-]+(?:/[\w-]+)?)\.md(?:,? ["']([^"']+)["'])?""")
PRIVATE = re.compile(
    r"(?<![\w/-])(?:benchmark|ecosystem|geometry|language|method|models)\.md"  # without docs/ before it
    r"|\bpromise \d|\bthe spec\b|\.md,? (?:section )?\d"
)


def text_of(path: Path) -> str:
    """The file on one line, without the signs of comments, so that a citation may run over two lines."""
    return re.sub(r"\s*\n\s*(?:# )?", " ", path.read_text(encoding="utf-8"))


@cache
def titles(page: str) -> frozenset[str]:
    """The titles of a page, without their numbers and without the signs of code."""
    headings = re.findall(r"^#+ (.+)$", (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"), re.M)
    return frozenset(re.sub(r"^[\d.]+ |`", "", heading).strip() for heading in headings)


def citations(path: Path) -> Iterator[tuple[str, str]]:
    """(page, title) of every citation of `docs/`; the title is empty where only a page is cited."""
    yield from CITATION.findall(text_of(path))


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_cited_pages_and_sections_exist(path: Path) -> None:
    for page, title in citations(path):
        assert (ROOT / "docs" / f"{page}.md").exists(), page
        assert not title or title.replace("`", "") in titles(page), (page, title)


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_no_private_document_is_cited(path: Path) -> None:
    assert PRIVATE.findall(text_of(path)) == []


def test_sections_are_cited_by_title() -> None:
    assert sum(bool(title) for path in FILES for _, title in citations(path)) > 10


def test_a_citation_over_two_lines_is_read(tmp_path: Path) -> None:
    path = tmp_path / "one.py"
    path.write_text(
        '# as in docs/geometry.md,\n# "Project the sum"; docs/data.md\nx = "see method.md 1.3, promise 1"\n'
    )
    assert list(citations(path)) == [("geometry", "Project the sum"), ("data", "")]
    assert PRIVATE.findall(text_of(path)) == ["method.md", "promise 1"]
