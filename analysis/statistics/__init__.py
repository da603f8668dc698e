"""Null laws of subspaces and spectra, tails, intervals, permutation tests. Imports no other package of `analysis`."""

from analysis.statistics.noise import NoiseLaws, ProductNull
from analysis.statistics.nulls import OverlapNull, against_chance, alignment_p_value, holm
from analysis.statistics.outliers import FEWEST, outlier_p_values
from analysis.statistics.pairs import relations
from analysis.statistics.resampling import PermutationTest, bootstrap_interval, over_seeds, permutation_test
from analysis.statistics.tails import TailFit, tail_exponent

__all__ = [
    "FEWEST",
    "NoiseLaws",
    "OverlapNull",
    "PermutationTest",
    "ProductNull",
    "TailFit",
    "against_chance",
    "alignment_p_value",
    "bootstrap_interval",
    "holm",
    "outlier_p_values",
    "over_seeds",
    "permutation_test",
    "relations",
    "tail_exponent",
]
