"""Instruction files: a JSON list of questions about images, with or without their answers.

Training files hold ``{"id", "image", "conversations": [{"from": "human", "value"}, {"from": "gpt", "value"}, ...]}``,
test files ``{"question_id", "image", "text", "answer"}``. Any file may hold either form. Items are decoded one by one,
so that messages have the line.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from manifold_cl.files import FileError

PLACEHOLDER = "<image>"
_SPACE = re.compile(r"[ \t\r\n]*")
_HUMAN, _MODEL = ("human", "user"), ("gpt", "assistant")


@dataclass(frozen=True)
class Instruction:
    """One item: a conversation about some images, whose last answer is the reference.

    Args:
        key: the item's own id, or its position in the file, as text.
        images: paths as the file has them; questions hold no placeholders for them.
        turns: (question, answer) pairs; an answer that the file lacks is empty.
        references: the correct answers; captions may have several.
        line: first line of the item in its file, from 1.
    """

    key: str
    images: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]
    references: tuple[str, ...]
    line: int

    @property
    def question(self) -> str:
        """The last question."""
        return self.turns[-1][0]


@dataclass(frozen=True)
class Problem:
    """A fault in a file, with its line; line 0 stands for the complete file."""

    path: Path
    line: int
    what: str

    def __str__(self) -> str:
        """``path:line: what``, as compilers write it."""
        return f"{self.path}:{self.line}: {self.what}" if self.line else f"{self.path}: {self.what}"


def read_instructions(path: Path, *, text_only: bool = False) -> list[Instruction]:
    """All items of ``path``, in order; FileError with the first problem and the number of the others."""
    items, problems = inspect_instructions(path, text_only=text_only)
    if problems:
        others = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        raise FileError(f"{problems[0]}{others}")
    return items


def inspect_instructions(path: Path, *, text_only: bool = False) -> tuple[list[Instruction], list[Problem]]:
    """The valid items of ``path``, and every problem with the others.

    Malformed JSON ends the reading. An item that is valid JSON but no instruction is skipped and reported.

    Args:
        path: a JSON file that holds one list.
        text_only: whether items without an image are valid.
    """
    items: list[Instruction] = []
    problems: list[Problem] = []
    try:
        for line, position, content in _elements(path):
            try:
                items.append(_instruction(content, line, position, text_only=text_only))
            except ValueError as error:
                problems.append(Problem(path, line, str(error)))
    except _NotJSONError as error:
        problems.append(Problem(path, *error.args))
    if not items and not problems:
        problems.append(Problem(path, 0, "the list is empty"))
    return items, problems


class _NotJSONError(Exception):
    """Raised with a line and a message."""


def _elements(path: Path) -> Iterator[tuple[int, int, Any]]:
    """(line, position, content) of every element of the JSON list in ``path``."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise _NotJSONError(line, f"not UTF-8 text ({error.reason})") from None
    except OSError as error:
        raise _NotJSONError(0, f"cannot be read ({error.strerror})") from None
    line_of = partial(bisect_right, [0, *(match.end() for match in re.finditer("\n", text))])

    def after_space(offset: int) -> int:
        return _SPACE.match(text, offset).end()  # type: ignore[union-attr]  # matches an empty text too

    decoder = json.JSONDecoder()
    at = after_space(0)
    if text[at : at + 1] != "[":
        kind = "is empty" if at == len(text) else f"starts with {text[at]!r}"
        raise _NotJSONError(line_of(at), f"a JSON list of instructions was expected, the file {kind}")
    at = after_space(at + 1)
    position = 0
    while text[at : at + 1] != "]":
        try:
            content, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise _NotJSONError(error.lineno, f"malformed JSON: {error.msg} (column {error.colno})") from None
        except (ValueError, RecursionError) as error:  # a number of too many digits, too deep
            raise _NotJSONError(line_of(at), f"malformed JSON: {error}") from None
        yield line_of(at), position, content
        position += 1
        at = after_space(end)
        if text[at : at + 1] == ",":
            at = after_space(at + 1)
        elif text[at : at + 1] != "]":
            actual = f"found {text[at]!r}" if at < len(text) else "the file ends"
            raise _NotJSONError(line_of(min(at, len(text) - 1)), f"malformed JSON: expected ',' or ']', {actual}")
    if after_space(at + 1) != len(text):
        raise _NotJSONError(line_of(after_space(at + 1)), "malformed JSON: text after the end of the list")


def _instruction(content: Any, line: int, position: int, *, text_only: bool) -> Instruction:
    if not isinstance(content, dict):
        raise ValueError(f"an instruction is a JSON object, got {_kind(content)}")
    images = _images(content, text_only=text_only)
    turns = _turns(content)
    marks = sum(question.count(PLACEHOLDER) for question, _ in turns)
    if marks not in (0, len(images)):
        raise ValueError(f"{marks} {PLACEHOLDER} placeholders for {len(images)} images")
    answer = content.get("answer", turns[-1][1])
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    references = tuple(answer) if isinstance(answer, list) else (answer,)
    if not references or not all(isinstance(reference, str) and reference.strip() for reference in references):
        raise ValueError("the reference answer is missing or empty (last 'gpt' turn, or 'answer')")
    # Templates put placeholders in front of the first question, as in the model's own training.
    cleaned = tuple((question.replace(PLACEHOLDER, "").strip(), answer) for question, answer in turns)
    if not cleaned[-1][1]:
        cleaned = (*cleaned[:-1], (cleaned[-1][0], references[0]))
    try:
        "".join([*references, *(text for turn in cleaned for text in turn)]).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a text cannot be written as UTF-8 ({error.reason})") from None
    key = content.get("question_id", content.get("id", position))
    return Instruction(str(key), images, cleaned, references, line)


def _images(content: dict[str, Any], *, text_only: bool) -> tuple[str, ...]:
    if content.get("image") is None:
        if text_only:
            return ()
        keys = ", ".join(map(repr, content)) or "nothing"
        raise ValueError(f"no 'image' (the item has {keys}; the task's text_only = true would allow it)")
    images = content["image"] if isinstance(content["image"], list) else [content["image"]]
    for image in images:
        if not isinstance(image, str) or not image.strip():
            raise ValueError(f"'image' is a path or a list of paths, got {_kind(content['image'])}")
        if not image.isprintable():
            raise ValueError(f"image path {image!r} holds control characters")
        if Path(image).is_absolute() or ".." in Path(image).parts:
            raise ValueError(f"image path {image!r} leaves the folder: paths are relative to it")
    return tuple(images)


def _turns(content: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    if "conversations" not in content:
        if not isinstance(content.get("text"), str):
            raise ValueError("neither 'conversations' nor a question under 'text'")
        return ((content["text"], ""),)
    turns = content["conversations"]
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"'conversations' is a list of turns, got {_kind(turns)}")
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise ValueError(f"turn {number} of 'conversations' has no text under 'value'")
        expected, speaker = (_HUMAN if number % 2 else _MODEL), turn.get("from")
        if speaker not in expected:
            raise ValueError(f"turn {number} of 'conversations' should be from {expected[0]!r}, is {speaker!r}")
    values = [turn["value"] for turn in turns]
    return tuple(zip_longest(values[::2], values[1::2], fillvalue=""))


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", type(None): "null", bool: "true or false"}
    return kinds.get(type(value), "a number")
