"""The registry of retractions: their names, and the object of a name, which is imported when it is first used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from manifold_cl.plugins import Registry, prepare_instance

if TYPE_CHECKING:
    from manifold_cl.geometry.retractions.protocol import Retraction

OWN = {
    "cayley": "cayley:Cayley",
    "iterative_cayley": "cayley:IterativeCayley",
    "cayley_neumann_4": "cayley:CAYLEY_NEUMANN_4",
    "pade_2": "pade:PADE_2",
    "pade_3": "pade:PADE_3",
    "exponential": "geodesics:Exponential",
    "exponential_canonical": "geodesics:ExponentialCanonical",
    "quasi_geodesic": "geodesics:QuasiGeodesic",
    "polar": "qr_and_polar:Polar",
    "polar_svd": "qr_and_polar:PolarSVD",
    "newton_schulz": "newton_schulz:NewtonSchulz",
    "qr": "qr_and_polar:QR",
    "cholesky_qr": "qr_and_polar:CholeskyQR",
    "polar_light": "qr_and_polar:PolarLight",
}
"""Name of a retraction → its file in this folder, and its class or the member of a family."""


def _prepare(candidate: Any) -> tuple[str, Retraction]:
    from manifold_cl.geometry.retractions.protocol import Retraction

    return prepare_instance(candidate, Retraction, "name, order, self_correcting, tangent_only and __call__(x, u)")


RETRACTIONS: Registry[Retraction] = Registry(
    "retraction", _prepare, {name: f"manifold_cl.geometry.retractions.{path}" for name, path in OWN.items()}
)
"""Retractions by name, those of installed packages too (read-only; see `register_retraction`)."""

_R = TypeVar("_R", bound=type)


def register_retraction(cls: _R) -> _R:
    """Class decorator: put an instance, made without arguments, into `RETRACTIONS`.

    An installed package offers its class as an entry point of the group ``manifold_cl.retractions`` instead.

    Raises:
        ValueError: when the name is taken.
        TypeError: when the instance lacks part of the `Retraction` protocol.
    """
    RETRACTIONS.register(cls)
    return cls
