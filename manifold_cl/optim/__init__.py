"""The step: any torch optimizer made Riemannian."""

from manifold_cl.optim.riemannian import (
    RiemannianAdamW,
    RiemannianSGD,
    corrected,
    official,
    param_groups,
    riemannian,
)

__all__ = ["RiemannianAdamW", "RiemannianSGD", "corrected", "official", "param_groups", "riemannian"]
