"""Covariances of patches of two pictures that come with matplotlib: an elevation map and a brain scan."""

from __future__ import annotations

import gzip
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

STRIDE = 3
"""Pixels between patches."""


@cache
def _patches(picture: str, side: int) -> npt.NDArray[np.float64]:
    """Patches as rows, each with mean 0; ImportError without matplotlib, FileNotFoundError without its sample data."""
    try:
        from matplotlib.cbook import get_sample_data
    except ImportError as error:
        raise ImportError("the pictures of the lab come with matplotlib: pip install matplotlib") from error
    if picture == "elevation":
        with np.load(str(get_sample_data("jacksboro_fault_dem.npz", asfileobj=False))) as maps:
            pixels = maps["elevation"].astype(np.float64)
    else:
        with gzip.open(str(get_sample_data("s1045.ima.gz", asfileobj=False))) as file:
            pixels = np.frombuffer(file.read(), np.uint16).reshape(256, 256).astype(np.float64)
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (side, side))[::STRIDE, ::STRIDE]
    rows = windows.reshape(-1, side * side)
    centred: npt.NDArray[np.float64] = rows - rows.mean(axis=1, keepdims=True)
    return centred


def patches(picture: str, side: int) -> Tensor:
    """Patches of side × side pixels as rows, each with mean 0; ``picture`` is "elevation" or "scan"."""
    return torch.from_numpy(_patches(picture, side))


def covariance(picture: str, side: int) -> Tensor:
    """The covariance (n, n) of the patches, n = side²."""
    rows = patches(picture, side)
    return rows.mT @ rows / len(rows)


def leading_directions(side: int, k: int) -> Tensor:
    """The first k principal directions (n, k) of the patches of the scan."""
    vectors: Tensor = torch.linalg.eigh(covariance("scan", side)).eigenvectors
    return vectors[:, side * side - k :].flip(-1).contiguous()
