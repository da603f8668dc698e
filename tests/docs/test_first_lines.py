"""Each page begins with its readers, and whether they need geometry."""

import re
from pathlib import Path

import pytest

import manifold_cl

DOCS = Path(manifold_cl.__file__).parents[1] / "docs"
PAGES = [page for page in sorted(DOCS.glob("*.md")) if page.name != "index.md"]
PAGES += [DOCS / "decisions/index.md", DOCS / "api/index.rst"]


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_a_page_begins_with_its_readers_and_with_the_geometry_they_need(page: Path) -> None:
    text = re.sub(r"<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.S)
    below_title = re.sub(r"\A\s*(# .+|.+\n=+)\n+", "", text)
    first = below_title.split("\n\n")[0]
    assert re.match(r"For (every reader|readers|people)\b", first), (
        f"{page.name} begins {first[:60]!r}: begin with 'For readers who ...', and state whether geometry is needed"
    )
    assert "eometry" in first, f"the first paragraph of {page.name} does not state whether geometry is needed"
