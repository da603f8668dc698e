"""Steps that compete in the lab: torch optimizers made Riemannian, others' optimizers, and plain functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from manifold_cl.geometry import RestrictedStiefel
from manifold_cl.lab.meter import Meter


@dataclass(frozen=True)
class Setting:
    """The part of a run that the search chooses."""

    rate: float = 0.0
    """The step's rate at the start."""
    horizon: int = 0
    """Steps until the rate has fallen to zero."""

    def at(self, step: int) -> float:
        """The rate of a step: half a period of the cosine, from ``rate`` down to zero."""
        return self.rate * (1 + math.cos(math.pi * step / self.horizon)) / 2


@runtime_checkable
class Step(Protocol):
    """One way to go down: runs from a point until the meter ends the run or it has nothing left to do."""

    name: str
    rates: tuple[float, float] | None
    """Range of rates that the search may try; None for a step without a rate."""
    takes_retraction: bool
    """Whether the step can be combined with any retraction."""
    infeasible: bool
    """Whether the step leaves the manifold on purpose. It may not leave the complement of F."""

    def run(self, meter: Meter, x: Tensor, manifold: RestrictedStiefel, setting: Setting) -> None:
        """Run from x. Gradients come from ``meter.gradient``, which ends the run by raising RunEnded."""
        ...


@dataclass(frozen=True)
class OptimizerStep:
    """A torch optimizer, its rate on a cosine down to zero.

    Args:
        name: for tables.
        make: (parameter, manifold, rate) → optimizer.
        rates: range for the search.
        takes_retraction: whether the manifold's retraction matters.
        infeasible: whether points leave the manifold on purpose.
    """

    name: str
    make: Callable[[torch.nn.Parameter, RestrictedStiefel, float], Any]
    rates: tuple[float, float] | None = (1e-3, 1.0)
    takes_retraction: bool = True
    infeasible: bool = False

    def run(self, meter: Meter, x: Tensor, manifold: RestrictedStiefel, setting: Setting) -> None:
        """``horizon`` steps."""
        point = torch.nn.Parameter(x.clone())
        optimizer = self.make(point, manifold, setting.rate)
        (point,) = (p for group in optimizer.param_groups for p in group["params"])
        for step in range(setting.horizon):
            for group in optimizer.param_groups:
                group["lr"] = setting.at(step)
            point.grad = meter.gradient(point.detach())
            optimizer.step()
        meter.finish(point.detach())


@dataclass(frozen=True)
class Riemannian:
    """Makes one of our Riemannian optimizers for a point; ``kind`` is its name in `manifold_cl.optim`."""

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __call__(self, point: torch.nn.Parameter, manifold: RestrictedStiefel, rate: float) -> Any:
        """The optimizer."""
        from manifold_cl import optim

        return riemannian_on(getattr(optim, self.kind), point, manifold, rate, **self.options)


def riemannian_on(
    kind: Any, point: torch.nn.Parameter, manifold: RestrictedStiefel, rate: float, **options: Any
) -> Any:
    """An instance of a Riemannian optimizer class for one point; a step that is not finite is left out."""
    return kind([{"params": [point], "manifolds": [manifold]}], lr=rate, nonfinite="skip", **options)


def geoopt_adam(point: torch.nn.Parameter, manifold: RestrictedStiefel, rate: float) -> Any:
    """Geoopt's RiemannianAdam on our manifold."""
    import geoopt

    return geoopt.optim.RiemannianAdam([geoopt.ManifoldParameter(point.detach(), manifold=manifold)], lr=rate)


@dataclass(frozen=True)
class FunctionStep:
    """A function ``step(x, gradient, rate, manifold) → x``, or a class whose instances are one.

    A class is instantiated once per run, so that it may keep averages. The gradient is the Euclidean one.
    """

    name: str
    function: Callable[..., Any]
    rates: tuple[float, float] | None = (1e-3, 10.0)
    takes_retraction: bool = False
    infeasible: bool = False

    def run(self, meter: Meter, x: Tensor, manifold: RestrictedStiefel, setting: Setting) -> None:
        """``horizon`` steps."""
        function = self.function() if isinstance(self.function, type) else self.function
        for step in range(setting.horizon):
            y = function(x, meter.gradient(x), setting.at(step), manifold)
            if not isinstance(y, Tensor) or y.shape != x.shape:
                given = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
                raise TypeError(f"the step {self.name!r} must return a tensor {tuple(x.shape)}, got {given}")
            x = y.detach()
        meter.finish(x)


@dataclass(frozen=True)
class Infeasible:
    """Makes SGD with momentum whose points step without a retraction; ``step`` is a name in `INFEASIBLE_STEPS`."""

    step: str

    def __call__(self, point: torch.nn.Parameter, manifold: RestrictedStiefel, rate: float) -> Any:
        """The optimizer."""
        from manifold_cl.infeasible import infeasible

        kind = infeasible(torch.optim.SGD, step=self.step)
        return kind([{"params": [point], "manifolds": [manifold]}], lr=rate, momentum=0.9)


def without_retraction(step: str) -> OptimizerStep:
    """The lab's step for a name in `INFEASIBLE_STEPS`, with the range of rates of ``momentum``."""
    return OptimizerStep(step, Infeasible(step), (1e-1, 100.0), takes_retraction=False, infeasible=True)


SGD = OptimizerStep("sgd", Riemannian("RiemannianSGD"), (1e-1, 100.0))
MOMENTUM = OptimizerStep("momentum", Riemannian("RiemannianSGD", {"momentum": 0.9}), (1e-1, 100.0))
ADAMW = OptimizerStep("adamw", Riemannian("RiemannianAdamW", {"weight_decay": 0.0}), (1e-3, 1.0))
ADAM = OptimizerStep("adam_per_matrix", Riemannian("RiemannianAdam"), (1e-3, 1.0))
MUON_EXACT = OptimizerStep("muon_exact", Riemannian("RiemannianMuon", {"direction": "exact"}))
MUON_SPEL = OptimizerStep("muon_spel", Riemannian("RiemannianMuon", {"direction": "spel"}))
MUON_PROJECTED = OptimizerStep("muon_projected", Riemannian("RiemannianMuon", {"direction": "projected"}))
MUON_INTRINSIC = OptimizerStep("muon_intrinsic", Riemannian("RiemannianMuon", {"direction": "intrinsic"}))
GEOOPT_ADAM = OptimizerStep("geoopt_adam", geoopt_adam, (1e-1, 100.0))
