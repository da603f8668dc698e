"""The contestants of a suite: steps crossed with retractions, and plug-ins."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from manifold_cl.geometry import RETRACTIONS, RestrictedStiefel, Retraction, check_retraction
from manifold_cl.geometry.retractions import as_retraction
from manifold_cl.infeasible import INFEASIBLE_STEPS
from manifold_cl.lab.problems import Problem
from manifold_cl.lab.registry import PROBLEMS, STEPS
from manifold_cl.lab.runs import Contestant
from manifold_cl.lab.steps import FunctionStep, OptimizerStep, Step, riemannian_on, without_retraction
from manifold_cl.plugins import load_object, unknown

USUAL_RETRACTION = "polar"
"""The retraction of every step in the short suite."""
USUAL_STEP = "momentum"
"""The step that every retraction is combined with."""


@dataclass(frozen=True)
class Entrants:
    """Who takes part and where: contestants, problems, and what could not be loaded (name → reason)."""

    contestants: tuple[Contestant, ...]
    problems: tuple[Problem, ...]
    missing: dict[str, str] = field(default_factory=dict, hash=False)

    @property
    def retractions(self) -> list[Retraction]:
        """The retractions of the contestants."""
        used = [c.retraction or RETRACTIONS[USUAL_RETRACTION] for c in self.contestants if c.step.takes_retraction]
        return list(dict.fromkeys(used))


def entrants(
    *,
    plugins: Iterable[Any] = (),
    problems: Iterable[str] = (),
    only: Iterable[str] = (),
    everything: bool = False,
) -> Entrants:
    """The contestants and problems of a suite.

    The short suite takes every retraction with one step (`USUAL_STEP`), and every step with one retraction
    (`USUAL_RETRACTION`).

    Args:
        plugins: retractions, steps and problems of your own: objects, or ``module:name`` and ``file.py:name``. See
            `as_plugin`.
        problems: names; all and those of the plug-ins if empty.
        only: labels of contestants; all if empty. Plug-ins take part in any case.
        everything: all steps that take a retraction with all retractions.

    Raises:
        ValueError: for an unknown problem or contestant, and for a plug-in that cannot be loaded.
        TypeError: for a plug-in that is neither retraction nor step nor problem.
    """
    missing: dict[str, str] = {}
    steps, rules = _available(STEPS, missing), _available(RETRACTIONS, missing)
    steps += [without_retraction(name) for name in INFEASIBLE_STEPS]
    own_steps: list[Step] = []
    own_rules: list[Retraction] = []
    own_problems: list[Problem] = []
    for plugin in plugins:
        kind, entry = as_plugin(_loaded(plugin) if isinstance(plugin, str) else plugin)
        taken = [other.name for other in [*steps, *rules, *own_steps, *own_rules, *own_problems]]
        if entry.name in [*taken, *PROBLEMS]:
            raise ValueError(f"the plug-in {entry.name!r} has the name of another contestant or problem: rename it")
        own: dict[str, list[Any]] = {"step": own_steps, "retraction": own_rules, "problem": own_problems}
        own[kind].append(entry)
    usual = next(step for step in steps if step.name == USUAL_STEP)
    contestants = [Contestant(step.name, step) for step in [*steps, *own_steps]]
    if everything:
        crossed = [step for step in [*steps, *own_steps] if step.takes_retraction]
    else:
        crossed = [usual]
    contestants += [
        Contestant(f"{step.name} + {rule.name}", step, rule)
        for step in crossed
        for rule in [*rules, *own_rules]
        if rule.name != USUAL_RETRACTION
    ]
    names = {rule.name for rule in own_rules} | {step.name for step in own_steps}
    marked = [
        Contestant(c.label, c.step, c.retraction, plugin=bool(names & set(c.label.split(" + ")))) for c in contestants
    ]
    labels = [c.label for c in marked]
    only = list(only)
    if wrong := [name for name in only if name not in labels]:
        raise ValueError(unknown("contestant", wrong[0], labels))
    marked = [c for c in marked if not only or c.label in only or c.plugin]
    chosen = [PROBLEMS[name]() for name in problems or PROBLEMS]
    return Entrants(tuple(marked), (*chosen, *own_problems), missing)


def working_retractions(field: Entrants) -> tuple[list[Retraction], dict[str, str]]:
    """The retractions whose laws can be measured, and name → exception of the plug-ins for which that fails."""
    working, broken = [], {}
    for rule in field.retractions:
        try:
            if rule.name not in RETRACTIONS:
                for metric in rule.order:
                    check_retraction(rule, metric)  # type: ignore[arg-type]
            working.append(rule)
        except Exception as error:
            broken[rule.name] = f"cannot be verified: {type(error).__name__}: {error}"
    return working, broken


def _loaded(path: str) -> Any:
    """The object of a plug-in; ValueError when its file raises."""
    try:
        return load_object(path)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"the plug-in {path!r} raises {type(error).__name__}: {error}") from error


def _available(registry: Any, missing: dict[str, str]) -> list[Any]:
    """The entries of a registry; one that needs a library that is absent goes to ``missing``."""
    entries = []
    for name in registry:
        try:
            entries.append(registry[name])
        except (ImportError, ValueError) as error:
            missing[name] = str(error)
    return entries


def as_plugin(candidate: Any) -> tuple[str, Any]:
    """``("step" | "retraction" | "problem", entry)`` for an object of the user.

    A `Problem` is a problem. A `Step`, a subclass of ``torch.optim.Optimizer`` (made Riemannian unless it is), or a
    function of (x, gradient, rate, manifold) is a step. A `Retraction`, or a function of (x, u), is a retraction.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(candidate, type) and issubclass(candidate, torch.optim.Optimizer):
        return "step", OptimizerStep(candidate.__name__, _OptimizerOf(candidate))
    if isinstance(candidate, type) and issubclass(candidate, Problem):
        return "problem", candidate()
    instance = candidate
    if isinstance(candidate, type) and _positional(candidate) == 0:
        instance = candidate()
    if isinstance(instance, Problem):
        return "problem", instance
    if isinstance(instance, Step):
        return "step", instance
    if isinstance(instance, Retraction):
        return "retraction", instance
    count = _positional(instance) if callable(instance) else None
    name = getattr(candidate, "name", getattr(candidate, "__name__", type(candidate).__name__))
    if count == 4:
        return "step", FunctionStep(str(name), candidate)
    if count == 2:
        return "retraction", as_retraction(candidate)
    raise TypeError(
        f"the plug-in {name!r} is neither a retraction (x, u), nor a step (x, gradient, rate, manifold), nor an "
        "optimizer class, nor a problem"
    )


def _positional(function: Any) -> int | None:
    """The number of positional parameters without a default; None where Python does not know."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters)


@dataclass(frozen=True)
class _OptimizerOf:
    """Makes an optimizer of the user's class, Riemannian."""

    kind: Any

    def __call__(self, point: torch.nn.Parameter, manifold: RestrictedStiefel, rate: float) -> Any:
        from manifold_cl.optim.riemannian import RiemannianStep, riemannian

        return riemannian_on(
            self.kind if issubclass(self.kind, RiemannianStep) else riemannian(self.kind), point, manifold, rate
        )
