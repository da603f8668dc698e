"""Figures: each function takes a table, draws into `Axes`, and returns them. Pyplot and global settings are not used.

Without ``ax`` a new figure of one column's width is made. The ``_panels`` functions return a Figure with one panel per
task; `plot_cost` and `plot_study` return one with several panels. Colours are Okabe and Ito's, and markers differ as
well. Grids use cividis, or a scale that is symmetric about zero. All keep their order under the common kinds of colour
blindness.
"""

from analysis.plots.causes import plot_dose_response, plot_mediation, plot_sizes
from analysis.plots.changes import plot_kept_share
from analysis.plots.evidence import ANSWERS, plot_against_chance, plot_answer_changes, plot_layer_drift
from analysis.plots.files import save_figure, to_data_uri, to_svg
from analysis.plots.interference import plot_interference, plot_leakage, plot_principal_angles
from analysis.plots.many import plot_common_directions, plot_dendrogram
from analysis.plots.merging import plot_merge
from analysis.plots.noise import plot_noise
from analysis.plots.runs import forgetting_panels, plot_accuracy_matrix, plot_capacity, plot_forgetting
from analysis.plots.scatter import plot_imbalance
from analysis.plots.spectra import plot_entropy_map, plot_spectra, spectra_panels
from analysis.plots.study import plot_change, plot_cost, plot_differences, plot_study
from analysis.plots.style import MARKERS, PALETTE, color_range
from analysis.plots.trade_off import plot_trade_off
from analysis.plots.training import plot_training, training_panels

__all__ = [
    "ANSWERS",
    "MARKERS",
    "PALETTE",
    "color_range",
    "forgetting_panels",
    "plot_accuracy_matrix",
    "plot_against_chance",
    "plot_answer_changes",
    "plot_capacity",
    "plot_change",
    "plot_common_directions",
    "plot_cost",
    "plot_dendrogram",
    "plot_differences",
    "plot_dose_response",
    "plot_entropy_map",
    "plot_forgetting",
    "plot_imbalance",
    "plot_interference",
    "plot_kept_share",
    "plot_layer_drift",
    "plot_leakage",
    "plot_mediation",
    "plot_merge",
    "plot_noise",
    "plot_principal_angles",
    "plot_sizes",
    "plot_spectra",
    "plot_study",
    "plot_trade_off",
    "plot_training",
    "save_figure",
    "spectra_panels",
    "to_data_uri",
    "to_svg",
    "training_panels",
]
