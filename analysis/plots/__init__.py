"""Figures: each function takes a table and draws into `Axes`, which it returns; pyplot and settings stay alone.

Without ``ax`` a new figure of one column's width is made. The two ``_panels`` functions return a Figure of small
multiples, `plot_cost` and `plot_study` one of several panels. Colours are Okabe and Ito's, markers differ as well, and
grids of numbers use cividis or a scale that is symmetric about zero; all of them keep their order under the common
kinds of colour blindness.
"""

from analysis.plots.files import save_figure, to_data_uri, to_svg
from analysis.plots.interference import plot_interference, plot_leakage, plot_principal_angles
from analysis.plots.runs import forgetting_panels, plot_accuracy_matrix, plot_capacity, plot_forgetting
from analysis.plots.scatter import plot_imbalance
from analysis.plots.spectra import plot_entropy_map, plot_spectra, spectra_panels
from analysis.plots.study import plot_change, plot_cost, plot_study
from analysis.plots.style import MARKERS, PALETTE, color_range
from analysis.plots.trade_off import plot_trade_off

__all__ = [
    "MARKERS",
    "PALETTE",
    "color_range",
    "forgetting_panels",
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
    "save_figure",
    "spectra_panels",
    "to_data_uri",
    "to_svg",
]
