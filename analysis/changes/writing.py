"""Changed adapters as folders that PEFT loads."""

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analysis.adapters.adapter_set import AdapterSet
from analysis.adapters.interventions import changed_set
from analysis.formats import carried_over, write_lora, write_manifest
from analysis.names import listed


def for_layers(adapters: AdapterSet, change: Callable[[AdapterSet], AdapterSet], layers: Collection[str]) -> AdapterSet:
    """The adapters with a change of some layers; the others stay."""
    names = [layer for layer in adapters.layers if layer in layers]
    part = replace(adapters, sources=tuple(source.picked(names) for source in adapters.sources))
    changed = change(part)

    def factors(task: str, layer: str, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return changed.factors(task, layer) if layer in layers else (left, right)

    return changed_set(adapters, factors)


def write_changed(
    folder: Path, before: AdapterSet, after: AdapterSet, *, dtype: torch.dtype = torch.float32
) -> AdapterSet:
    """The changed adapters as they read back from `folder`, into which they are written.

    One task is a PEFT LoRA folder itself; several are one folder each, with ``tasks.json``. Ranks may differ between
    layers. What a PEFT folder of `before` holds beside its factors is kept: the base model's name, the kind of task,
    and modules and biases that were trained in full.

    Args:
        folder: exists or not; use `analysis.files.new_folder` around it to write all or nothing.
        before: the adapters that were changed.
        after: what they became.
        dtype: in which factors are stored. Half of the scale is on each side, so that their numbers have one size.

    Raises:
        ValueError: an embedding is tied to the model's output, to which PEFT would not add the update.
    """
    if after.tied:
        raise ValueError(
            f"{listed(sorted(after.tied))} is the model's output too, to which PEFT adds no embedding's update: "
            "leave it out (layers= with a pattern that does not find it)"
        )
    paths = [folder] if len(after.tasks) == 1 else [folder / f"{i:02d}" for i in range(1, len(after.tasks) + 1)]
    for path, task, source in zip(paths, after.tasks, before.sources, strict=True):
        updates = ((task, layer, *_balanced(left, right)) for _, layer, left, right in after.read(task, after.layers))
        kinds: Any = {"transposed": after.transposed, "embeddings": after.embeddings, "parameters": after.parameters}
        kinds["kernels"] = after.kernels
        write_lora(path, updates, carried=carried_over(source), dtype=dtype, **kinds)
    if len(paths) > 1:
        tasks = zip(after.tasks, paths, strict=True)
        write_manifest(folder, [{"name": task, "path": path.name} for task, path in tasks])
    return AdapterSet.load(*paths, tasks=after.tasks)


def _balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The factors with columns of equal norms on both sides; float32 keeps ``left rightᵀ`` to rounding."""
    norms = [torch.linalg.vector_norm(factor.double(), dim=0) for factor in (left, right)]
    scale = torch.where((norms[0] > 0) & (norms[1] > 0), (norms[1] / norms[0]).sqrt(), 1.0)
    return (left.double() * scale).float(), (right.double() / scale).float()
