"""Every public figure with one, two, three and fifteen methods or tasks, and with long names, has no layout faults."""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from figure_layout import faults
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import (
    AdapterSet,
    Record,
    StudyResults,
    forgetting_panels,
    interference_table,
    plot_accuracy_matrix,
    plot_entropy_map,
    plot_forgetting,
    plot_imbalance,
    plot_interference,
    plot_leakage,
    plot_principal_angles,
    plot_spectra,
    plot_study,
    plot_trade_off,
    spectra_panels,
)
from analysis.plots import plot_capacity, plot_change, plot_cost

METHODS = (
    *("sequential_merge", "eblora", "gpm", "keeplora", "inflora", "olora", "restricted", "balanced", "svd_eq"),
    *("stella-diagonal", "stella-full", "eblora-official", "sequential", "zero_shot", "joint"),
)
TASKS = (
    *("newsgroups", "nouns", "reuters", "movies", "verbs", "authors", "imagenet", "caltech", "satellites", "flowers"),
    *("textures", "food", "pets", "aircraft", "vizwiz-caption"),
)
LAYERS = {"model.layer.0.query": (48, 40), "model.layer.0.mlp": (80, 40), "model.layer.10.query": (48, 40)}
SIZES = {"one": 1, "two": 2, "three": 3, "fifteen": 15, "long names": 3}

FAST = ("two", "fifteen")
CASES = [pytest.param(size, marks=() if size in FAST else pytest.mark.slow) for size in SIZES]
"""A second per figure: the fast suite has the ordinary case and the worst one."""


def names_of(size: str, names: tuple[str, ...]) -> tuple[str, ...]:
    long = tuple(f"a-rather-long-name-of-{name}-{name}" for name in names)
    return (long if size == "long names" else names)[: SIZES[size]]


def record_of(method: str, tasks: tuple[str, ...], seed: int, protects: bool = True) -> Record:
    draw = np.random.default_rng(seed)
    count = len(tasks)
    learned = draw.uniform(50, 95, count)
    since = np.clip(np.arange(count)[:, None] - np.arange(count), 0, None)
    matrix = np.where(np.tri(count, dtype=bool), learned - since * draw.uniform(-1, 4), draw.uniform(20, 60, count))
    capacity = [{"mean_fraction": 0.9 * (t + 1) / count, "max_fraction": 0.95 * (t + 1) / count} for t in range(count)]
    return Record(
        folder=Path(method),
        name=method,
        method=method,
        stream="toy",
        status="complete",
        tasks=tasks,
        primary="accuracy",
        metrics={},
        config={},
        zero_shot={"accuracy": draw.uniform(20, 60, count)},
        accuracy={"accuracy": matrix + draw.normal(0, 1.0, (count, count))},
        capacity=tuple(capacity) if protects else (),
    )


def records(methods: tuple[str, ...], tasks: tuple[str, ...]) -> Mapping[str, Record]:
    return {method: record_of(method, tasks, seed) for seed, method in enumerate(methods)}


