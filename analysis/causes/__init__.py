"""Causes of forgetting as tables: effects of changed updates, of factors of a study, and parts of layers.

Reads records and result files only. No model is loaded.
"""

from analysis.causes.changed_updates import change_effects, changed_table, spectra_table
from analysis.causes.factors import factor_effects
from analysis.causes.layers import layer_table, mediation_table

__all__ = ["change_effects", "changed_table", "factor_effects", "layer_table", "mediation_table", "spectra_table"]
