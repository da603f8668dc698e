"""Retractions, which turn a tangent step into a point: the protocol, the family, and the registry."""

from typing import TYPE_CHECKING

from manifold_cl.geometry.retractions.registry import RETRACTIONS, register_retraction
from manifold_cl.lazy import lazy_names

if TYPE_CHECKING:
    from manifold_cl.geometry.retractions.cayley_and_exponential import (
        Cayley,
        Exponential,
        ExponentialCanonical,
        IterativeCayley,
    )
    from manifold_cl.geometry.retractions.choice import as_retraction
    from manifold_cl.geometry.retractions.protocol import (
        Differentiable,
        FunctionRetraction,
        Invertible,
        Order,
        Retraction,
        Summing,
        Transporting,
    )
    from manifold_cl.geometry.retractions.qr_and_polar import QR, CholeskyQR, Polar, PolarLight, PolarSVD
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    "QR",
    "RETRACTIONS",
    "Cayley",
    "CholeskyQR",
    "Differentiable",
    "Exponential",
    "ExponentialCanonical",
    "FunctionRetraction",
    "Invertible",
    "IterativeCayley",
    "Order",
    "Polar",
    "PolarLight",
    "PolarSVD",
    "Retraction",
    "Summing",
    "Transporting",
    "as_retraction",
    "register_retraction",
]
