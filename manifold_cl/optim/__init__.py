"""The step: any torch optimizer made Riemannian."""

from manifold_cl.optim.riemannian import (
    RiemannianAdamW,
    RiemannianSGD,
    corrected,
    official,
    param_groups,
    riemannian,
)
from manifold_cl.optim.trainer import TrainerOptimizer

__all__ = [
    "RiemannianAdamW",
    "RiemannianSGD",
    "TrainerOptimizer",
    "corrected",
    "official",
    "param_groups",
    "riemannian",
]
