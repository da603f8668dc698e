"""Linear algebra of low-rank factors, and measures of a spectrum. Imports only torch and numpy."""

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

__all__ = [
    "condition_number",
    "effective_rank",
    "frobenius_norm",
    "gini",
    "participation_ratio",
    "renyi_entropy",
    "spectral_entropy",
    "spectral_flatness",
    "spectral_norm",
    "stable_rank",
    "top_energy",
]
