"""Rows of JSON files: one object per line (JSONL), or the elements of one list, each with its line.

Files are decoded object by object, so that messages have the line and column.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from manifold_cl.files import FileError
from manifold_cl.lists import listed

T = TypeVar("T")

SHOWN = 5
"""Number of problems of a file that are kept with their text; the others are counted."""
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Problem:
    """A fault in a file, with its line and column from 1; 0 stands for the complete file or line."""

    path: Path
    line: int
    what: str
    column: int = 0

    def __str__(self) -> str:
        """``path:line:column: what``, as compilers write it."""
        place = "".join(f":{number}" for number in (self.line, self.column) if number)
        return f"{self.path}{place}: {self.what}"


class Row(NamedTuple):
    """A JSON value with the line on which it begins."""

    line: int
    content: Any


class NotJSONError(Exception):
    """Raised with a line, a column and a message; reading cannot go on."""


def read_rows(path: Path, convert: Callable[[Mapping[str, Any], str], T]) -> tuple[list[T], list[Problem]]:
    """The converted rows of a file, and every problem with the others.

    Malformed JSON ends the reading of a list; in a JSONL file the next line is read.

    Args:
        path: ends with ``.jsonl``: one object per line, empty lines apart; else one list.
        convert: turns a row and its place (``"file:line"``) into an item; ValueError becomes a problem.
    """
    items: list[T] = []
    problems: list[Problem] = []
    lines = _lines if path.suffix == ".jsonl" else list_elements
    try:
        for row in lines(path):
            if isinstance(row, Problem):
                problems.append(row)
                continue
            try:
                if not isinstance(row.content, dict):
                    raise ValueError(f"a row is a JSON object, got {kind_of(row.content)}")
                items.append(convert(row.content, f"{path.name}:{row.line}"))
            except ValueError as error:
                problems.append(Problem(path, row.line, str(error)))
    except NotJSONError as error:
        line, column, what = error.args
        problems.append(Problem(path, line, what, column))
    if not items and not problems:
        problems.append(Problem(path, 0, "the file has no rows"))
    return items, problems


def require_none(problems: Sequence[Problem]) -> None:
    """Raise FileError with the first problem and the number of the others."""
    if problems:
        raise FileError(listed(problems, 1, kind="problems"))


def list_elements(path: Path) -> Iterator[Row]:
    """Every element of the JSON list in ``path``; NotJSONError where the file is something else."""
    text = _text(path)
    line_of = partial(bisect_right, [0, *(match.end() for match in re.finditer("\n", text))])

    def after_space(offset: int) -> int:
        return _SPACE.match(text, offset).end()  # type: ignore[union-attr]  # matches an empty text too

    decoder = json.JSONDecoder()
    at = after_space(0)
    if text[at : at + 1] != "[":
        kind = "is empty" if at == len(text) else f"starts with {text[at]!r}"
        raise NotJSONError(line_of(at), 0, f"a JSON list was expected, the file {kind}")
    at = after_space(at + 1)
    while text[at : at + 1] != "]":
        try:
            content, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise NotJSONError(error.lineno, error.colno, f"malformed JSON: {error.msg}") from None
        except (ValueError, RecursionError) as error:  # a number of too many digits, too deep
            raise NotJSONError(line_of(at), 0, f"malformed JSON: {error}") from None
        yield Row(line_of(at), content)
        at = after_space(end)
        if text[at : at + 1] == ",":
            at = after_space(at + 1)
        elif text[at : at + 1] != "]":
            actual = f"found {text[at]!r}" if at < len(text) else "the file ends"
            line = line_of(min(at, len(text) - 1))
            raise NotJSONError(line, 0, f"malformed JSON: expected ',' or ']', {actual}")
    if after_space(at + 1) != len(text):
        raise NotJSONError(line_of(after_space(at + 1)), 0, "malformed JSON: text after the end of the list")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; NotJSONError where the file is something else."""
    try:
        content = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise NotJSONError(error.lineno, error.colno, f"malformed JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise NotJSONError(0, 0, f"malformed JSON: {error}") from None
    if not isinstance(content, dict):
        raise NotJSONError(0, 0, f"a JSON object was expected, the file holds {kind_of(content)}")
    return content


def kind_of(value: Any) -> str:
    """The kind of a JSON value in words.

    >>> kind_of([1]), kind_of(None)
    ('a list', 'null')
    """
    kinds = {dict: "an object", list: "a list", str: "text", type(None): "null", bool: "true or false"}
    return kinds.get(type(value), "a number")


def _lines(path: Path) -> Iterator[Row | Problem]:
    for line, text in enumerate(_text(path).split("\n"), 1):
        if not text.strip():
            continue
        try:
            yield Row(line, json.loads(text))
        except json.JSONDecodeError as error:
            yield Problem(path, line, f"malformed JSON: {error.msg}", error.colno)
        except (ValueError, RecursionError) as error:
            yield Problem(path, line, f"malformed JSON: {error}")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise NotJSONError(line, 0, f"not UTF-8 text ({error.reason})") from None
    except OSError as error:
        raise NotJSONError(0, 0, f"cannot be read ({error.strerror})") from None
