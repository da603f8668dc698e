"""Evaluation of a finished run's updates after one of them was changed: the effect of the change, without training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from manifold_cl.adapters import read_adapters
from manifold_cl.adapters.inject import merge_factors
from manifold_cl.adapters.low_rank import Factors
from manifold_cl.continual.record import RunRecord
from manifold_cl.continual.run_folder import RunFolder
from manifold_cl.continual.runner import ContinualRunner
from manifold_cl.continual.task import Split
from manifold_cl.files import VERSION, FileError, read_json, write_json

FORMAT, SPECTRA = "manifold_cl.changed_updates", "manifold_cl.update_spectra"
Change = Callable[[str, Mapping[str, Factors]], Mapping[str, Factors]]
"""(task, its update per layer) → the changed update."""


@dataclass(frozen=True)
class FinishedRun:
    """A complete run, its tasks and its updates.

    Args:
        runner: of the run's stream, method and folder.

    Raises:
        FileError: for a run that is not complete.
    """

    runner: ContinualRunner

    def __post_init__(self) -> None:
        if (status := self.record.status) != "complete":
            raise FileError(f"{self.runner.folder} is {status}: finish the run first, with the same command")

    @property
    def record(self) -> RunRecord:
        """The run's record."""
        return RunRecord.load(self.runner.folder)

    def head(self) -> dict[str, Any]:
        """The entries by which a file of results belongs to this run."""
        runner = self.runner
        return {
            "run": self.record.identity,
            "method": runner.method.name,
            "stream": runner.stream.name,
            "tasks": list(runner.stream.task_names),
            "seed": runner.training.seed,
        }

    def update(self, index: int) -> dict[str, Factors]:
        """Layer → update of task number ``index``."""
        names = self.runner.stream.task_names
        return read_adapters(RunFolder(self.runner.folder, names).task(index))

    def models(self) -> Iterator[tuple[int, nn.Module]]:
        """(index, the model from which this task was trained), one model that is changed between the items."""
        model = self.runner.loop.place(self.runner.stream.make_model(), self.runner.device)
        for index in range(len(self.runner.stream.tasks)):
            yield index, model
            merge_factors(model, self.update(index))


@contextmanager
def added(model: nn.Module, update: Mapping[str, Factors], share: float = 1.0) -> Iterator[None]:
    """A context in which ``share`` of an update is added to the weights; they are put back bit for bit."""
    weights = {name: model.get_submodule(name).get_parameter("weight") for name in update}
    saved = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        merge_factors(model, {n: Factors(f.left, f.right, share * f.magnitude) for n, f in update.items()})
        yield
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(saved[name])


def evaluate_changes(
    runner: ContinualRunner,
    changes: Mapping[str, Change],
    path: Path | str,
    *,
    split: Split = "validation",
    on_cell: Callable[[str, str], None] | None = None,
) -> dict[str, Any]:
    """Evaluate all tasks so far after each task but the first, with its update changed and all earlier ones as trained.

    Nothing is trained. Of one task's cells only the update of this task differs, so that differences between them are
    effects of the change. Results are written after each cell; the same call continues an interrupted one, and adds
    new changes.

    Args:
        runner: of a complete run whose folder has the updates.
        changes: name → change. ``before``, the model without the task's update, and ``trained``, the update as it is,
            are always evaluated.
        path: of the JSON file with the results.
        split: whose examples are scored.
        on_cell: called with (task, change) before a cell is evaluated.

    Returns:
        The content of the file. ``cells`` holds task → change → ``score`` (percent) and ``loss`` of all tasks up to
        this one, in the order of the stream, and ``spectrum``, the `spectrum_summary` of the changed update.

    Raises:
        FileError: for an incomplete run, or a file with results of another run or split.
    """
    run, path = FinishedRun(runner), Path(path)
    names = runner.stream.task_names
    content = open_results(path, FORMAT, {**run.head(), **evaluated_on(runner, split)})
    every: dict[str, Change] = {"before": lambda task, update: {}, "trained": lambda task, update: update, **changes}
    for index, model in run.models():
        cells = content["cells"].setdefault(names[index], {}) if index else {}
        for name, change in every.items() if index else ():
            if name in cells:
                continue
            if on_cell is not None:
                on_cell(names[index], name)
            trained = run.update(index)
            changed = change(names[index], trained)
            with added(model, changed):
                rows = [task.measure(model, split) for task in runner.stream.tasks[: index + 1]]
            cells[name] = {key: [row[key] for row in rows] for key in ("score", "loss")}
            cells[name]["spectrum"] = spectrum_summary(changed, {layer: f.rank for layer, f in trained.items()})
            write_json(path, content)
    return content


