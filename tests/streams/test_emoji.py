"""Emoji: which entries of the table are taken, where they are drawn, and their main colours."""

from __future__ import annotations

import random
from pathlib import Path

import matplotlib
import pytest
import torch

from manifold_cl.streams.emoji import PALETTE, Painter, Placement, emoji_of_table, main_colour, read_emoji

FONT = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"


def entry(code: str, name: str, category: str = "Food & Drink", subcategory: str = "food-fruit") -> dict[str, object]:
    return {"unified": code, "short_names": [name, "other"], "category": category, "subcategory": subcategory}


def test_emoji_have_one_character_a_name_of_letters_and_a_category():
    table = [
        entry("1F34E", "red-apple"),
        entry("231A-FE0F", "watch_face", "Objects"),
        entry("1F1EB-1F1F7", "flag-fr", "Flags"),
        entry("1F468-200D-1F680", "astronaut", "People & Body"),
        entry("1F170-FE0F", "a", "Symbols", "alphanum"),
        entry("1F51F", "keycap_10", "Symbols", "keycap"),
    ]
    taken = emoji_of_table(table)
    assert [(e.character, e.name, e.category) for e in taken] == [
        ("⌚", "watch face", "object"),
        ("\U0001f34e", "red apple", "food"),
    ]


def test_a_placement_moves_turns_and_mirrors_the_picture():
    painter = Painter(48, font=FONT.read_bytes())
    plain = painter.paint("L")
    assert plain.shape == (3, 48, 48)
    assert plain.dtype == torch.uint8
    assert torch.equal(painter.paint("L", Placement(mirrored=True)), plain.flip(2))

    def middle(picture: torch.Tensor) -> tuple[float, float]:
        ink = 255 - picture.float().mean(dim=0)
        rows, columns = (torch.arange(48.0) @ ink.sum(dim=d) / ink.sum() for d in (1, 0))
        return float(columns), float(rows)

    (x, y), (right, down) = middle(plain), middle(painter.paint("L", Placement(shift=(0.1, 0.05))))
    assert right - x == pytest.approx(4.8, abs=1.0)
    assert down - y == pytest.approx(2.4, abs=1.0)
    small = painter.paint("L", Placement(size=0.4))
    assert (small < 128).sum() < 0.5 * (plain < 128).sum()
    assert not torch.equal(painter.paint("L", Placement(angle=10)), plain)
    assert Placement.drawn(random.Random(3)) == Placement.drawn(random.Random(3))


def test_the_main_colour_covers_clearly_most():
    def areas(**shares: float) -> torch.Tensor:
        picture = torch.full((3, 10, 10), 255, dtype=torch.uint8)
        start = 0
        for word, share in shares.items():
            end = start + int(10 * share)
            picture[:, start:end] = torch.tensor(PALETTE[word][-1], dtype=torch.uint8).view(3, 1, 1)
            start = end
        return picture

    assert main_colour(areas(red=0.3, blue=0.1)) == "red"
    assert main_colour(areas(blue=0.1, red=0.3)) == "red"
    assert main_colour(areas(red=0.3, blue=0.2)) is None  # 1.5 times, not more
    assert main_colour(areas()) is None


@pytest.mark.stream
@pytest.mark.slow
def test_the_real_emoji_have_pictures_and_clear_colours():
    emoji, painter = read_emoji(), Painter(84)
    assert len(emoji) == len({e.name for e in emoji}) == 1292
    by_name = {e.name: painter.paint(e.character) for e in emoji}
    assert all(picture.float().std() > 5 for picture in by_name.values())  # none is blank
    assert main_colour(by_name["elephant"]) == "grey"
    assert main_colour(by_name["evergreen tree"]) == "green"
    assert main_colour(by_name["apple"]) == "red"
