"""The suite: every contestant on every problem, in several processes, and the report."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from multiprocessing import get_context
from typing import Any

import torch

from manifold_cl.lab.contestants import USUAL_STEP, Entrants, entrants
from manifold_cl.lab.meter import Entry, Limits
from manifold_cl.lab.performance_profiles import area, profile, share_at
from manifold_cl.lab.problems import Problem
from manifold_cl.lab.runs import LEAK, Budget, Contestant, Run, run, search

MOST = 100.0
"""Largest factor of a profile."""
POINTS_PER_CURVE = 30
"""Entries of a run that a report keeps."""
UNITS = ("evaluations", "seconds")


@dataclass(frozen=True)
class Result:
    """One contestant on one problem: the searched setting, and a run per start."""

    contestant: str
    problem: str
    rate: float
    horizon: int
    at_edge: bool
    """Whether the rate is the lowest or highest that the search tried."""
    runs: tuple[Run, ...]
    leak: float
    """Largest ``|Fᵀx|`` of the measured runs."""
    orthonormality: float
    """Largest ``|xᵀx − I|``."""
    failure: str = ""
    """The exception, where every run of the search raised one."""

    def costs(self, gap: float, unit: str) -> list[float]:
        """Evaluations or seconds to a gap, per start; infinite where it is not reached."""
        entries = [run.to_gap(gap) for run in self.runs]
        return [math.inf if entry is None else max(getattr(entry, unit), 1e-9) for entry in entries]


@dataclass(frozen=True)
class SuiteReport:
    """The results of all contestants on all problems."""

    budget: Budget
    problems: tuple[Problem, ...]
    contestants: tuple[Contestant, ...]
    results: tuple[Result, ...]
    missing: dict[str, str]
    wall_seconds: float
    cpu_seconds: float

    def of(self, contestant: str) -> list[Result]:
        """The results of a contestant, in the order of the problems."""
        order = [problem.name for problem in self.problems]
        return sorted((r for r in self.results if r.contestant == contestant), key=lambda r: order.index(r.problem))

    @cached_property
    def excluded(self) -> dict[str, str]:
        """Contestants that cannot win, and the reason: a leak out of the complement, or an exception."""
        reasons: dict[str, str] = {}
        for contestant in self.contestants:
            for result in self.of(contestant.label):
                if reason := _exclusion(result, infeasible=contestant.step.infeasible):
                    reasons.setdefault(contestant.label, reason)
        return reasons

    def sets(self) -> dict[str, list[str]]:
        """Labels to compare with each other: "steps" with the polar retraction, "retractions" with `USUAL_STEP`."""
        steps = [c.label for c in self.contestants if c.retraction is None]
        rules = [c.label for c in self.contestants if c.step.name == USUAL_STEP]
        return {"steps": steps, "retractions": rules}

    def profiles(
        self, unit: str, gap: float | None = None, names: Iterable[str] | None = None
    ) -> dict[str, list[tuple[float, float]]]:
        """Performance profiles in ``"evaluations"`` or ``"seconds"``, of those that are not excluded.

        Args:
            unit: what is compared.
            gap: the relative gap to reach; the budget's if None.
            names: contestants to compare with each other; all if None.
        """
        gap = self.budget.gap if gap is None else gap
        names = [c.label for c in self.contestants] if names is None else names
        fair = [name for name in names if name not in self.excluded]
        if not fair:
            return {}
        return profile({name: [cost for r in self.of(name) for cost in r.costs(gap, unit)] for name in fair})

    def ranking(self, unit: str, names: Iterable[str] | None = None) -> list[str]:
        """Contestants by the area below their profile, the best first."""
        curves = self.profiles(unit, names=names)
        return sorted(curves, key=lambda name: -area(curves[name], MOST))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; what is infinite becomes None."""
        curves = {unit: self.profiles(unit) for unit in UNITS}
        return {
            "budget": {**asdict(self.budget), "trials": self.budget.trials},
            "wall_seconds": round(self.wall_seconds, 1),
            "cpu_seconds": round(self.cpu_seconds, 1),
            "problems": [
                {"name": p.name, "shape": list(p.shape), "optimum": p.optimum, "known_by": p.known_by}
                for p in self.problems
            ],
            "excluded": self.excluded,
            "missing": self.missing,
            "contestants": [self._summary(c, curves) for c in self.contestants],
            "results": [_plain(result, self.budget.gap) for result in self.results],
        }

    def _summary(self, contestant: Contestant, curves: dict[str, dict[str, list[tuple[float, float]]]]) -> Any:
        name = contestant.label
        content: dict[str, Any] = {"name": name, "step": contestant.step.name, "plugin": contestant.plugin}
        content["retraction"] = retraction_of(contestant)
        for unit in UNITS:
            curve = curves[unit].get(name)
            if curve is not None:
                content[unit] = {
                    "area": round(area(curve, MOST), 4),
                    "best_share": share_at(curve, 1.0),
                    "solved_share": share_at(curve, math.inf),
                    "profile": [[round(ratio, 3), round(share, 4)] for ratio, share in curve],
                }
        return content


