"""The step: any torch optimizer made Riemannian."""

from manifold_cl.optim.clipping import clip_riemannian_grad_norm_
from manifold_cl.optim.groups import param_groups
from manifold_cl.optim.options import corrected, official
from manifold_cl.optim.riemannian import RiemannianAdam, RiemannianAdamW, RiemannianSGD, riemannian
from manifold_cl.optim.sharing import assert_ranks_equal, average_gradients
from manifold_cl.optim.trainer import TrainerOptimizer

__all__ = [
    "RiemannianAdam",
    "RiemannianAdamW",
    "RiemannianSGD",
    "TrainerOptimizer",
    "assert_ranks_equal",
    "average_gradients",
    "clip_riemannian_grad_norm_",
    "corrected",
    "official",
    "param_groups",
    "riemannian",
]
