"""Random-subspace nulls, intervals over seeds, and permutation tests. Imports no other package of `analysis`."""

from analysis.statistics.nulls import OverlapNull, against_chance, alignment_p_value, holm
from analysis.statistics.resampling import PermutationTest, bootstrap_interval, over_seeds, permutation_test

__all__ = [
    "OverlapNull",
    "PermutationTest",
    "against_chance",
    "alignment_p_value",
    "bootstrap_interval",
    "holm",
    "over_seeds",
    "permutation_test",
]
