"""Spectra and interference of low-rank adapters, what chance would do, and reports about them.

Everything is computed from the factors of an update, ``ΔW = left rightᵀ``. Factors are read from adapter folders and
run folders (``docs/record-format.md``), from PEFT's, StelLA's and Kohya's files, or as the difference of dense
checkpoints. No model is loaded, and ΔW of an adapter is never formed.
"""

from typing import TYPE_CHECKING

from analysis.lazy import lazy_names

if TYPE_CHECKING:
    from analysis.activations import answer_changes, answer_intervals, input_drift
    from analysis.adapters import (
        AdapterSet,
        flattened,
        levelled,
        projected_off,
        read_protected,
        redirected,
        rotated_away,
        rotated_into,
        scaled,
        sharpened,
        truncated,
    )
    from analysis.changes import RankSuggestion, change_table, suggest_ranks
    from analysis.formats import Checkpoint, Record
    from analysis.many import AdapterCollection
    from analysis.plots import (
        forgetting_panels,
        plot_accuracy_matrix,
        plot_against_chance,
        plot_answer_changes,
        plot_entropy_map,
        plot_forgetting,
        plot_imbalance,
        plot_interference,
        plot_leakage,
        plot_noise,
        plot_principal_angles,
        plot_spectra,
        plot_study,
        plot_trade_off,
        save_figure,
        spectra_panels,
    )
    from analysis.report import write_report, write_study_report
    from analysis.statistics import against_chance, bootstrap_interval, over_seeds, permutation_test, relations
    from analysis.studies import StudyResults
    from analysis.tables import (
        AdapterTables,
        Gate,
        component_table,
        functional_drift,
        imbalance_table,
        input_covariances,
        interference_table,
        noise_table,
        principal_angles,
        singular_values,
        spectrum_table,
        write_table,
    )
    from analysis.training import TrainingWatch, model_factors, read_training_log
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    "AdapterCollection",
    "AdapterSet",
    "AdapterTables",
    "Checkpoint",
    "Gate",
    "RankSuggestion",
    "Record",
    "StudyResults",
    "TrainingWatch",
    "against_chance",
    "answer_changes",
    "answer_intervals",
    "bootstrap_interval",
    "change_table",
    "component_table",
    "flattened",
    "forgetting_panels",
    "functional_drift",
    "imbalance_table",
    "input_covariances",
    "input_drift",
    "interference_table",
    "levelled",
    "model_factors",
    "noise_table",
    "over_seeds",
    "permutation_test",
    "plot_accuracy_matrix",
    "plot_against_chance",
    "plot_answer_changes",
    "plot_entropy_map",
    "plot_forgetting",
    "plot_imbalance",
    "plot_interference",
    "plot_leakage",
    "plot_noise",
    "plot_principal_angles",
    "plot_spectra",
    "plot_study",
    "plot_trade_off",
    "principal_angles",
    "projected_off",
    "read_protected",
    "read_training_log",
    "redirected",
    "relations",
    "rotated_away",
    "rotated_into",
    "save_figure",
    "scaled",
    "sharpened",
    "singular_values",
    "spectra_panels",
    "spectrum_table",
    "suggest_ranks",
    "truncated",
    "write_report",
    "write_study_report",
    "write_table",
]