def retraction_of(contestant: Contestant) -> str | None:
    """The name of the retraction; None for a step that takes none."""
    if not contestant.step.takes_retraction:
        return None
    return "polar" if contestant.retraction is None else contestant.retraction.name


def run_suite(
    plugins: Iterable[Any] = (),
    *,
    problems: Iterable[str] = (),
    budget: Budget | None = None,
    everything: bool = False,
    only: Iterable[str] = (),
    jobs: int = 1,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> SuiteReport:
    """Run the suite: search a rate for every contestant on every problem, then measure it from other starts.

    Args:
        plugins: your retractions, steps and problems, see `entrants`. With ``jobs`` above 1 give them by path.
        problems: names of problems; all if empty.
        budget: the same for all; the default takes minutes.
        everything: every step with every retraction.
        only: labels of contestants; all if empty. Plug-ins take part in any case.
        jobs: processes, each with one thread.
        on_progress: called with (label, number done, total number).

    Raises:
        ValueError: for unknown names, plug-ins that cannot be loaded, and objects as plug-ins with several jobs.
        TypeError: for a plug-in that does not fit.
    """
    budget = budget or Budget()
    recipe = Recipe(tuple(plugins), tuple(problems), tuple(only), everything)
    if jobs > 1 and any(not isinstance(plugin, str) for plugin in recipe.plugins):
        raise ValueError(f"jobs is {jobs}: other processes load plug-ins by path, so give module:name or file.py:name")
    field = recipe.entrants()
    pairs = [(c.label, place) for place in range(len(field.problems)) for c in field.contestants]
    progress = on_progress or (lambda label, done, total: None)
    began = time.perf_counter()
    results: dict[tuple[str, int], Result] = {}
    cpu = 0.0
    for done, (pair, result, seconds) in enumerate(_all(pairs, field, budget, jobs, recipe), 1):
        results[pair] = result
        cpu += seconds
        progress(f"{field.problems[pair[1]].name}: {pair[0]}", done, len(pairs))
    return SuiteReport(
        budget=budget,
        problems=field.problems,
        contestants=field.contestants,
        results=tuple(results[pair] for pair in pairs),
        missing=field.missing,
        wall_seconds=time.perf_counter() - began,
        cpu_seconds=cpu,
    )


def measure(contestant: Contestant, problem: Problem, budget: Budget) -> Result:
    """Search the rate of a contestant on a problem, then run it from the measured starts."""
    best = search(contestant, problem, budget, seed=0)
    setting = best.setting
    limits = Limits(budget.evaluations, gap=budget.final_gap)
    runs: list[Run] = []
    if not best.failure:
        runs = [run(contestant, problem, problem.start(1 + i), setting, limits) for i in range(budget.starts)]
    rates = contestant.step.rates
    return Result(
        contestant=contestant.label,
        problem=problem.name,
        rate=setting.rate,
        horizon=setting.horizon,
        at_edge=rates is not None and not rates[0] * 0.99 < setting.rate < rates[1] * 1.01,
        runs=tuple(runs) or (best,) * budget.starts,
        leak=max((r.worst("leak") for r in [best, *runs]), default=math.nan),
        orthonormality=max((r.worst("orthonormality") for r in [best, *runs]), default=math.nan),
        failure=best.failure,
    )


def _exclusion(result: Result, *, infeasible: bool) -> str:
    if result.failure:
        return f"raised on {result.problem}: {result.failure}"
    if result.leak > LEAK:
        return f"leaves the complement on {result.problem}: |Fᵀx| = {result.leak:.1e}"
    if result.orthonormality > LEAK and not infeasible:
        return f"leaves the manifold on {result.problem}: |xᵀx − I| = {result.orthonormality:.1e}"
    return ""


@dataclass(frozen=True)
class Recipe:
    """The arguments of `entrants`: every process makes its own entrants from them."""

    plugins: tuple[Any, ...]
    problems: tuple[str, ...]
    only: tuple[str, ...]
    everything: bool

    def entrants(self) -> Entrants:
        """The entrants."""
        return entrants(**vars(self))


def _all(
    pairs: Sequence[tuple[str, int]], field: Entrants, budget: Budget, jobs: int, recipe: Recipe
) -> Iterator[tuple[tuple[str, int], Result, float]]:
    """The result of every pair and the CPU seconds that it took, in any order."""
    if jobs == 1:
        for pair in pairs:
            yield _one(pair, field, budget)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        futures = [pool.submit(_in_process, pair, budget, recipe) for pair in pairs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _one(pair: tuple[str, int], field: Entrants, budget: Budget) -> tuple[tuple[str, int], Result, float]:
    began = time.thread_time()
    contestant = next(c for c in field.contestants if c.label == pair[0])
    result = measure(contestant, field.problems[pair[1]], budget)
    return pair, result, time.thread_time() - began


@cache
def _entrants_of(recipe: Recipe) -> Entrants:
    """The entrants of a worker process."""
    return recipe.entrants()


def _in_process(pair: tuple[str, int], budget: Budget, recipe: Recipe) -> tuple[tuple[str, int], Result, float]:
    return _one(pair, _entrants_of(recipe), budget)


def _plain(result: Result, gap: float) -> dict[str, Any]:
    costs = {unit: [c if math.isfinite(c) else None for c in result.costs(gap, unit)] for unit in UNITS}
    finite = {unit: [c for c in values if c is not None] for unit, values in costs.items()}
    return {
        "contestant": result.contestant,
        "problem": result.problem,
        "rate": result.rate,
        "horizon": result.horizon,
        "at_edge": result.at_edge,
        "to_gap": costs,
        "median": {
            unit: statistics.median(values) if len(values) == len(costs[unit]) else None
            for unit, values in finite.items()
        },
        "last_gaps": [run.last_gap if math.isfinite(run.last_gap) else None for run in result.runs],
        "leak": _finite(result.leak),
        "orthonormality": _finite(result.orthonormality),
        "failure": result.failure,
        "curve": [_row(entry) for entry in thinned(result.runs[0].entries)],
    }


def thinned(entries: Sequence[Entry]) -> list[Entry]:
    """At most `POINTS_PER_CURVE` entries, dense at the start, the last one included."""
    count = len(entries)
    if count <= POINTS_PER_CURVE:
        return list(entries)
    places = {round(count ** (i / (POINTS_PER_CURVE - 1))) - 1 for i in range(POINTS_PER_CURVE)}
    return [entries[place] for place in sorted(places)]


def _row(entry: Entry) -> list[float | None]:
    numbers = (entry.evaluations, entry.seconds, entry.gap, entry.orthonormality, entry.leak)
    return [_finite(float(f"{number:.4g}")) for number in numbers]


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
