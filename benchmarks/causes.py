"""Causes of forgetting, set one by one: changed updates of finished runs, and parts of layers (docs/causes.md).

Every step continues where it was interrupted, and writes one JSON file per run:

python benchmarks/causes.py spectra studies/causes-updates    # sizes and shapes of updates
python benchmarks/causes.py change studies/causes-updates     # evaluates changed updates
python benchmarks/causes.py layers studies/causes-updates     # divides forgetting among layers
python benchmarks/causes.py page                              # tables, figures and docs/causes.md from the files
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from analysis import AdapterSet, flattened, levelled, redirected, scaled, sharpened, truncated
from manifold_cl.adapters.low_rank import Factors
from manifold_cl.continual.causes import Change, evaluate_changes, measure_layers, summarise_updates
from manifold_cl.files import FileError
from manifold_cl.study import StudyPlan

RESULTS = Path(__file__).parent / "results" / "causes"
SHAPED = "sequential_merge"
"""The label whose updates get other spectra and other directions."""
NORMS = ("frobenius", "spectral", "nuclear")
FACTORS = (0.35, 0.5, 0.71, 1.41, 2.0)


def shapes() -> dict[str, Callable[[AdapterSet], AdapterSet]]:
    """Name → a change of shape or directions, the informative ones first."""
    changes: dict[str, Callable[[AdapterSet], AdapterSet]] = {}
    for norm in NORMS:
        changes[f"flatten 1 {norm}"] = partial(flattened, gamma=1.0, norm=norm)
        changes[f"sharpen 1 {norm}"] = partial(sharpened, gamma=1.0, norm=norm)
    for side in ("both", "input", "output"):
        changes[f"redirect {side}"] = partial(redirected, side=side)
    for norm in NORMS:
        changes[f"flatten 0.5 {norm}"] = partial(flattened, gamma=0.5, norm=norm)
        changes[f"sharpen 0.5 {norm}"] = partial(sharpened, gamma=0.5, norm=norm)
        for rank in (8, 4, 1):
            changes[f"truncate {rank} {norm}"] = partial(truncated, rank=rank, norm=norm)
    return changes


def sizes() -> dict[str, Callable[[AdapterSet], AdapterSet]]:
    """Name → a change of size alone, of all layers by one factor or so that they have one norm."""
    return {"level 1": partial(levelled, gamma=1.0)} | {
        f"scale {factor:g}": partial(scaled, factor=factor) for factor in FACTORS
    }


def as_change(change: Callable[[AdapterSet], AdapterSet]) -> Change:
    """The change of an adapter set as one of a task's update."""

    def apply(task: str, update: Mapping[str, Factors]) -> dict[str, Factors]:
        adapters = AdapterSet.from_factors({task: update})
        return {
            layer: Factors(left, right, torch.ones(())) for _, layer, left, right in change(adapters).read(task, update)
        }

    return apply


def each_run(options: argparse.Namespace, kind: str, measure: Callable[[Any, str, Path], Any]) -> None:
    """Measure every finished run of a study and name those that have begun; FileError if none has finished."""
    plan = StudyPlan.load(options.study)
    torch.set_num_threads(plan.threads)
    finished = 0
    for cell in plan.cells:
        if options.cells and not any(part in cell.name for part in options.cells):
            continue
        if not (options.study / "cells" / cell.name / "record.json").exists():
            continue
        runner = plan.make_runner(cell, options.study)
        try:
            measure(runner, cell.label, options.out / kind / f"{cell.name}.json")
        except FileError as error:
            print(f"skipped: {cell.name}: {error}", flush=True)
        else:
            finished += 1
    if not finished:
        chosen = f" among --cells {' '.join(options.cells)}" if options.cells else ""
        raise FileError(
            f"{options.study} has no finished run with its updates{chosen}: run the study first, or choose from "
            f"{', '.join(cell.name for cell in plan.cells)}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["spectra", "change", "layers", "page"])
    parser.add_argument("study", nargs="?", type=Path, help="folder of a study whose run folders hold the updates")
    parser.add_argument("--cells", nargs="*", default=[], help="parts of the names of cells; all by default")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    if options.step != "page" and options.study is None:
        parser.error(f"{options.step} needs the folder of a study")

    def show(*cell: str) -> None:
        print(*cell, sep=": ", flush=True)

    def change(runner: Any, label: str, path: Path) -> None:
        changes = {**(shapes() if label == SHAPED else {}), **sizes()}
        evaluate_changes(runner, {name: as_change(each) for name, each in changes.items()}, path, on_cell=show)

    try:
        if options.step == "spectra":
            each_run(options, "spectra", lambda runner, _, path: summarise_updates(runner, path))
        elif options.step == "change":
            each_run(options, "changed", change)
        elif options.step == "layers":
            each_run(options, "layers", lambda runner, _, path: measure_layers(runner, path, on_cell=show))
        else:
            import causes_page

            causes_page.write(options.out)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
