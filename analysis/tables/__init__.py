"""Tidy tables of a set of adapters: spectra, interference, components, and the files they are written to."""

from analysis.adapters.merging import together
from analysis.tables.adapter_tables import AdapterTables
from analysis.tables.base_relation import intruder_dimensions, relation_to_base
from analysis.tables.components import component_table, principal_angles
from analysis.tables.frames import need_parquet, write_table
from analysis.tables.functional_drift import functional_drift, input_covariances
from analysis.tables.gates import Gate
from analysis.tables.imbalance import imbalance_rows, imbalance_table
from analysis.tables.interference import interference_table
from analysis.tables.merging import (
    Resampling,
    drift_table,
    merge_table,
    merge_weights,
    sign_conflicts,
)
from analysis.tables.noise import noise_table, tail_table
from analysis.tables.spectrum_table import singular_values, spectrum_table

__all__ = [
    "AdapterTables",
    "Gate",
    "Resampling",
    "component_table",
    "drift_table",
    "functional_drift",
    "imbalance_rows",
    "imbalance_table",
    "input_covariances",
    "interference_table",
    "intruder_dimensions",
    "merge_table",
    "merge_weights",
    "need_parquet",
    "noise_table",
    "principal_angles",
    "relation_to_base",
    "sign_conflicts",
    "singular_values",
    "spectrum_table",
    "tail_table",
    "together",
    "write_table",
]
