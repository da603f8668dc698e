"""The registry of steps without a retraction: their names, and the object of a name, imported when first used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from manifold_cl.plugins import Registry, prepare_instance

if TYPE_CHECKING:
    from manifold_cl.infeasible.protocol import InfeasibleStep

OWN = {
    "landing": "steps:Landing",
    "pogo": "steps:POGO",
    "second_order_landing": "steps:SecondOrderLanding",
}
"""Name of a step → its file in this folder and its class."""


def _prepare(candidate: Any) -> tuple[str, InfeasibleStep]:
    from manifold_cl.infeasible.protocol import InfeasibleStep

    return prepare_instance(candidate, InfeasibleStep, "name, order and __call__(x, d, *, lr)")


INFEASIBLE_STEPS: Registry[InfeasibleStep] = Registry(
    "infeasible_step", _prepare, {name: f"manifold_cl.infeasible.{path}" for name, path in OWN.items()}
)
"""Steps by name, those of installed packages too (read-only; see `register_infeasible_step`)."""

_S = TypeVar("_S", bound=type)


def register_infeasible_step(cls: _S) -> _S:
    """Class decorator: put an instance, made without arguments, into `INFEASIBLE_STEPS`.

    An installed package offers its class as an entry point of the group ``manifold_cl.infeasible_steps`` instead.

    Raises:
        ValueError: when the name is taken.
        TypeError: when the instance lacks part of the `InfeasibleStep` protocol.
    """
    INFEASIBLE_STEPS.register(cls)
    return cls
