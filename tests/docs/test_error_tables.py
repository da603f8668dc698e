"""Messages that pages quote in their tables of errors are messages of the packages."""

import ast
import re
from pathlib import Path

import pytest

import manifold_cl

ROOT = Path(manifold_cl.__file__).parents[1]
HEADER = re.compile(r"^\| *(message begins|you see) *\|")
QUOTED = re.compile(r"`([^`]+)`")
NAMED = re.compile(r"(?:error|warning)s? (?:of )?((?:`[^`]+`(?:, or | or )?)+)")
FILLED = "\0"
"""Stands for what a message fills in."""


def messages_of(text: str) -> list[str]:
    """The messages in the first column of a page's tables of errors."""
    found, inside, whole = [], False, False
    for line in text.splitlines():
        if header := HEADER.match(line):
            inside, whole = True, header[1] == "message begins"
        elif not line.startswith("|"):
            inside = False
        elif inside and not line.startswith("|--"):
            cell = line.split("|")[1]
            quotes = [cell] if whole else NAMED.findall(cell)
            found += [quote for part in quotes for quote in QUOTED.findall(part)]
    return found


def templates() -> list[str]:
    """All strings of both packages, with `FILLED` where an f-string fills something in."""
    found = []
    for path in [*(ROOT / "manifold_cl").rglob("*.py"), *(ROOT / "analysis").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                pieces = (part.value if isinstance(part, ast.Constant) else FILLED for part in node.values)
                found.append("".join(map(str, pieces)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


TEMPLATES = "\n".join(templates())


def is_said(message: str) -> bool:
    """Whether some string has each part of the message between dots, with few values in place of what it fills in."""
    for part in filter(str.strip, message.split("...")):
        words = [rf"(?:{re.escape(word)}|\S*{FILLED}\S*)" for word in part.split()]
        if all(found[0].count(FILLED) > max(1, len(words) // 3) for found in re.finditer(" ".join(words), TEMPLATES)):
            return False
    return True


PAGES = {
    page: found for page in sorted((ROOT / "docs").rglob("*.md")) if (found := messages_of(page.read_text("utf-8")))
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_messages_of_a_page_are_those_of_the_packages(page: Path) -> None:
    assert [message for message in PAGES[page] if not is_said(message)] == []


def test_three_pages_have_such_tables_and_a_made_up_message_is_found() -> None:
    assert {"adapters.md", "language-models.md", "your-own.md"} <= {page.name for page in PAGES}
    assert sum(map(len, PAGES.values())) > 30
    assert messages_of("| message begins | reason |\n|---|---|\n| `the moon ... is full`, `b` | x `c` |\n") == [
        *("the moon ... is full", "b")
    ]
    assert messages_of("| you see |\n|---|\n| `0.3` after the error `a b`, or `c d` |\n") == ["a b", "c d"]
    assert not is_said("the adapters are made of cheese")
