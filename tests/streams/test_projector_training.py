"""The projector: its start against a slow ridge, likelihoods against the model, training, and its cache."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from manifold_cl.streams import projector_training as training
from manifold_cl.streams.archives import FetchError
from manifold_cl.streams.emoji import Emoji, Painter
from manifold_cl.streams.projector_training import Namer, ProjectorRecipe
from tests.streams import tiny_vision as tiny
from tests.streams.test_emoji import FONT

EMOJI = tuple(Emoji(letter, name, "symbol") for letter, name in zip("IOW", ("red", "dark", "blue"), strict=True))
RECIPE = ProjectorRecipe(side=tiny.SIDE, placements=3, steps=60, tokens=5, batch=3, lr=0.02, ridge=0.1, gain=1.0)


@pytest.fixture(autouse=True)
def letters(monkeypatch, tmp_path):
    monkeypatch.setattr(training, "Painter", partial(Painter, font=FONT.read_bytes()))
    monkeypatch.setenv("MANIFOLD_CL_CACHE", str(tmp_path))


def test_the_start_is_a_ridge_regression():
    model, generator = tiny.llava(), torch.Generator().manual_seed(0)
    pooled = torch.randn(4, 3, 5, 16, generator=generator)
    targets = torch.randn(4, 32, generator=generator)
    recipe = ProjectorRecipe(ridge=2.0, gain=3.0)
    training.start_projector(model.model.multi_modal_projector, pooled, targets, recipe)
    x, y = pooled.double().numpy().reshape(-1, 16), targets.double().numpy().repeat(15, axis=0)
    z = (x - x.mean(0)) / x.std(0, ddof=1)
    # Rows of sqrt(penalty) I with target zero are the same penalty in ordinary least squares.
    rows = np.concatenate([z, np.sqrt(2.0 * 15) * np.eye(16)])
    fitted = np.linalg.lstsq(rows, np.concatenate([y - y.mean(0), np.zeros((16, 32))]), rcond=None)[0]
    expected = torch.from_numpy(3 * z @ fitted + y.mean(0)).float().view(4, 3, 5, 32)
    torch.testing.assert_close(model.model.multi_modal_projector.project(pooled), expected, rtol=1e-3, atol=1e-4)


def test_likelihoods_are_those_of_the_assembled_model():
    model, tokenizer = tiny.llava(), tiny.tokenizer()
    pixels = training.normalised(torch.stack([item.picture.pixels for item in tiny.questions(2)]))
    projector = model.model.multi_modal_projector
    hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
    names = [(8, 9, 2), (6, 2)]
    values = Namer(model, tokenizer, ["red", "dark blue"]).log_likelihoods(projector.pool(hidden), names)
    before = tokenizer("<|im_start|> red = red\n dark blue = dark blue\n", add_special_tokens=False)["input_ids"]
    after = tokenizer(" =", add_special_tokens=False)["input_ids"]
    for row, name in enumerate(names):
        ids = torch.tensor([[*before, *[len(tiny.WORDS)] * 5, *after, *name]])
        logits = model(input_ids=ids, pixel_values=pixels[row : row + 1]).logits[0, -len(name) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(name)[:, None]).sum()
        torch.testing.assert_close(values[row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_training_names_the_pictures_and_changes_nothing_else():
    def trained() -> tuple[torch.nn.Module, torch.Tensor]:
        model = tiny.llava()
        training.train_projector(model, tiny.tokenizer(), EMOJI, RECIPE)
        return model, training.pooled_pictures(model, EMOJI, RECIPE)

    model, pooled = trained()
    namer = Namer(model, tiny.tokenizer(), ["red", "dark", "blue"])
    assert training.naming_accuracy(namer, pooled[:, 0], namer.names(EMOJI), choices=3) == [True, True, True]
    assert not any(p.requires_grad for p in model.parameters())
    before = tiny.llava().state_dict()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {
        f"model.multi_modal_projector.{n}" for n in ("mean", "deviation", "linear.weight", "linear.bias")
    }
    again, _ = trained()
    linear = model.model.multi_modal_projector.linear.weight
    assert torch.equal(linear, again.model.multi_modal_projector.linear.weight)


def test_the_weights_are_trained_once_and_verified(tmp_path, caplog):
    caplog.set_level("INFO", logger="manifold_cl")
    weights = training.trained_projector(tiny.llava, tiny.tokenizer(), EMOJI, RECIPE)
    assert "60 of 60 steps" in caplog.text
    (path,) = tmp_path.glob("vlm-three-*/projector.safetensors")

    def refuse() -> torch.nn.Module:
        raise AssertionError("the model was loaded again")

    kept = training.trained_projector(refuse, tiny.tokenizer(), EMOJI, RECIPE)
    assert kept.keys() == weights.keys()
    assert all(torch.equal(kept[name], weights[name]) for name in weights)
    with pytest.raises(AssertionError, match="loaded again"):  # another recipe has other weights
        training.trained_projector(refuse, tiny.tokenizer(), EMOJI[:2], RECIPE)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(FetchError, match=r"projector\.safetensors.*delete the folder"):
        training.trained_projector(refuse, tiny.tokenizer(), EMOJI, RECIPE)
