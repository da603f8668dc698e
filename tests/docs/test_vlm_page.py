"""The figures of vlm-three on its page are those of the committed measurement, with the recipe of the code."""

import json
from dataclasses import asdict
from pathlib import Path

import manifold_cl
from manifold_cl.streams.picture_streams import RECIPE

ROOT = Path(manifold_cl.__file__).parents[1]
PAGE = (ROOT / "docs/vision-language.md").read_text(encoding="utf-8")
NAMING = json.loads((ROOT / "benchmarks/results/naming.json").read_text(encoding="utf-8"))


def test_the_share_of_named_emoji_is_that_of_the_file() -> None:
    low, high = NAMING["interval_95"]
    sentence = " ".join(PAGE.split())
    assert f"Of {NAMING['pictures']} held-out emoji" in sentence
    assert f"{NAMING['right']} % are named right" in sentence
    assert f"interval is {low} to {high} %" in sentence
    assert f"{NAMING['cpu_seconds']} CPU seconds" in sentence
    assert low > NAMING["chance"]
    assert len(NAMING["named"]) == round(NAMING["right"] * NAMING["pictures"] / 100)


def test_the_page_describes_the_measured_recipe() -> None:
    assert NAMING["recipe"] == asdict(RECIPE)
    assert f"{NAMING['trained_on']} emoji are drawn in three places" in PAGE
    assert f"{RECIPE.steps} steps of AdamW" in PAGE
    assert (RECIPE.placements, RECIPE.gain, RECIPE.shots) == (3, 8.0, 8)


def test_the_trial_on_the_page_is_that_of_the_file() -> None:
    trial = json.loads((ROOT / "benchmarks/results/vlm-three-trial.json").read_text(encoding="utf-8"))
    sentence = " ".join(PAGE.split())
    assert f"ended at {trial['just_learned']} % of the test pictures, where chance is {trial['chance']} %" in sentence
    assert f"the model started at {trial['zero_shot']} %" in sentence
