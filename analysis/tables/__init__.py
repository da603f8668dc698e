"""Tidy tables of a set of adapters: spectra, interference, components, and the files they are written to."""

from analysis.tables.adapter_tables import AdapterTables
from analysis.tables.base_relation import intruder_dimensions, relation_to_base
from analysis.tables.components import component_table, principal_angles
from analysis.tables.frames import need_parquet, write_table
from analysis.tables.functional_drift import functional_drift, input_covariances
from analysis.tables.gates import Gate
from analysis.tables.imbalance import imbalance_rows, imbalance_table
from analysis.tables.interference import interference_table
from analysis.tables.noise import noise_table, tail_table
from analysis.tables.spectrum_table import singular_values, spectrum_table

__all__ = [
    "AdapterTables",
    "Gate",
    "component_table",
    "functional_drift",
    "imbalance_rows",
    "imbalance_table",
    "input_covariances",
    "interference_table",
    "intruder_dimensions",
    "need_parquet",
    "noise_table",
    "principal_angles",
    "relation_to_base",
    "singular_values",
    "spectrum_table",
    "tail_table",
    "write_table",
]
