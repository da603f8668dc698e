"""Geometry: protected subspaces, retractions, and the restricted Stiefel manifold."""

from typing import TYPE_CHECKING

from manifold_cl.lazy import lazy_names

if TYPE_CHECKING:
    from manifold_cl.geometry.checks import (
        GradientReport,
        HessianReport,
        ProjectionReport,
        RetractionReport,
        TransportReport,
        check_gradient,
        check_hessian,
        check_projection,
        check_retraction,
        check_transport,
    )
    from manifold_cl.geometry.metrics import BetaMetric
    from manifold_cl.geometry.points import ConstraintResiduals
    from manifold_cl.geometry.restricted_stiefel import RestrictedStiefel
    from manifold_cl.geometry.retractions import (
        RETRACTIONS,
        Retraction,
        register_retraction,
    )
    from manifold_cl.geometry.steepest import SteepestDirection, tangent_lmo
    from manifold_cl.geometry.stiefel_images import GeneralizedStiefel, ScaledStiefel
    from manifold_cl.geometry.subspace import ProtectedSubspace
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    "RETRACTIONS",
    "BetaMetric",
    "ConstraintResiduals",
    "GeneralizedStiefel",
    "GradientReport",
    "HessianReport",
    "ProjectionReport",
    "ProtectedSubspace",
    "RestrictedStiefel",
    "Retraction",
    "RetractionReport",
    "ScaledStiefel",
    "SteepestDirection",
    "TransportReport",
    "check_gradient",
    "check_hessian",
    "check_projection",
    "check_retraction",
    "check_transport",
    "register_retraction",
    "tangent_lmo",
]
