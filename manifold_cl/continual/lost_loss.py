"""The likely cause of a loss that is NaN or infinite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

IGNORED = -100
"""The label that cross-entropy leaves out, as torch and transformers have it."""


def remedy_for(loss: float, batches: Iterable[Any], trained: Iterable[Tensor]) -> str:
    """The likely cause of a loss that is not finite, and what to do.

    Args:
        loss: NaN or infinite.
        batches: that it was taken of, as far as they are known.
        trained: the parameters that it depends on and that train.
    """
    if any(_without_targets(batch) for batch in batches):
        return (
            f"every label of a batch is {IGNORED}, so that its loss is a mean over nothing: mask fewer labels, "
            "truncate examples at a greater length, or leave such examples out"
        )
    if math.isnan(loss) and all(bool(p.isfinite().all()) for p in trained):
        return (
            "lower the learning rate, or, as every trained parameter is finite, look for a batch without anything to "
            f"learn (all labels {IGNORED}, no examples)"
        )
    return "lower the learning rate"


def _without_targets(batch: Any) -> bool:
    labels = batch.get("labels") if isinstance(batch, Mapping) else getattr(batch, "labels", None)
    return isinstance(labels, Tensor) and labels.numel() > 0 and bool((labels == IGNORED).all())
