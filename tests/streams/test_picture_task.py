"""Questions about pictures: losses and likelihoods against the model's own, answers, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from manifold_cl.adapters.layers import target_linears
from manifold_cl.streams.picture_task import Picture, PictureQuestion
from manifold_cl.streams.small_llava import IMAGE_TOKENS, TARGETS
from manifold_cl.streams.vision_tower import normalised
from tests.streams import tiny_vision as tiny


@pytest.fixture
def model() -> nn.Module:
    return tiny.llava()


def inputs(text: str, item: PictureQuestion) -> dict[str, torch.Tensor]:
    """What transformers' class takes for one picture and one text."""
    ids = tiny.tokenizer()(text, return_tensors="pt")["input_ids"]
    return {"input_ids": ids, "pixel_values": normalised(item.picture.pixels[None])}


def test_the_loss_is_that_of_llavas_class(model):
    task = tiny.task()
    items = tiny.questions(3)
    values, weights = [], []
    for item in items:  # one at a time, so without padding
        batch = inputs(f"{task.prompt} {item.answer} <end>", item)
        labels = batch["input_ids"].clone()
        labels[:, : len(tiny.tokenizer()(task.prompt)["input_ids"])] = -100
        values.append(model(**batch, labels=labels).loss)
        weights.append(int((labels != -100).sum()))
    expected = sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
    torch.testing.assert_close(task.loss(model, items), expected, rtol=1e-5, atol=1e-6)


def test_the_answer_is_the_option_with_the_largest_likelihood(model):
    task = tiny.task()
    best = []
    for item in tiny.questions():
        values = []
        for option in task.options:
            batch = inputs(f"{task.prompt} {option} <end>", item)
            count = len(option.split()) + 1
            logits = model(**batch).logits[0, -count - 1 : -1].log_softmax(-1)
            values.append(logits.gather(1, batch["input_ids"][0, -count:, None]).sum())
        best.append(task.options[int(torch.stack(values).argmax())])
    assert task.answer(model, tiny.questions()) == best


@pytest.mark.parametrize("score_by", ["likelihood", "generation"])
def test_colours_are_learned_from_the_pictures(model, score_by):
    task = tiny.task(score_by)
    layers = target_linears(model, TARGETS)
    assert len(layers) == 14  # seven per block, none of the tower
    parameters = list(model.model.language_model.parameters())
    for p in parameters:
        p.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        task.loss(model, task.part("train")).backward()
        optimizer.step()
    scores = task.scores(model)
    assert scores["score"] == 100
    assert scores.get("drift", 0.0) == 0


def test_generation_counts_answers_that_are_no_option(model):
    scores = tiny.task("generation").scores(model)  # random weights
    assert list(scores) == ["score", "drift"]
    assert scores["drift"] > 0


def test_pictures_of_one_name_differ_by_their_pixels():
    white, black = (torch.full((3, 2, 2), value, dtype=torch.uint8) for value in (255, 0))
    assert Picture(white, "a") == Picture(white.clone(), "a") != Picture(black, "a")


def test_bad_input(model):
    with pytest.raises(ValueError, match=r"'colours'.*'red 0'.*'red'.*blue"):
        tiny.task(options=("blue", "dark blue"))
    with pytest.raises(ValueError, match="likelihood, generation, got 'loss'"):
        tiny.task("loss")
    plain = tiny.tokenizer()
    plain.add_tokens(["<image>" * IMAGE_TOKENS], special_tokens=True)
    with pytest.raises(ValueError, match=f"{IMAGE_TOKENS} times <image> into 0"):
        tiny.task(tokenizer=plain)
    large = Picture(torch.zeros(3, 42, 42, dtype=torch.uint8), "3 x 3 patches")
    with pytest.raises(ValueError, match="9 patches"):
        tiny.task().answer(model, [PictureQuestion(large, "red")])
