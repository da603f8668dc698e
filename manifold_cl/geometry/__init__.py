"""The space: protected subspaces, retractions, and the restricted Stiefel manifold."""

from manifold_cl.geometry import cayley, geodesics, projective  # noqa: F401  # importing registers the family
from manifold_cl.geometry.checks import ProjectionReport, RetractionReport, check_projection, check_retraction
from manifold_cl.geometry.points import ConstraintError
from manifold_cl.geometry.restricted_stiefel import RestrictedStiefel
from manifold_cl.geometry.retractions import (
    RETRACTIONS,
    Retraction,
    available_retractions,
    register_retraction,
)
from manifold_cl.geometry.subspace import ProtectedSubspace

__all__ = [
    "RETRACTIONS",
    "ConstraintError",
    "ProjectionReport",
    "ProtectedSubspace",
    "RestrictedStiefel",
    "Retraction",
    "RetractionReport",
    "available_retractions",
    "check_projection",
    "check_retraction",
    "register_retraction",
]
