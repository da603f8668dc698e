"""Norms and singular vectors of updates relative to the weights they change."""

from typing import Any

import pandas as pd
import torch
from torch import Tensor

from analysis.adapters.adapter_set import AdapterSet
from analysis.formats import Checkpoint

INTRUDER_TOP, INTRUDER_COSINE = 10, 0.5


def intruder_dimensions(
    weight: Tensor, change: Tensor, *, top: int = INTRUDER_TOP, threshold: float = INTRUDER_COSINE
) -> int:
    """How many of the `top` left singular vectors of ``W + ΔW`` are new: below `threshold` with all of W's.

    The cosine is taken in absolute value with every left singular vector of W, as in shuttleworth2024illusion
    and in PEFT. Both matrices are decomposed densely.

    >>> eye = torch.eye(4)
    >>> intruder_dimensions(torch.diag(torch.tensor([3.0, 2.0, 0.0, 0.0])), 9 * eye[:, 2:3] @ eye[:1])
    0
    >>> mixed = (eye[:, 0] + eye[:, 1] + eye[:, 2] + eye[:, 3]).outer(eye[0])  # cosine 1/2 with all four
    >>> intruder_dimensions(torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0])), 1e6 * mixed, top=1, threshold=0.51)
    1
    """
    known = torch.linalg.svd(weight, full_matrices=False)[0]
    return _intruders(known, weight + change, top, threshold)


def _intruders(known: Tensor, changed: Tensor, top: int, threshold: float) -> int:
    new = torch.linalg.svd(changed, full_matrices=False)[0][:, :top]
    return int(((known.mT @ new).abs().amax(0) < threshold).sum())


def relation_to_base(
    adapters: AdapterSet, base: Checkpoint, *, top: int = INTRUDER_TOP, threshold: float = INTRUDER_COSINE
) -> pd.DataFrame:
    """Tidy task, update, layer, value, metric: norms relative to W, and intruder dimensions.

    Formulas: docs/analysis.md, "Spectra". Takes dense SVDs of W and of every W + ΔW, one layer in memory at a time:
    minutes for a large model.

    Raises:
        ValueError: the checkpoint lacks a layer, or has another shape.
    """
    rows: list[tuple[Any, ...]] = []
    updates = [adapters.read(task, adapters.layers) for task in adapters.tasks]  # read side by side, each file once
    for layer, *changes in zip(adapters.layers, *updates, strict=True):
        m, n, _ = adapters.shape(adapters.tasks[0], layer)
        weight = base.weight(layer, (m, n), transposed=layer in adapters.transposed)
        known, values, _ = torch.linalg.svd(weight, full_matrices=False)
        norm, largest = values.norm().item(), values[0].item()
        if norm == 0:
            raise ValueError(f"the base weight of {layer} is zero: nothing to relate the update to")
        total = torch.zeros_like(weight)
        for task, _, left, right in changes:
            change = left @ right.mT
            total = total + change
            for update, matrix in (("task", change), ("accumulated", total)):
                sizes = {
                    "norm_ratio": torch.linalg.matrix_norm(matrix).item() / norm,
                    "spectral_norm_ratio": torch.linalg.matrix_norm(matrix, 2).item() / largest,
                    "intruder_dimensions": float(_intruders(known, weight + matrix, top, threshold)),
                }
                rows += [(task, update, layer, value, metric) for metric, value in sizes.items()]
    return pd.DataFrame(rows, columns=["task", "update", "layer", "value", "metric"])
