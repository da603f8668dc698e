"""Runs of one contestant on one problem: the search for its rate, and the measured runs."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

from torch import Tensor

from manifold_cl.geometry.retractions import Retraction
from manifold_cl.lab.meter import Entry, Limits, Meter, RunEnded
from manifold_cl.lab.problems import Problem
from manifold_cl.lab.steps import Setting, Step

LEAK = 1e-5
"""Constraint error above which a contestant is off its manifold; rounding in float64 stays far below."""


@dataclass(frozen=True)
class Contestant:
    """A step with a retraction; ``label`` is its name in tables."""

    label: str
    step: Step
    retraction: Retraction | None = None
    """None is the polar retraction."""
    plugin: bool = False


@dataclass(frozen=True)
class Budget:
    """The same for every contestant on every problem."""

    evaluations: int = 400
    """Gradients and Hessian products per run."""
    rates: int = 4
    """Rates tried first, evenly spaced on a logarithmic scale over the step's range, in runs of a quarter of the
    length. Two more lie halfway between the best one and its neighbours, and two runs of full length follow: with the
    best rate, and with the next lower one."""
    starts: int = 2
    """Measured starts; the search uses another one."""
    gap: float = 1e-4
    """Relative gap that counts as solved."""
    final_gap: float = 1e-8
    """Relative gap at which a measured run ends."""

    @property
    def trials(self) -> int:
        """Runs of a search."""
        return self.rates + 4


@dataclass(frozen=True)
class Run:
    """One run: its setting, its entries, and how it failed if it did."""

    setting: Setting
    entries: tuple[Entry, ...]
    failure: str = ""
    """Type and message of the exception that ended the run; empty for none."""

    def to_gap(self, gap: float) -> Entry | None:
        """The first entry whose gap is at most ``gap``; None too for a run that failed."""
        return None if self.failure else next((entry for entry in self.entries if entry.gap <= gap), None)

    @property
    def last_gap(self) -> float:
        """The gap at the end; infinite where it is not finite or the run failed."""
        gap = self.entries[-1].gap if self.entries and not self.failure else math.inf
        return gap if math.isfinite(gap) else math.inf

    def worst(self, kind: str) -> float:
        """The largest ``orthonormality`` or ``leak`` of the run before it diverged."""
        values = [getattr(entry, kind) for entry in self.entries if math.isfinite(entry.gap)]
        return max(values, default=math.nan)


def run(contestant: Contestant, problem: Problem, start: Tensor, setting: Setting, limits: Limits) -> Run:
    """One run. An exception of the contestant becomes the run's ``failure``."""
    meter, failure = Meter(problem, start, limits), ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about leaks and slow convergence: the meter measures both
        try:
            contestant.step.run(meter, start.clone(), problem.manifold(contestant.retraction), setting)
        except RunEnded:
            pass
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
    return Run(setting, tuple(meter.entries), failure)


def search(contestant: Contestant, problem: Problem, budget: Budget, seed: int) -> Run:
    """The best run of the search for a rate: fewest evaluations to the gap, then the smallest last gap."""
    start, best = problem.start(seed), None
    if contestant.step.rates is None:
        return _better(None, contestant, problem, start, Setting(), budget)
    low, high = contestant.step.rates
    half = (high / low) ** (0.5 / max(1, budget.rates - 1))
    short, full = max(1, budget.evaluations // 4), budget.evaluations
    for place in range(budget.rates):
        best = _better(best, contestant, problem, start, Setting(low * half ** (2 * place), short), budget)
    for later, horizon in (((1 / half, half), short), ((1.0, 1 / half), full)):
        assert best is not None
        middle = best.setting.rate
        for factor in later:
            best = _better(best, contestant, problem, start, Setting(middle * factor, horizon), budget)
    assert best is not None
    return best


def _better(
    best: Run | None, contestant: Contestant, problem: Problem, start: Tensor, setting: Setting, budget: Budget
) -> Run:
    """The better one of ``best`` and a run with ``setting``, which is ended where it can no longer be better."""
    reached = None if best is None else best.to_gap(budget.gap)
    most = budget.evaluations if reached is None else reached.evaluations
    tried = run(contestant, problem, start, setting, Limits(most, gap=budget.gap))
    return tried if best is None or _rank(tried, budget.gap) < _rank(best, budget.gap) else best


def _rank(tried: Run, gap: float) -> tuple[float, float]:
    reached = tried.to_gap(gap)
    return (math.inf if reached is None else reached.evaluations), tried.last_gap
