"""Spectra and interference of low-rank adapters, and the pages that show them.

Everything is computed from the factors of an update, ``ΔW = left rightᵀ``, as they lie in adapter folders and
run folders (``docs/record-format.md``) or in PEFT LoRA folders. No model is loaded and ΔW is never formed.
"""

from analysis.adapters import AdapterSet, Factors
from analysis.interference import interference_table
from analysis.plots import (
    plot_accuracy_matrix,
    plot_entropy_map,
    plot_forgetting,
    plot_interference,
    plot_spectra,
)
from analysis.records import Record
from analysis.report import write_report
from analysis.spectrum import (
    condition_number,
    effective_rank,
    frobenius_norm,
    gini,
    participation_ratio,
    singular_values,
    spectral_entropy,
    spectral_flatness,
    spectral_norm,
    spectrum_table,
    stable_rank,
    top_energy,
)

__all__ = [
    "AdapterSet",
    "Factors",
    "Record",
    "condition_number",
    "effective_rank",
    "frobenius_norm",
    "gini",
    "interference_table",
    "participation_ratio",
    "plot_accuracy_matrix",
    "plot_entropy_map",
    "plot_forgetting",
    "plot_interference",
    "plot_spectra",
    "singular_values",
    "spectral_entropy",
    "spectral_flatness",
    "spectral_norm",
    "spectrum_table",
    "stable_rank",
    "top_energy",
    "write_report",
]
