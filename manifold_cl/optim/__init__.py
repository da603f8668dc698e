"""The step: any torch optimizer made Riemannian."""

from manifold_cl.optim.groups import param_groups
from manifold_cl.optim.options import corrected, official
from manifold_cl.optim.riemannian import RiemannianAdam, RiemannianAdamW, RiemannianSGD, riemannian

__all__ = [
    "RiemannianAdam",
    "RiemannianAdamW",
    "RiemannianSGD",
    "corrected",
    "official",
    "param_groups",
    "riemannian",
]
