"""Instruction files: both published forms, and complaints that name file, line and reason."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold_cl.files import FileError
from manifold_cl.streams.captions import read_captions
from manifold_cl.streams.instructions import inspect_instructions, read_instructions

GOOD = {"id": 7, "image": "a.png", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}


def turns(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def write(path: Path, *items: Any) -> Path:
    """A list with one item a line, the first on line 2."""
    path.write_text("[\n" + ",\n".join(json.dumps(item) for item in items) + "\n]\n", encoding="utf-8")
    return path


def test_conversations_are_read_with_their_placeholders_taken_out(tmp_path: Path) -> None:
    talk = {"id": "x", "image": "a/b.png", "conversations": turns("<image>\nWhat?", "Cat.", "Colour?", "Red.")}
    (item,) = read_instructions(write(tmp_path / "t.json", talk))
    assert (item.key, item.images, item.line) == ("x", ("a/b.png",), 2)
    assert item.turns == (("What?", "Cat."), ("Colour?", "Red."))
    assert item.references == ("Red.",)
    assert item.question == "Colour?"


def test_questions_with_answers_are_read(tmp_path: Path) -> None:
    first = {"question_id": 3, "image": "a.png", "text": "How many?\n<image>", "answer": "4"}
    second = {"image": ["a.png", "b.png"], "text": "<image><image>Same?", "answer": ["yes", "Yes, they are"]}
    one, two = read_instructions(write(tmp_path / "t.json", first, second))
    assert (one.key, one.turns, one.references) == ("3", (("How many?", "4"),), ("4",))
    assert (two.key, two.images, two.references) == ("1", ("a.png", "b.png"), ("yes", "Yes, they are"))


def test_an_answer_beside_a_conversation_is_the_reference(tmp_path: Path) -> None:
    asked = {"image": "a.png", "conversations": turns("Q"), "answer": "B"}
    (item,) = read_instructions(write(tmp_path / "t.json", asked))
    assert (item.turns, item.references) == ((("Q", "B"),), ("B",))


def test_items_without_an_image_need_leave(tmp_path: Path) -> None:
    path = write(tmp_path / "t.json", {"text": "Q", "answer": "A"})
    (item,) = read_instructions(path, text_only=True)
    assert item.images == ()
    with pytest.raises(FileError, match=r"t\.json:2: no 'image' \(the item has 'text', 'answer'; .*text_only = true"):
        read_instructions(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image": 5}, r"'image' is a path or a list of paths, got a number"),
        ({"image": "/data/a.png"}, r"image path '/data/a.png' leaves the folder"),
        ({"image": "../a.png"}, r"image path '\.\./a\.png' leaves the folder"),
        ({"conversations": []}, r"'conversations' is a list of turns, got a list"),
        ({"conversations": "hello"}, r"'conversations' is a list of turns, got text"),
        ({"conversations": [{"from": "human"}]}, r"turn 1 of 'conversations' has no text under 'value'"),
        ({"conversations": turns("Q", "A")[::-1]}, r"turn 1 of 'conversations' should be from 'human', is 'gpt'"),
        ({"conversations": turns("Q", "")}, r"the reference answer is missing or empty"),
        ({"conversations": turns("<image><image>Q", "A")}, r"2 <image> placeholders for 1 images"),
        ({"answer": []}, r"the reference answer is missing or empty"),
        ({"answer": None}, r"the reference answer is missing or empty"),
        ({"answer": {"a": 1}}, r"the reference answer is missing or empty"),
        ({"answer": [1]}, r"the reference answer is missing or empty"),
        ({"answer": "half \ud800"}, r"a text cannot be written as UTF-8 \(surrogates not allowed\)"),
        ({"image": "a\0.png"}, r"image path 'a\\x00\.png' holds control characters"),
    ],
)
def test_a_wrong_item_is_named_by_line_and_the_others_are_kept(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "t.json", GOOD, {**GOOD, **change}, GOOD)
    items, problems = inspect_instructions(path)
    assert [item.line for item in items] == [2, 4]
    assert [problem.line for problem in problems] == [3]
    with pytest.raises(FileError, match=rf"t\.json:3: {said}"):
        read_instructions(path)


def test_an_item_that_is_no_object_or_asks_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"t\.json:2: an instruction is a JSON object, got null and 1 more problems"):
        read_instructions(write(tmp_path / "t.json", None, {"image": "a.png", "answer": "A"}))
    _, problems = inspect_instructions(tmp_path / "t.json")
    assert problems[1].what == "neither 'conversations' nor a question under 'text'"


@pytest.mark.parametrize(
    ("content", "line", "said"),
    [
        (b"", 1, "a JSON list was expected, the file is empty"),
        (b'{"a": 1}', 1, "a JSON list was expected, the file starts with '{'"),
        (b'[\n{"id": 1,\n "image": }\n]', 3, "malformed JSON: Expecting value"),
        (b'[\n{"id": 1}\n{"id": 2}\n]', 3, "malformed JSON: expected ',' or ']', found '{'"),
        (b'[\n{"id": 1}\n', 2, "malformed JSON: expected ',' or ']', the file ends"),
        (b"[\n]\nx", 3, "malformed JSON: text after the end of the list"),
        (b'[\n{"id": "\xff"}]', 2, "not UTF-8 text"),
        (b"[\n\n]", 0, "the list is empty"),
        (b"[\n" + b"[" * 100_000, 2, "malformed JSON: "),
        (b"[\n" + b"1" * 5000 + b"]", 2, "malformed JSON: Exceeds the limit"),
    ],
)
def test_malformed_files_are_named_with_the_line(content: bytes, line: int, said: str, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(content)
    _, problems = inspect_instructions(path)
    assert problems[-1].line == line
    assert re.search(said, problems[-1].what)
    with pytest.raises(FileError, match=r"t\.json"):
        read_instructions(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"none\.json: cannot be read \(No such file"):
        read_instructions(tmp_path / "none.json")


@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=6),
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
)
def test_lines_are_where_an_obvious_twin_finds_them(
    texts: list[str], indent: int | None, ascii_only: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("lines") / "t.json"
    items = [
        {"id": f"key-{i}-", "image": "a.png", "text": t.replace("<image>", ""), "answer": t}
        for i, t in enumerate(texts)
    ]
    content = json.dumps(items, indent=indent, ensure_ascii=ascii_only)
    path.write_text(content, encoding="utf-8", newline="")
    found = read_instructions(path)
    lines = content.split("\n")
    for i, item in enumerate(found):
        keyed = next(number for number, line in enumerate(lines, 1) if f'"key-{i}-"' in line)
        assert item.line == keyed - (indent is not None)  # the object opens on the line before its first key
        assert item.references == (texts[i],)


def test_captions_come_in_the_order_of_their_images(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    captions = [{"image_id": 9, "caption": "b"}, {"image_id": 4, "caption": "a"}, {"image_id": 9, "caption": "c"}]
    path.write_text(json.dumps({"images": [{"id": 4}, {"id": 9}], "annotations": captions}))
    assert read_captions(path) == [("a",), ("b", "c")]
    path.write_text(json.dumps({"annotations": captions}))
    assert read_captions(path) == [("b", "c"), ("a",)]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"images": [],\n "annotations": [}', r"c\.json:2: malformed JSON"),
        ("[]", r"captions are a JSON object with 'images' and 'annotations'"),
        ('{"annotations": [{"image_id": 1}]}', r"annotation 1 has no 'image_id' or no text under 'caption'"),
        (
            '{"images": [{"id": 1}], "annotations": [{"image_id": 2, "caption": "x"}]}',
            r"annotation 1 is of image 2, which 'images' lacks",
        ),
        ('{"annotations": [{"image_id": [1], "caption": "x"}]}', r"annotation 1 has no 'image_id' or no text"),
        ('{"images": 3, "annotations": []}', r"'images' is a list of objects, each with a number or a text under 'id'"),
        ('{"images": [{"id": {}}], "annotations": []}', r"'images' is a list of objects, each with a number or a text"),
        ("[" * 100_000, r"c\.json: cannot be read"),
        ("1" * 5000, r"c\.json: cannot be read \(Exceeds the limit"),
        ('{"images": [{"id": 1}], "annotations": []}', r"image 1 has no caption \(1 such images\)"),
    ],
)
def test_wrong_captions_are_named(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(content)
    with pytest.raises(FileError, match=said):
        read_captions(path)
    with pytest.raises(FileError, match=r"none\.json: cannot be read"):
        read_captions(tmp_path / "none.json")
