"""One table of the differences from the released code: consecutive numbers, and every mention of a number is a row."""

import re
from pathlib import Path

import pytest

import manifold_cl

ROOT = Path(manifold_cl.__file__).parents[1]
PAGE = ROOT / "docs/deviations.md"
NUMBERS = [int(number) for number in re.findall(r"^\| (\d+) \|", PAGE.read_text(encoding="utf-8"), re.M)]
MENTION = re.compile(r"\b[Dd]eviations? ((?:\d+(?:, | and | to )?)+)")
FILES = [
    path
    for folder, ending in (("docs", "md"), ("docs", "py"), ("manifold_cl", "py"), ("analysis", "py"), ("tests", "py"))
    for path in sorted((ROOT / folder).rglob(f"*.{ending}"))
    if "_build" not in path.parts and "tutorials" not in path.parts
]
MENTIONS = [
    (str(path.relative_to(ROOT)), int(number))
    for path in [ROOT / "README.md", *FILES]
    for group in MENTION.findall(re.sub(r"\s*\n\s*(?:# )?", " ", path.read_text(encoding="utf-8")))
    for number in re.findall(r"\d+", group)
]


def test_rows_are_numbered_without_a_gap_over_all_sections() -> None:
    assert list(range(1, len(NUMBERS) + 1)) == NUMBERS
    assert len(NUMBERS) > 30


@pytest.mark.parametrize(("path", "number"), MENTIONS, ids=[f"{path}-{number}" for path, number in MENTIONS])
def test_a_mentioned_deviation_is_a_row(path: str, number: int) -> None:
    assert number in NUMBERS


def test_code_decisions_and_pages_cite_deviations_by_number() -> None:
    folders = {path.split("/")[0] + ("/decisions" if "decisions" in path else "") for path, _ in MENTIONS}
    assert {"docs", "docs/decisions", "manifold_cl"} <= folders


def test_no_other_page_has_a_table_of_the_released_code() -> None:
    pages = [path for path in FILES if path.suffix == ".md" and path != PAGE]
    assert not [path.name for path in pages if re.search(r"^\|[^\n]*released code \|", path.read_text("utf-8"), re.M)]
