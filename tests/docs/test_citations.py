"""Citations in the code exist: pages and section titles of `docs/`, and no document that readers do not have."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import manifold_cl

ROOT = Path(manifold_cl.__file__).parents[1]
FOLDERS = ("manifold_cl", "analysis", "tests", "benchmarks", "examples", "docs/gallery")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")) if path != Path(__file__)]

CITATION = re.compile(r"""docs/([\w-]+(?:/[\w-]+)?)\.md(?:,? ["']([^"']+)["'])?""")
PRIVATE = re.compile(
    r"(?<![\w/-])(?:benchmark|ecosystem|geometry|language|method|models)\.md"  # without docs/ before it
    r"|\bpromise \d|\bthe spec\b|\.md,? (?:section )?\d"
)


@cache
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


def exists(page: str, title: str) -> bool:
    """Whether `docs/` has this page, and the page this title."""
    return (ROOT / "docs" / f"{page}.md").exists() and (not title or title.replace("`", "") in titles(page))


def test_cited_pages_and_sections_exist() -> None:
    assert len(FILES) > 500
    cited = [(str(path.relative_to(ROOT)), *each) for path in FILES for each in citations(path)]
    assert [each for each in cited if not exists(*each[1:])] == []


def test_no_private_document_is_cited() -> None:
    assert [(str(path.relative_to(ROOT)), found) for path in FILES if (found := PRIVATE.findall(text_of(path)))] == []


def test_sections_are_cited_by_title() -> None:
    assert sum(bool(title) for path in FILES for _, title in citations(path)) > 10


def test_a_citation_over_two_lines_is_read(tmp_path: Path) -> None:
    assert not exists("no-such-page", "")
    assert not exists("architecture", "No such section")
    path = tmp_path / "one.py"
    path.write_text(
        '# as in docs/geometry.md,\n# "Project the sum"; docs/data.md\nx = "see method.md 1.3, promise 1"\n'
    )
    assert list(citations(path)) == [("geometry", "Project the sum"), ("data", "")]
    assert PRIVATE.findall(text_of(path)) == ["method.md", "promise 1"]
