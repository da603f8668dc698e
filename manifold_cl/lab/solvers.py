"""pymanopt's solvers as contestants: trust regions and conjugate gradients on our pymanopt twin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manifold_cl.geometry import RestrictedStiefel
from manifold_cl.lab.meter import Meter
from manifold_cl.lab.steps import Setting

try:
    import pymanopt
    from pymanopt import optimizers
except ImportError as error:
    raise ImportError("trust regions and conjugate gradients need pymanopt: pip install 'pymanopt>=2.2.1'") from error

ITERATIONS = 10_000
"""More than any run takes: the meter ends runs."""


@dataclass(frozen=True)
class Solver:
    """A solver of pymanopt with its defaults. It has no rate, so there is nothing to search.

    Args:
        name: for tables.
        kind: name of the class in ``pymanopt.optimizers``.
    """

    name: str
    kind: str
    rates: tuple[float, float] | None = None
    takes_retraction: bool = True
    infeasible: bool = False

    def run(self, meter: Meter, x: Tensor, manifold: RestrictedStiefel, setting: Setting) -> None:
        """Run until the meter or the solver itself ends it."""
        from manifold_cl.geometry.pymanopt import RestrictedStiefel as Twin

        twin = Twin(meter.problem.complement, meter.problem.p, retraction=manifold.retraction)
        wrapped = pymanopt.function.numpy(twin)
        problem = pymanopt.Problem(
            twin,
            wrapped(lambda point: float(meter.cost(_tensor(point)))),
            euclidean_gradient=wrapped(lambda point: meter.gradient(_tensor(point)).numpy()),
            euclidean_hessian=wrapped(lambda point, v: meter.hessian(_tensor(point), _tensor(v)).numpy()),
        )
        solver = getattr(optimizers, self.kind)(
            verbosity=0, max_iterations=ITERATIONS, max_time=1e9, min_gradient_norm=0.0, min_step_size=1e-16
        )
        meter.finish(_tensor(solver.run(problem, initial_point=x.numpy()).point))


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(array if array.flags.writeable else array.copy())


TRUST_REGIONS = Solver("trust_regions", "TrustRegions")
CONJUGATE_GRADIENT = Solver("conjugate_gradient", "ConjugateGradient")
