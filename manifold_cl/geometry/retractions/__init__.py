"""Retractions, which turn a tangent step into a point: the protocol, the family, and the registry."""

from typing import TYPE_CHECKING

from manifold_cl.geometry.retractions.registry import RETRACTIONS, register_retraction
from manifold_cl.lazy import lazy_names

if TYPE_CHECKING:
    from manifold_cl.geometry.retractions.cayley import Cayley, CayleyNeumann, IterativeCayley
    from manifold_cl.geometry.retractions.choice import as_retraction
    from manifold_cl.geometry.retractions.geodesics import (
        Exponential,
        ExponentialBeta,
        ExponentialCanonical,
        QuasiGeodesic,
    )
    from manifold_cl.geometry.retractions.newton_schulz import NewtonSchulz
    from manifold_cl.geometry.retractions.pade import Pade
    from manifold_cl.geometry.retractions.protocol import (
        Differentiable,
        FunctionRetraction,
        Invertible,
        Order,
        Retraction,
        Scheduled,
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
    "CayleyNeumann",
    "CholeskyQR",
    "Differentiable",
    "Exponential",
    "ExponentialBeta",
    "ExponentialCanonical",
    "FunctionRetraction",
    "Invertible",
    "IterativeCayley",
    "NewtonSchulz",
    "Order",
    "Pade",
    "Polar",
    "PolarLight",
    "PolarSVD",
    "QuasiGeodesic",
    "Retraction",
    "Scheduled",
    "Summing",
    "Transporting",
    "as_retraction",
    "register_retraction",
]
