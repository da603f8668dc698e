"""Random-subspace nulls, intervals over seeds, and permutation tests. Imports nothing of the other packages."""
