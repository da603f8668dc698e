"""Numerical verification of retractions, projections, transports, gradients and Hessians.

The checks accept retractions and manifolds of your own and return reports. The contract tests of this library run
them; `manifold_cl.geometry.testing` has them as classes for pytest.
"""

from manifold_cl.geometry.checks.derivatives import GradientReport, HessianReport, check_gradient, check_hessian
from manifold_cl.geometry.checks.projection import ProjectionReport, check_projection
from manifold_cl.geometry.checks.report import Law, Report
from manifold_cl.geometry.checks.retraction import RetractionReport, check_retraction
from manifold_cl.geometry.checks.transport import TransportReport, check_transport

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
