"""Numerical verification of retractions, projections, transports, gradients and Hessians.

The checks accept retractions and manifolds of your own and return reports. The contract tests of this library run
them; `manifold_cl.geometry.testing` has them as classes for pytest.
"""

from manifold_cl.geometry.checks.manifold import (
    GradientReport,
    HessianReport,
    ProjectionReport,
    TransportReport,
    check_gradient,
    check_hessian,
    check_projection,
    check_transport,
)
from manifold_cl.geometry.checks.measure import Law, Report
from manifold_cl.geometry.checks.retraction import RetractionReport, check_retraction

__all__ = [
    "GradientReport",
    "HessianReport",
    "Law",
    "ProjectionReport",
    "Report",
    "RetractionReport",
    "TransportReport",
    "check_gradient",
    "check_hessian",
    "check_projection",
    "check_retraction",
    "check_transport",
]
