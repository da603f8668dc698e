"""Finished runs measured again, without training: changed updates, and the parts of layers in forgetting."""

from manifold_cl.continual.causes.changed_updates import (
    Change,
    FinishedRun,
    evaluate_changes,
    spectrum_summary,
    summarise_updates,
)
from manifold_cl.continual.causes.layer_forgetting import measure_layers

__all__ = ["Change", "FinishedRun", "evaluate_changes", "measure_layers", "spectrum_summary", "summarise_updates"]
