"""The real stream of pictures: its projector names held-out emoji above chance, and its model answers in options."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from manifold_cl.streams import open_stream
from manifold_cl.streams.emoji import Painter
from manifold_cl.streams.picture_streams import RECIPE, emoji_parts
from manifold_cl.streams.picture_task import PictureTask
from manifold_cl.streams.projector_training import Namer, naming_accuracy
from manifold_cl.streams.small_llava import picture_tokenizer
from manifold_cl.streams.vision_tower import normalised

pytestmark = [pytest.mark.stream, pytest.mark.long]


@pytest.fixture(scope="module")
def model() -> Any:
    return open_stream("vlm-two").make_model()  # trains the projector if the cache has none


def test_held_out_emoji_are_named_above_chance(model):
    held_out = emoji_parts()["test"][::2]
    painter = Painter(RECIPE.side)
    with torch.no_grad():
        pixels = normalised(torch.stack([painter.paint(e.character) for e in held_out]))
        hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
        pooled = model.model.multi_modal_projector.pool(hidden)
    namer = Namer(model, picture_tokenizer(), [e.name for e in emoji_parts()["train"][: RECIPE.shots]])
    right = naming_accuracy(namer, pooled, namer.names(held_out), choices=10)
    assert sum(right) >= 16  # of 80, where 8 are chance; 16 and more have probability 0.005 by chance


def test_questions_have_one_picture_part_each_and_answers_of_one_token(model):
    stream = open_stream("vlm-two", examples=16)
    for task in stream.tasks:
        assert isinstance(task, PictureTask)
        trained = {item.picture.source for item in task.part("train")}
        assert not trained & {item.picture.source for item in (*task.part("test"), *task.part("validation"))}
        assert {len(task.encoder.answers([f" {option}"])[0]) for option in task.options} == {2}  # and the end token
        loss = task.loss(model, task.part("train"))
        assert loss.isfinite()
        assert loss < 8  # log of the vocabulary is 10.8
