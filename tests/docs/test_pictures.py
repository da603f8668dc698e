"""The pictures of the documentation are those that the code draws, complete and legible."""

import re
import sys
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from xml.etree import ElementTree

import pytest
from figure_layout import faults, shown_texts
from matplotlib.figure import Figure
from matplotlib.text import Text

ROOT = Path(__file__).parents[2]
STATIC = ROOT / "docs" / "_static"
EXPECTED = {
    "picture-input-space": ("protected: span F", "free plane", "old inputs", "new inputs", "V", "W x", "(W + ΔW) x"),
    "picture-step": ("1  proposal:\noff the manifold", "2  its tangent part", "3  retraction", "retract, then project"),
    "picture-task": ("start", "train", "merge", "measure", "grow memory", "next task", "MFT", "MFN", "BWT", "FWT"),
}
PHONE = 390
"""Pixels that a picture has on a page 420 pixels wide."""


@pytest.fixture(scope="module")
def drawn() -> Iterator[dict[str, Figure]]:
    folder = str(ROOT / "docs" / "pictures")
    before = set(sys.modules)
    sys.path.insert(0, folder)
    try:
        from draw import PICTURES

        yield {name: draw() for name, draw in PICTURES.items()}
    finally:
        sys.path.remove(folder)
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(folder):
                del sys.modules[name]


def test_every_picture_is_on_a_page() -> None:
    """A narrow form, too: it is there for phones, and a page has to offer it."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / "docs/conf.py"]
    shown = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    pictures = {path.name for suffix in ("png", "svg") for path in STATIC.glob(f"*.{suffix}")}
    assert pictures
    assert {name for name in pictures if f"_static/{name}" not in shown} == set()


def words(figure: Figure) -> str:
    return " | ".join(" ".join(text.get_text().split()) for text in shown_texts(figure))


@pytest.mark.parametrize("name", EXPECTED)
def test_a_picture_says_what_it_should_without_cut_or_overlapping_words(drawn: dict[str, Figure], name: str) -> None:
    figure = drawn[name]
    texts = {text.get_text() for text in shown_texts(figure)}
    assert texts >= set(EXPECTED[name])
    assert faults(figure) == []
    smallest = min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text().strip())
    assert smallest * PHONE / (72 * figure.get_figwidth()) >= 9.4  # pixels on a phone


@pytest.mark.parametrize("name", EXPECTED)
def test_the_committed_picture_is_the_drawn_one(drawn: dict[str, Figure], name: str, tmp_path: Path) -> None:
    """Its description holds every text with its numbers. Letters are outlines, which need no font."""
    committed = (STATIC / f"{name}.svg").read_text(encoding="utf-8")
    assert ElementTree.fromstring(committed).tag.endswith("svg")
    (described,) = re.findall(r"<dc:description>(.*?)</dc:description>", committed, re.DOTALL)
    assert sorted(unescape(described).split(" | ")) == sorted(words(drawn[name]).split(" | "))
    assert "<text" not in committed
    assert len(committed) < 250_000  # bytes: a page loads it at once


def test_pictures_are_readable_on_dark_pages() -> None:
    """A white card lies behind everything."""
    for name in EXPECTED:
        committed = (STATIC / f"{name}.svg").read_text(encoding="utf-8")
        first = re.search(r"<path[^>]*style=\"fill: (#\w+)", committed)
        assert first is not None
        assert first[1] == "#ffffff"
