"""Steps without a retraction, and torch optimizers that take them: points drift, by an amount that stays small."""

from typing import TYPE_CHECKING

from manifold_cl.lazy import lazy_names

if TYPE_CHECKING:
    from manifold_cl.infeasible.choice import as_infeasible_step
    from manifold_cl.infeasible.newton import newton_direction
    from manifold_cl.infeasible.optimizer import InfeasibleOptimizer, infeasible
    from manifold_cl.infeasible.protocol import InfeasibleStep
    from manifold_cl.infeasible.registry import INFEASIBLE_STEPS, register_infeasible_step
    from manifold_cl.infeasible.steps import POGO, Landing, SecondOrderLanding
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    "INFEASIBLE_STEPS",
    "POGO",
    "InfeasibleOptimizer",
    "InfeasibleStep",
    "Landing",
    "SecondOrderLanding",
    "as_infeasible_step",
    "infeasible",
    "newton_direction",
    "register_infeasible_step",
]
