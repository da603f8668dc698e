"""UCIT: ImageNet-R, ArxivQA, VizWiz, IconQA, CLEVR-Math, Flickr30k, learned in this order.

Its files, scorers and presets are in ``presets/ucit.toml``. Source: guo2025hide.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from manifold_cl.continual.task import TaskStream
from manifold_cl.streams.folder import Options, open_folder
from manifold_cl.streams.layout import Layout, published_layout

NAME = "ucit"


def layout() -> Layout:
    """What belongs to the stream, and its published presets."""
    return published_layout(NAME)


def open_ucit(folder: Path | str, **options: Any) -> TaskStream:
    """The stream with its data in ``folder``; options are those of `Options`."""
    return open_folder(folder, layout(), Options(**options))
