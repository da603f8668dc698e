"""MLLM-DCL: remote sensing, medicine, autonomous driving, science and finance, learned in this order.

Its files, scorers and presets are in ``presets/mllm_dcl.toml``. Source: zhao2025mllmcl.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from manifold_cl.continual.task import TaskStream
from manifold_cl.streams.folder import Options, open_folder
from manifold_cl.streams.layout import Layout, published_layout

NAME = "mllm-dcl"


def layout() -> Layout:
    """What belongs to the stream, and its published presets."""
    return published_layout(NAME)


def open_mllm_dcl(folder: Path | str, **options: Any) -> TaskStream:
    """The stream with its data in ``folder``; options are those of `Options`."""
    return open_folder(folder, layout(), Options(**options))
