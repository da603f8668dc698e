"""Sets of adapters, their layers in batches of equal shape, and changed sets for causal tests."""

from analysis.adapters.adapter_set import AdapterSet, LayerUpdate, read_protected
from analysis.adapters.directions_and_size import levelled, redirected, scaled
from analysis.adapters.interventions import (
    changed_set,
    flattened,
    projected_off,
    rotated_away,
    rotated_into,
    sharpened,
    truncated,
)
from analysis.adapters.merging import MergedAdapters, merged

__all__ = [
    "AdapterSet",
    "LayerUpdate",
    "MergedAdapters",
    "changed_set",
    "flattened",
    "levelled",
    "merged",
    "projected_off",
    "read_protected",
    "redirected",
    "rotated_away",
    "rotated_into",
    "scaled",
    "sharpened",
    "truncated",
]
