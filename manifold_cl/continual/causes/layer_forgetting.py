"""Forgetting of a finished run, divided among layers, and the effect of each layer's update on old inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from manifold_cl.adapters.layers import target_linears
from manifold_cl.adapters.low_rank import Factors
from manifold_cl.continual.causes.changed_updates import FinishedRun, added, evaluated_on, open_results, singular_values
from manifold_cl.continual.runner import ContinualRunner
from manifold_cl.continual.subspaces import hooked
from manifold_cl.continual.task import Split, Task
from manifold_cl.files import write_json
from manifold_cl.lists import listed

FORMAT = "manifold_cl.layer_forgetting"
SIMPSON = ((0.0, 1 / 6), (0.5, 4 / 6), (1.0, 1 / 6))
"""Points on the line from the old to the new weights, and their weights."""


@dataclass
class LayerSums:
    """Sums over one task's tokens in one layer, for one update.

    Args:
        update: factors of ΔW.
        weight: W (m, n) before the update.
        basis: orthonormal basis (n, r) of the update's input directions.
    """

    update: Factors
    weight: Tensor
    basis: Tensor
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, x: Tensor, d: Tensor, weight: float, *, old: bool) -> None:
        """Add the tokens (tokens, n) with output gradients (tokens, m) at one point, and the rest where ``old``."""
        size = d.square().sum(dim=1)
        live = size > 0  # padding has no gradient
        x, d, size = x[live], d[live], size[live]
        change = self.update.apply(x)
        values = {"effect": weight * (change * d).sum()}
        if old:
            energy, read = x.square().sum(dim=1), (x @ self.basis).square().sum(dim=1)
            values |= {"energy": energy.sum(), "read": read.sum(), "change": change.square().sum()}
            values |= {"sensitive": (size * energy).sum(), "sensitive_read": (size * read).sum()}
            values |= {"output": (x @ self.weight.mT).square().sum()}
        for key, value in values.items():
            self.sums[key] = self.sums.get(key, 0.0) + float(value)

    def row(self) -> dict[str, float]:
        """The measurements of a layer, as in `measure_layers`."""
        s = self.sums
        return {
            "effect": s["effect"],
            "overlap": s["sensitive_read"] / s["sensitive"],
            "overlap_inputs": s["read"] / s["energy"],
            "drift": s["change"] / s["output"],
        }


def measure_layers(
    runner: ContinualRunner,
    path: Path | str,
    *,
    split: Split = "validation",
    batch_size: int = 32,
    on_cell: Callable[[str, str], None] | None = None,
) -> dict[str, Any]:
    """Divide the change of each earlier task's loss by each later update among the layers, and measure the updates.

    The change of a loss from W to W + ΔW is the integral of its slope along the line between them, and the slope is a
    sum over layers: ``∫ Σ_layer ⟨∂L/∂W_layer, ΔW_layer⟩ ds``. Simpson's rule takes three points of the line. Results
    are written per pair of tasks; the same call continues an interrupted one.

    Args:
        runner: of a complete run whose folder has the updates.
        path: of the JSON file with the results.
        split: whose examples are read.
        batch_size: examples per backward pass.
        on_cell: called with (task, earlier task) before a pair is measured.

    Returns:
        The content of the file. ``spectra`` holds task → layer → singular values; ``pairs`` holds task → earlier task
        (and the task itself) → ``before`` and ``after``, the losses, and per layer: ``effect``, its part of the change
        of the loss; ``overlap``, the share of the earlier task's input energy, weighted by squared loss gradients as in
        the memory, that lies in the update's input directions, and ``overlap_inputs`` without weights; ``drift``, the
        energy of ΔW x over that of W x.

    Raises:
        FileError: for an incomplete run, or a file with results of another run or split.
        ValueError: for a layer that no loss gradient of a task reached.
    """
    run, path, tasks = FinishedRun(runner), Path(path), runner.stream.tasks
    content = open_results(path, FORMAT, {**run.head(), **evaluated_on(runner, split)}, rows="pairs")
    content.setdefault("spectra", {})
    for index, model in run.models():
        task, update = tasks[index], run.update(index)
        content["spectra"].setdefault(task.name, {name: singular_values(f).tolist() for name, f in update.items()})
        pairs = content["pairs"].setdefault(task.name, {}) if index else {}
        for old in tasks[: index + 1] if index else ():
            if old.name in pairs:
                continue
            if on_cell is not None:
                on_cell(task.name, old.name)
            pairs[old.name] = _pair(model, old, update, split, batch_size)
            write_json(path, content)
    return content


def _pair(model: nn.Module, task: Task, update: Mapping[str, Factors], split: Split, batch_size: int) -> dict[str, Any]:
    """The measurements of one update on one task."""
    layers = {name: layer for name, layer in target_linears(model, list(update)).items() if name in update}
    sums = {
        name: LayerSums(update[name], layer.weight.detach().clone(), torch.linalg.qr(update[name].right).Q)  # type: ignore[operator]
        for name, layer in layers.items()
    }
    losses = {}
    for point, weight in SIMPSON:

        def take(name: str, x: Tensor, d: Tensor, call: Any, point: float = point, weight: float = weight) -> None:
            sums[name].add(x, d, weight, old=not point)

        with added(model, update, point), hooked(layers, take):
            losses[point] = 0.0
            for loss in _losses(model, task, split, batch_size):
                loss.backward()  # type: ignore[no-untyped-call]
                losses[point] += float(loss.detach())
    if silent := [name for name, each in sums.items() if not each.sums.get("sensitive")]:
        raise ValueError(
            f"no loss gradient of {task.name} reached {listed(silent, 5)}, or its inputs are zero: "
            "train with targets that every task uses"
        )
    return {"before": losses[0.0], "after": losses[1.0], "layers": {name: each.row() for name, each in sums.items()}}


def _losses(model: nn.Module, task: Task, split: Split, batch_size: int) -> Iterator[Tensor]:
    """Losses of the batches, whose sum is the mean loss over all examples."""
    total = task.size(split)
    for number, batch in enumerate(task.batches(split, batch_size=batch_size)):
        yield task.loss(model, batch) * (min(batch_size, total - number * batch_size) / total)