def evaluated_on(runner: ContinualRunner, split: Split) -> dict[str, Any]:
    """The entries by which a file of results belongs to these examples."""
    return {"split": split, "examples": [task.size(split) for task in runner.stream.tasks]}


def summarise_updates(runner: ContinualRunner, path: Path | str) -> dict[str, Any]:
    """Write the `spectrum_summary` of every task's update of a complete run, as ``updates`` of a JSON file.

    Nothing is evaluated. Raises FileError for an incomplete run, or a file with results of another one.
    """
    run, path = FinishedRun(runner), Path(path)
    content = open_results(path, SPECTRA, run.head(), rows="updates")
    for index, name in enumerate(runner.stream.task_names):
        update = run.update(index)
        content["updates"][name] = spectrum_summary(update, {layer: f.rank for layer, f in update.items()})
    write_json(path, content)
    return content


def singular_values(update: Factors) -> Tensor:
    """The singular values of an update, descending, in float64, by thin QR of both factors."""
    left, right = (torch.linalg.qr(part.double()).R for part in (update.weighted_left(), update.right))
    values: Tensor = torch.linalg.svdvals(left @ right.mT)
    return values


def spectrum_summary(update: Mapping[str, Factors], ranks: Mapping[str, int]) -> dict[str, float]:
    """Shape and size of an update; empty for no update.

    ``entropy`` is the mean over layers of ``−Σ p log p / log r``, of the energies p = σ² / Σσ² with the layer's r in
    ``ranks``; 1 is flat. ``between_layers`` is the same of the layers' shares of the energy; 1 if all have one norm.
    ``frobenius`` is the root of the mean of ``‖ΔW‖_F²``; ``spectral`` and ``nuclear`` are means.
    """
    sigmas = {layer: singular_values(factors) for layer, factors in update.items()}
    if not sigmas:
        return {}
    energies = torch.stack([sigma.square().sum() for sigma in sigmas.values()])
    entropies = [_entropy(sigma.square(), ranks[layer]) for layer, sigma in sigmas.items()]
    return {
        "entropy": sum(entropies) / len(entropies),
        "between_layers": _entropy(energies, len(energies)),
        "frobenius": float(energies.mean().sqrt()),
        "spectral": sum(float(sigma.max()) for sigma in sigmas.values()) / len(sigmas),
        "nuclear": sum(float(sigma.sum()) for sigma in sigmas.values()) / len(sigmas),
    }


def _entropy(energies: Tensor, count: int) -> float:
    """The entropy of shares of an energy over that of ``count`` equal ones; 1 for a single one."""
    p = energies / energies.sum()
    return float(torch.special.entr(p).sum()) / math.log(count) if count > 1 else 1.0


def open_results(path: Path, kind: str, head: Mapping[str, Any], rows: str = "cells") -> dict[str, Any]:
    """The results in a file, to be continued, or new ones; FileError for those of another run or other settings."""
    if not path.exists():
        return {"format": kind, "version": VERSION, **head, rows: {}}
    content = read_json(path, expected=kind)
    differing = [
        f"{key}: {content.get(key)!r} there, {value!r} here" for key, value in head.items() if content.get(key) != value
    ]
    if differing or not isinstance(content.get(rows), dict):
        raise FileError(
            f"{path} holds other results ({'; '.join(differing) or rows}): choose another file, or delete it"
        )
    return content
