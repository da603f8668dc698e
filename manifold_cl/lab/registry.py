"""The registries of problems and steps: their names, and what is imported when a name is first used."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from manifold_cl.plugins import Registry, prepare_instance

if TYPE_CHECKING:
    from manifold_cl.lab.problems import Problem
    from manifold_cl.lab.steps import Step

OWN_PROBLEMS = {
    "pca": "closed_forms:PrincipalComponents",
    "brockett": "closed_forms:Brockett",
    "procrustes": "closed_forms:Procrustes",
    "nearest": "closed_forms:Nearest",
    "joint_diagonalisation": "closed_forms:JointDiagonalisation",
    "orthogonal_layer": "network:OrthogonalLayer",
}
"""Name of a problem → its file in this folder and its class."""
OWN_STEPS = {
    "sgd": "steps:SGD",
    "momentum": "steps:MOMENTUM",
    "adamw": "steps:ADAMW",
    "adam_per_matrix": "steps:ADAM",
    "muon_exact": "steps:MUON_EXACT",
    "muon_spel": "steps:MUON_SPEL",
    "muon_projected": "steps:MUON_PROJECTED",
    "muon_intrinsic": "steps:MUON_INTRINSIC",
    "geoopt_adam": "steps:GEOOPT_ADAM",
    "trust_regions": "solvers:TRUST_REGIONS",
    "conjugate_gradient": "solvers:CONJUGATE_GRADIENT",
}
"""Name of a step → its file in this folder and its object."""


def _prepare_problem(candidate: Any) -> tuple[str, Callable[[], Problem]]:
    """The name and the class, or a function that returns the instance."""
    from manifold_cl.lab.problems import Problem

    if isinstance(candidate, Problem):
        return candidate.name, lambda: candidate
    if isinstance(candidate, type) and issubclass(candidate, Problem):
        return candidate.name, candidate
    raise TypeError(f"{candidate!r} is no problem: it must be a subclass of manifold_cl.lab.Problem, or an instance")


def _prepare_step(candidate: Any) -> tuple[str, Step]:
    from manifold_cl.lab.steps import Step

    return prepare_instance(candidate, Step, "name, rates, takes_retraction, infeasible and run()")


PROBLEMS: Registry[Callable[[], Problem]] = Registry(
    "problem", _prepare_problem, {name: f"manifold_cl.lab.{path}" for name, path in OWN_PROBLEMS.items()}
)
"""Problems by name, as classes that are made without arguments."""
STEPS: Registry[Step] = Registry(
    "step", _prepare_step, {name: f"manifold_cl.lab.{path}" for name, path in OWN_STEPS.items()}
)
"""Steps by name."""
