"""The stream of questions about pictures: parts that share no emoji, balanced draws, options of the builder."""

from __future__ import annotations

import random
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch

from manifold_cl.streams import STREAMS, picture_streams
from manifold_cl.streams.emoji import CATEGORIES, Emoji
from manifold_cl.streams.picture_streams import (
    DIGIT_WORDS,
    HELD_OUT,
    PictureQuestions,
    PictureStream,
    digits_of_rows,
    partition,
    select_pictures,
)
from manifold_cl.streams.picture_task import Picture
from tests.streams import tiny_vision as tiny


def drawn(word: str, number: int, rng: random.Random) -> Picture:
    picture = torch.tensor(tiny.COLOURS[word], dtype=torch.uint8).view(3, 1, 1).repeat(1, tiny.SIDE, tiny.SIDE)
    picture[1, 0, 0] = rng.randrange(256)
    return Picture(picture, f"{word} {number}")


def coloured(part: str) -> dict[str, list[partial[Picture]]]:
    first = {"train": 0, "validation": 10, "test": 20}[part]
    sizes = {"red": 3, "blue": 2, "dark blue": 2}
    return {word: [partial(drawn, word, first + i) for i in range(size)] for word, size in sizes.items()}


@pytest.fixture
def stream(monkeypatch) -> PictureStream:
    tasks = {name: PictureQuestions("Colour?", tuple(tiny.COLOURS), coloured) for name in ("one", "two")}
    monkeypatch.setattr(picture_streams, "TASKS", tasks)
    monkeypatch.setattr(picture_streams, "picture_tokenizer", tiny.tokenizer)
    monkeypatch.setattr(picture_streams, "load_small_llava", tiny.llava)
    return PictureStream("tiny", ("one", "two"), train=12, validation=3, test=6)


def test_parts_share_no_emoji_and_hold_out_as_many_of_each_category():
    emoji = [Emoji(chr(0x4E00 + i), f"e{i}", list(CATEGORIES.values())[i % 8]) for i in range(8 * 40)]
    parts = partition(emoji)
    assert sorted(e.name for part in parts.values() for e in part) == sorted(e.name for e in emoji)
    for part, count in HELD_OUT.items():
        assert Counter(e.category for e in parts[part]) == dict.fromkeys(CATEGORIES.values(), count)
    assert partition(emoji) == parts


def test_a_draw_is_balanced_and_starts_again_with_new_placements():
    chosen = select_pictures("one", "train", coloured("train"), 12)
    assert Counter(item.answer for item in chosen) == {"red": 4, "blue": 4, "dark blue": 4}
    assert Counter(item.picture.source for item in chosen if item.answer == "blue") == {"blue 0": 2, "blue 1": 2}
    assert len({item.picture.digest for item in chosen}) == 12
    assert select_pictures("one", "train", coloured("train"), 12) == chosen
    with pytest.raises(ValueError, match=r"'one'.*train.*red"):
        select_pictures("one", "train", {"red": [], **{k: v for k, v in coloured("train").items() if k != "red"}}, 3)


def test_digits_are_dark_on_white_and_split_by_their_order():
    rows = np.zeros((10 * 160, 785), dtype=np.uint8)
    rows[:, -1] = np.arange(len(rows)) % 10
    rows[3, :28] = 255  # the first row of pixels of the first three
    parts = {part: digits_of_rows(rows, part, side=56) for part in HELD_OUT}
    assert {part: len(drawn["three"]) for part, drawn in parts.items()} == {"test": 100, "validation": 50}
    assert len(digits_of_rows(rows, "train", side=56)["three"]) == 10
    assert tuple(parts["test"]) == DIGIT_WORDS
    picture = parts["test"]["three"][0](random.Random(0))
    assert picture.source == "digit 3"
    assert picture.pixels.shape == (3, 56, 56)
    assert picture.pixels[:, 0].max() == 0
    assert picture.pixels[:, 4:].min() == 255


def test_the_stream_has_its_parts_and_runs(stream, tmp_path):
    from manifold_cl.continual import ContinualRunner, make_method

    opened = stream(examples=6)
    assert opened.task_names == ("one", "two")
    assert [opened.tasks[0].size(split) for split in ("train", "validation", "test")] == [6, 3, 6]
    assert opened.provenance["train"] == 6
    names = {
        split: {i.picture.source for i in opened.tasks[0].part(split)} for split in ("train", "validation", "test")
    }
    assert not names["train"] & (names["test"] | names["validation"])
    tuned = stream(evaluate_on="validation")
    assert tuned.tasks[0].part("test") == tuned.tasks[0].part("validation")
    record = ContinualRunner(opened, make_method("eblora", rank=2), tmp_path).run()
    assert np.isfinite(record.metrics["mfn"])


def test_bad_input(stream):
    with pytest.raises(ValueError, match=r"'tiny'.*'three'"):
        stream(tasks=["three"])
    with pytest.raises(ValueError, match=r"from 1 to 12 .*13"):
        stream(examples=13)
    with pytest.raises(TypeError, match="folder"):
        stream(folder="x")


def test_the_registry_knows_the_streams():
    assert STREAMS["vlm-three"].task_names == ("category", "digits", "colours")
    assert STREAMS["vlm-two"].task_names == ("category", "digits")
