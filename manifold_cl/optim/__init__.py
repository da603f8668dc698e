"""The step: any torch optimizer made Riemannian."""

from manifold_cl.optim.distributed import assert_ranks_equal, average_gradients
from manifold_cl.optim.groups import param_groups
from manifold_cl.optim.riemannian import (
    RiemannianAdam,
    RiemannianAdamW,
    RiemannianMuon,
    RiemannianSGD,
    TrainerOptimizer,
    clip_riemannian_grad_norm_,
    riemannian,
)

__all__ = [
    "RiemannianAdam",
    "RiemannianAdamW",
    "RiemannianMuon",
    "RiemannianSGD",
    "TrainerOptimizer",
    "assert_ranks_equal",
    "average_gradients",
    "clip_riemannian_grad_norm_",
    "param_groups",
    "riemannian",
]
