"""Spectra and interference of low-rank adapters, what chance would do, and the pages that show them.

Everything is computed from the factors of an update, ``ΔW = left rightᵀ``, as they lie in adapter folders and
run folders (``docs/record-format.md``), in PEFT's and StelLA's folders, in Kohya files, or as the difference of
dense checkpoints. No model is loaded, and ΔW of an adapter is never formed.
"""

from analysis.adapters.adapter_set import AdapterSet, Factors, read_protected
from analysis.adapters.interventions import flattened, rotated_away, rotated_into, sharpened
from analysis.formats import Checkpoint, Record
from analysis.numerics.spectral_measures import (
    condition_number,
    effective_rank,
    frobenius_norm,
    gini,
    participation_ratio,
    renyi_entropy,
    spectral_entropy,
    spectral_flatness,
    spectral_norm,
    stable_rank,
    top_energy,
)
from analysis.plots import (
    forgetting_panels,
    plot_accuracy_matrix,
    plot_capacity,
    plot_change,
    plot_cost,
    plot_entropy_map,
    plot_forgetting,
    plot_imbalance,
    plot_interference,
    plot_leakage,
    plot_principal_angles,
    plot_spectra,
    plot_study,
    plot_trade_off,
    save_figure,
    spectra_panels,
)
from analysis.report import write_report, write_study_report
from analysis.statistics.nulls import OverlapNull, against_chance, alignment_p_value, holm
from analysis.statistics.resampling import PermutationTest, bootstrap_interval, over_seeds, permutation_test
from analysis.studies import StudyResults
from analysis.tables.activations import functional_drift, input_covariances
from analysis.tables.base_relation import intruder_dimensions, relation_to_base
from analysis.tables.components import component_table, principal_angles
from analysis.tables.files import write_table
from analysis.tables.gates import Gate
from analysis.tables.imbalance import imbalance_table
from analysis.tables.interference import interference_table
from analysis.tables.spectrum_table import singular_values, spectrum_table

__all__ = [
    "AdapterSet",
    "Checkpoint",
    "Factors",
    "Gate",
    "OverlapNull",
    "PermutationTest",
    "Record",
    "StudyResults",
    "against_chance",
    "alignment_p_value",
    "bootstrap_interval",
    "component_table",
    "condition_number",
    "effective_rank",
    "flattened",
    "forgetting_panels",
    "frobenius_norm",
    "functional_drift",
    "gini",
    "holm",
    "imbalance_table",
    "input_covariances",
    "interference_table",
    "intruder_dimensions",
    "over_seeds",
    "participation_ratio",
    "permutation_test",
    "plot_accuracy_matrix",
    "plot_capacity",
    "plot_change",
    "plot_cost",
    "plot_entropy_map",
    "plot_forgetting",
    "plot_imbalance",
    "plot_interference",
    "plot_leakage",
    "plot_principal_angles",
    "plot_spectra",
    "plot_study",
    "plot_trade_off",
    "principal_angles",
    "read_protected",
    "relation_to_base",
    "renyi_entropy",
    "rotated_away",
    "rotated_into",
    "save_figure",
    "sharpened",
    "singular_values",
    "spectra_panels",
    "spectral_entropy",
    "spectral_flatness",
    "spectral_norm",
    "spectrum_table",
    "stable_rank",
    "top_energy",
    "write_report",
    "write_study_report",
    "write_table",
]
