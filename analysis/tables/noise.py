"""Spectra against random factors, and the tails of spectra."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch

from analysis.adapters.adapter_set import AdapterSet
from analysis.adapters.batches import MEMORY_BUDGET, Progress, layer_batches
from analysis.names import block_of, module_of
from analysis.statistics.noise import Array, NoiseLaws, ProductNull
from analysis.statistics.nulls import holm
from analysis.statistics.tails import tail_exponent
from analysis.tables.frames import in_order
from analysis.tables.spectrum_table import ROUNDING, Spectra, batch_spectra

FACTORED = ("eblora", "factors", "kohya", "lora", "stella")
"""Kinds of adapters whose update is a product of two tall factors: those with a law."""
LEVEL = 0.05
"""Probability that the directions of any layer of a task are counted too high."""
NOISE_COLUMNS = [
    *("task", "layer", "module", "block", "rank", "spike", "chance", "high", "edge"),
    *("p", "p_holm", "beyond"),
]
TAIL_COLUMNS = [
    *("task", "update", "layer", "module", "block", "exponent", "ci_low", "ci_high"),
    *("start", "count", "p", "reason"),
]


def noise_table(
    adapters: AdapterSet,
    device: torch.device | str = "cpu",
    *,
    memory_budget: int = MEMORY_BUDGET,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Tidy comparison of every update with a product of random factors of its shape and rank, one row per layer.

    ``spike`` is ``r p₁ = σ₁² / mean(σ²)``, 1 for a flat spectrum. ``chance``, ``high`` and ``p`` are its mean, its 95 %
    quantile and the probability of at least this value for random factors, ``edge`` the limit of its law for large
    sizes, ``p_holm`` adjusted over the layers of a task. ``beyond`` counts the leading directions that no noise
    explains: with probability 0.95 it is too high in no layer of the task. Law and tests: docs/analysis-noise.md.

    ``rank`` counts singular values above float32 rounding. Updates of rank one, and updates that are no product of two
    tall factors (differences of checkpoints, DoRA, OSF), have no law: NaN. Zero updates have no row.

    Args:
        adapters: the updates.
        device: where they are decomposed.
        memory_budget: bytes; the memory needed does not grow with the number of layers.
        progress: called with the number of finished layers and of all layers.

    >>> draw = torch.Generator().manual_seed(1)
    >>> left, right = torch.randn(64, 8, generator=draw), torch.randn(64, 8, generator=draw)
    >>> spiked = left * torch.tensor([5.0] + [1.0] * 7)
    >>> table = noise_table(AdapterSet.from_factors({"a": {"noise": (left, right), "spike": (spiked, right)}}))
    >>> table["beyond"].tolist(), table["spike"].round(1).tolist(), table["edge"].round(1).tolist()
    ([0, 1], [1.8, 5.9], [2.3, 2.3])
    """
    batches = layer_batches(adapters, device=device, memory_budget=memory_budget, progress=progress)
    return noise_frame(adapters, [batch_spectra(batch) for batch in batches])


def noise_frame(adapters: AdapterSet, spectra: Spectra) -> pd.DataFrame:
    """The table of `noise_table`."""
    laws = NoiseLaws()
    rows: list[tuple[object, ...]] = []
    for position, (task, kind) in enumerate(zip(adapters.tasks, adapters.kinds, strict=True)):
        for shape, by_layer in _by_shape(adapters, task, position, spectra).items():
            m, n, rank = shape
            sigma = np.stack(list(by_layer.values()))
            spike = rank * (sigma[:, 0] ** 2 / (sigma**2).sum(1))
            if kind not in FACTORED or rank < 2:
                nan = [np.nan] * len(sigma)
                rows += list(zip([task] * len(sigma), by_layer, [rank] * len(sigma), spike, *[nan] * 5, strict=True))
                continue
            # Bonferroni over layers; within a layer, a test is made only after all before it were significant
            level = LEVEL / len(adapters.layers)
            steps = list(laws.p_values(sigma, m, n, level=level))
            beyond = np.sum([step <= level for step in steps], axis=0)
            law, edge = laws.largest(m, n, rank), ProductNull(m, n, rank).edge
            for index, layer in enumerate(by_layer):
                chance = (float(law.mean()), float(law.ppf(0.95)), edge)
                rows.append((task, layer, rank, spike[index], *chance, steps[0][index], beyond[index]))
    columns = ["task", "layer", "rank", "spike", "chance", "high", "edge", "p", "beyond"]
    numbers = dict.fromkeys(["spike", "chance", "high", "edge", "p"], "float64")
    table = pd.DataFrame(rows, columns=columns).astype({**numbers, "rank": "int64"})
    table["beyond"] = table["beyond"].astype("float64").astype("Int64")
    table["p_holm"] = table.groupby("task", sort=False)["p"].transform(lambda p: holm(p))
    return _described(table, adapters)[NOISE_COLUMNS]


def _by_shape(
    adapters: AdapterSet, task: str, position: int, spectra: Spectra
) -> Mapping[tuple[int, int, int], dict[str, Array]]:
    """(m, n, numerical rank) to layer to its singular values above rounding; without zero updates."""
    groups: dict[tuple[int, int, int], dict[str, Array]] = {}
    for layers, by_update in spectra:
        for layer, values in zip(layers, by_update["task"][position], strict=True):
            rank = int((values > ROUNDING * values.max()).sum())
            if rank:
                m, n, _ = adapters.shape(task, layer)
                groups.setdefault((m, n, rank), {})[layer] = np.sort(values)[::-1][:rank]
    return groups


def tail_table(
    adapters: AdapterSet,
    device: torch.device | str = "cpu",
    *,
    samples: int = 200,
    seed: int = 0,
    memory_budget: int = MEMORY_BUDGET,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Tidy exponents of the spectra's tails: task, update, layer, exponent, interval, p, and why one is missing.

    `update` is ``"task"`` or ``"accumulated"`` as in `singular_values`. An exponent needs 50 singular values and a
    power law that fits: adapters of rank 16 have none, and `reason` states it. See `analysis.statistics.tail_exponent`.

    Args:
        adapters: the updates.
        device: where they are decomposed.
        samples: synthetic spectra for each p-value.
        seed: seed of these.
        memory_budget: bytes; the memory needed does not grow with the number of layers.
        progress: called with the number of finished layers and of all layers.
    """
    batches = layer_batches(adapters, device=device, memory_budget=memory_budget, progress=progress)
    rows = []
    for layers, by_update in map(batch_spectra, batches):
        for update, by_task in by_update.items():
            for task, values in zip(adapters.tasks, by_task, strict=True):
                for layer, sigma in zip(layers, values, strict=True):
                    fit = tail_exponent(sigma, samples=samples, seed=seed)
                    numbers = (fit.exponent, fit.low, fit.high, fit.start, fit.count, fit.p, fit.reason)
                    rows.append((task, update, layer, *numbers))
    columns = [column for column in TAIL_COLUMNS if column not in ("module", "block")]
    return _described(pd.DataFrame(rows, columns=columns), adapters)[TAIL_COLUMNS]


def _described(table: pd.DataFrame, adapters: AdapterSet) -> pd.DataFrame:
    table["module"] = table["layer"].map(module_of)
    table["block"] = pd.array([block_of(layer) for layer in table["layer"]], dtype="Int64")
    orders = {"task": adapters.tasks, "update": ("task", "accumulated"), "layer": adapters.layers}
    return in_order(table, {column: order for column, order in orders.items() if column in table})