@cache
def adapters(tasks: tuple[str, ...], seed: int = 0) -> AdapterSet:
    draw = torch.Generator().manual_seed(seed)

    def factors(m: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        decay = torch.logspace(0, -1 - seed % 3, 4)
        return torch.randn(m, 4, generator=draw) * decay, torch.randn(n, 4, generator=draw)

    return AdapterSet.from_factors({t: {layer: factors(m, n) for layer, (m, n) in LAYERS.items()} for t in tasks})


@cache
def interference(tasks: tuple[str, ...], seed: int = 0) -> pd.DataFrame:
    found = adapters(tasks, seed)
    return interference_table(found, protected={name: torch.eye(40)[:, :2] for name in found.layers})


def scatter(methods: tuple[str, ...]) -> pd.DataFrame:
    draw = np.random.default_rng(0)
    groups = [
        pd.DataFrame({"run": name, "imbalance": draw.uniform(0, 0.5, 6), "forgetting": draw.normal(3, 4, 6)})
        for name in methods
    ]
    return pd.concat(groups, ignore_index=True)


OF_TASKS: Mapping[str, Callable[[tuple[str, ...]], Axes | Figure]] = {
    "accuracy matrix": lambda tasks: plot_accuracy_matrix(
        record_of("a", tasks, 0).matrix, tasks, zero_shot=np.full(len(tasks), 50.0)
    ),
    "panels of scores": lambda tasks: forgetting_panels(records(METHODS[:2], tasks)),
    "forgetting": lambda tasks: plot_forgetting(records(METHODS[:2], tasks)),
    "capacity": lambda tasks: plot_capacity(records(METHODS[:1], tasks)),
    "spectra": lambda tasks: plot_spectra(adapters(tasks)),
    "narrow panels": lambda tasks: forgetting_panels(records(METHODS[:2], tasks[:6]), columns=2),
    "panels of spectra": lambda tasks: spectra_panels({m: adapters(tasks, i) for i, m in enumerate(METHODS[:2])}),
    "map of tasks": lambda tasks: plot_entropy_map(adapters(tasks), columns="task"),
}
OF_PAIRS: Mapping[str, Callable[[tuple[str, ...]], Axes | Figure]] = {
    "alignment": lambda tasks: plot_interference(interference(tasks)),
    "overlap": lambda tasks: plot_interference(interference(tasks), metric="input_overlap"),
    "leakage matrix": lambda tasks: plot_interference(interference(tasks), metric="leakage"),
    "angles": lambda tasks: plot_principal_angles(adapters(tasks)),
    "leakage": lambda tasks: plot_leakage({m: interference(tasks, i) for i, m in enumerate(METHODS[:2])}),
}
OF_METHODS: Mapping[str, Callable[[tuple[str, ...]], Axes | Figure]] = {
    "panels of methods": lambda methods: forgetting_panels(records(methods, TASKS[:3])),
    "forgetting of methods": lambda methods: plot_forgetting(records(methods, TASKS[:6])),
    "one task of methods": lambda methods: plot_forgetting(records(methods, TASKS[:6]), task="nouns"),
    "capacity of methods": lambda methods: plot_capacity(records(methods, TASKS[:6])),
    "spectra of methods": lambda methods: spectra_panels({m: adapters(TASKS[:2], i) for i, m in enumerate(methods)}),
    "leakage of methods": lambda methods: plot_leakage({m: interference(TASKS[:3], i) for i, m in enumerate(methods)}),
    "imbalance": lambda methods: plot_imbalance(scatter(methods)),
}
OF_STUDIES: Mapping[str, Callable[[StudyResults], Axes | Figure]] = {
    "trade-off": plot_trade_off,
    "change": plot_change,
    "cost": plot_cost,
    "study": plot_study,
    "narrow study": lambda study: plot_study(study, narrow=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("size", CASES)
@pytest.mark.parametrize("kind", OF_TASKS)
def test_figures_of_tasks(kind: str, size: str) -> None:
    assert faults(OF_TASKS[kind](names_of(size, TASKS))) == []


@pytest.mark.parametrize("size", CASES[1:])
@pytest.mark.parametrize("kind", OF_PAIRS)
def test_figures_of_pairs_of_tasks(kind: str, size: str) -> None:
    assert faults(OF_PAIRS[kind](names_of(size, TASKS))) == []


@pytest.mark.slow
@pytest.mark.parametrize("size", CASES)
@pytest.mark.parametrize("kind", OF_METHODS)
def test_figures_of_methods(kind: str, size: str) -> None:
    assert faults(OF_METHODS[kind](names_of(size, METHODS))) == []


def study_of(size: str, folder: Path, write_study: Callable[..., Path]) -> StudyResults:
    """Methods that crowd at the top, as good ones do, with intervals of three seeds."""
    draw = np.random.default_rng(4)
    runs, stored = {}, {}
    for label in names_of(size, METHODS):
        fresh, loss = draw.normal(74, 1.5), draw.exponential(6)
        levels = [fresh + draw.normal(0, 0.5) for _ in range(3)]
        runs[label] = [[[a, 40, 30], [a - loss, a, 30], [a - loss, a - loss, a]] for a in levels]
        stored[label] = {"updates": 16e6, "state": draw.choice([0.0, 4e7]), "old_examples": 120 * (label == "joint")}
    return StudyResults.load(write_study(folder, runs, stored=stored))


@pytest.mark.slow
@pytest.mark.parametrize("size", CASES)
@pytest.mark.parametrize("kind", OF_STUDIES)
def test_figures_of_studies(kind: str, size: str, tmp_path: Path, write_study: Callable[..., Path]) -> None:
    assert faults(OF_STUDIES[kind](study_of(size, tmp_path, write_study))) == []
