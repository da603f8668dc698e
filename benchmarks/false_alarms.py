"""How often random updates are reported as related beyond chance, over simulations of complete sets of adapters.

    python benchmarks/false_alarms.py [--simulations 1000]

Each setting draws sets of updates whose directions are uniformly random, makes the tables of `analysis`, and counts the
sets with at least one finding beyond chance at the level of 5 %: any metric, any pair of tasks, all layers together or
any single layer, and any leading direction beyond random factors. Spectra that are given, not drawn, are beyond random
factors by construction, so that their leading directions are not counted. ``any_layer`` counts the sets where a test
without the common adjustment has an alarm: any ``p_holm`` below 0.05. Intervals are Wilson's, 95 %.

Settings that the file holds already, with the same options, are kept: an interrupted benchmark goes on. ``--again``
draws all of them.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from analysis import AdapterSet, AdapterTables
from analysis.report import Subject, find
from analysis.statistics import relations
from manifold_cl.continual.environment import library_versions, machine
from manifold_cl.files import write_json

LEVEL = 0.05
PAGES = 50
"""Simulations per setting whose findings are made as well: they take longer than the tables."""
SETTINGS: dict[str, dict[str, Any]] = {
    "Gaussian factors, rank 16 in 384": {"sizes": [(384, 384)], "rank": 16, "layers": 12, "tasks": 2},
    "flat, rank 8 in 256 and 128": {
        "sizes": [(256, 128), (128, 256)],
        "rank": 8,
        "layers": 12,
        "tasks": 2,
        "decay": 0.0,
    },
    "σ = 1/k, rank 16 in 384": {"sizes": [(384, 384)], "rank": 16, "layers": 12, "tasks": 2, "decay": 1.0},
    "σ = 1/k², rank 8 in 128": {"sizes": [(128, 128)], "rank": 8, "layers": 12, "tasks": 2, "decay": 2.0},
    "rank 1 in 128": {"sizes": [(128, 128)], "rank": 1, "layers": 24, "tasks": 2},
    "Gaussian factors, 4 tasks": {"sizes": [(192, 192)], "rank": 4, "layers": 8, "tasks": 4},
    "16 protected directions": {"sizes": [(192, 192)], "rank": 8, "layers": 8, "tasks": 2, "protected": 16},
    "224 layers, rank 4 in 96": {"sizes": [(96, 96)], "rank": 4, "layers": 224, "tasks": 2},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=1000)
    parser.add_argument("--again", action="store_true", help="draw finished settings again")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "false-alarms.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {} if options.again else finished(options.out, options.simulations)
    for number, (name, setting) in enumerate(SETTINGS.items()):
        if name in found:
            continue
        began, draw = time.perf_counter(), torch.Generator().manual_seed(number)
        alarms, single = 0, 0
        for index in range(options.simulations):
            tables = simulated(draw, **setting)
            random_spectra = "decay" not in setting
            alarms += reported(tables, spikes=random_spectra, page=index < PAGES)
            spikes = random_spectra and bool((tables.noise["p_holm"] < LEVEL).any())
            single += spikes or bool((tables.against_chance["p_holm"] < LEVEL).any())
        rates = {"alarms": share(alarms, options.simulations), "any_layer": share(single, options.simulations)}
        found[name] = {**setting, **rates, "seconds": round(time.perf_counter() - began, 1)}
        print(name, found[name]["alarms"], found[name]["any_layer"], flush=True)
        # after each setting: an interrupted benchmark keeps the finished ones
        write_json(options.out, result(options.simulations, found))
    table = Table("setting", "false alarms", "95 %", "without adjustment")
    for name, row in found.items():
        rate, low, high = (f"{row['alarms'][key]:.1%}" for key in ("rate", "low", "high"))
        table.add_row(name, rate, f"{low} to {high}", f"{row['any_layer']['rate']:.1%}")
    Console().print(table)


def finished(path: Path, simulations: int) -> dict[str, Any]:
    """The settings of a file that were drawn as often, with the same options."""
    if not path.exists():
        return {}
    held = json.loads(path.read_text(encoding="utf-8"))
    if held["simulations"] != simulations:
        return {}
    plain = json.loads(json.dumps(SETTINGS))
    return {name: row for name, row in held["settings"].items() if plain.get(name, {}).items() <= row.items()}


def result(simulations: int, found: dict[str, Any]) -> dict[str, Any]:
    """What the file holds; `not_run` names the settings that are not finished."""
    return {
        "what": __doc__.splitlines()[0],
        "simulations": simulations,
        "level": LEVEL,
        "settings": {name: found[name] for name in SETTINGS if name in found},
        "not_run": [name for name in SETTINGS if name not in found],
        "versions": library_versions(),
        "machine": machine(),
    }


def simulated(
    draw: torch.Generator,
    *,
    sizes: list[tuple[int, int]],
    rank: int,
    layers: int,
    tasks: int,
    decay: float | None = None,
    protected: int = 0,
) -> AdapterTables:
    """Tables of random updates: Gaussian factors, or random frames with singular values ``k ** -decay``."""

    def factor(size: int) -> Tensor:
        gaussian = torch.randn(size, rank, generator=draw)
        return gaussian if decay is None else torch.linalg.qr(gaussian).Q

    sigma = torch.ones(rank) if decay is None else torch.arange(1.0, rank + 1) ** -decay
    shapes = {f"h.{layer}.q": sizes[layer % len(sizes)] for layer in range(layers)}
    factors = {
        f"task {task}": {name: (factor(m) * sigma, factor(n)) for name, (m, n) in shapes.items()}
        for task in range(tasks)
    }
    basis = {name: torch.linalg.qr(torch.randn(n, protected, generator=draw)).Q for name, (_, n) in shapes.items()}
    return AdapterTables(AdapterSet.from_factors(factors), protected=basis if protected else None)


def reported(tables: AdapterTables, *, spikes: bool, page: bool) -> bool:
    """Whether anything is beyond chance; with `page`, that the report's findings agree is checked too."""
    table = relations(tables.against_chance, tables.noise)
    beyond = table[table["p"] < LEVEL]
    found = [finding for finding in find([Subject("random", None, tables)]) if finding.beyond_chance] if page else []
    if page and bool(len(beyond)) != bool(found):
        raise AssertionError("the report's findings and the table of relations disagree")
    return bool(len(beyond if spikes else beyond[beyond["metric"] != "spike"]))


def share(count: int, total: int) -> dict[str, float]:
    """A rate with Wilson's interval."""
    z, rate = 1.959964, count / total
    middle = (rate + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * (rate * (1 - rate) / total + z**2 / (4 * total**2)) ** 0.5
    return {"count": count, "rate": rate, "low": max(0.0, middle - half), "high": middle + half}


if __name__ == "__main__":
    main()
