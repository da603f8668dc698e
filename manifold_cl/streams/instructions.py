"""Instruction files: a JSON list of questions about images, with or without their answers.

Training files hold ``{"id", "image", "conversations": [{"from": "human", "value"}, {"from": "gpt", "value"}, ...]}``,
test files ``{"question_id", "image", "text", "answer"}``. Any file may hold either form. Items are decoded one by one,
so that messages have the line.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from manifold_cl.kinds import is_number
from manifold_cl.streams.json_rows import NotJSONError, Problem, kind_of, list_elements, require_none

PLACEHOLDER = "<image>"
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


def read_instructions(path: Path, *, text_only: bool = False) -> list[Instruction]:
    """All items of ``path``, in order; FileError with the first problem and the number of the others."""
    items, problems = inspect_instructions(path, text_only=text_only)
    require_none(problems)
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
        for position, (line, content) in enumerate(list_elements(path)):
            try:
                items.append(_instruction(content, line, position, text_only=text_only))
            except ValueError as error:
                problems.append(Problem(path, line, str(error)))
    except NotJSONError as error:
        line, column, what = error.args
        problems.append(Problem(path, line, what, column))
    if not items and not problems:
        problems.append(Problem(path, 0, "the list is empty"))
    return items, problems


def _instruction(content: Any, line: int, position: int, *, text_only: bool) -> Instruction:
    if not isinstance(content, dict):
        raise ValueError(f"an instruction is a JSON object, got {kind_of(content)}")
    images = _images(content, text_only=text_only)
    turns = _turns(content)
    marks = sum(question.count(PLACEHOLDER) for question, _ in turns)
    if marks not in (0, len(images)):
        raise ValueError(f"{marks} {PLACEHOLDER} placeholders for {len(images)} images")
    answer = content.get("answer", turns[-1][1])
    if is_number(answer):
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
            raise ValueError(f"'image' is a path or a list of paths, got {kind_of(content['image'])}")
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
        raise ValueError(f"'conversations' is a list of turns, got {kind_of(turns)}")
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise ValueError(f"turn {number} of 'conversations' has no text under 'value'")
        expected, speaker = (_HUMAN if number % 2 else _MODEL), turn.get("from")
        if speaker not in expected:
            raise ValueError(f"turn {number} of 'conversations' should be from {expected[0]!r}, is {speaker!r}")
    values = [turn["value"] for turn in turns]
    return tuple(zip_longest(values[::2], values[1::2], fillvalue=""))
