"""Names in messages: the first ones and the number of the others, by one function per package."""

import re
from pathlib import Path

import pytest

import analysis
import manifold_cl
from analysis import names
from manifold_cl.lists import listed

HOMES = {"manifold_cl/lists.py", "analysis/names.py"}
"""Two, since neither package imports the other."""


@pytest.mark.parametrize("count", range(6))
def test_both_packages_list_names_alike(count: int) -> None:
    given = list("abcdef")[:count]
    assert listed(given) == names.listed(given)
    assert listed(given, 5, separator="; ") == names.listed(given, 5, "; ")


def test_the_number_of_the_others_is_named_with_what_they_are() -> None:
    assert listed(range(9), 2, separator="; ", kind="problems") == "0; 1 and 7 more problems"
    assert listed({"q": 0}, kind="layers") == "q"


def test_no_file_counts_the_others_by_hand() -> None:
    root = Path(manifold_cl.__file__).parents[1]
    files = [path for package in (manifold_cl, analysis) for path in Path(package.__file__).parent.rglob("*.py")]
    assert len(files) > 400
    by_hand = re.compile(r"and \{[^}]*\} more|\[:\w+\]\)[^\n]*(more|…)[^\n]* if len\(")
    assert {str(path.relative_to(root)) for path in files if by_hand.search(path.read_text(encoding="utf-8"))} == HOMES
