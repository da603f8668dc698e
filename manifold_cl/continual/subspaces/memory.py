"""The memory: one protected subspace per layer, which grows task by task within its capacity."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from manifold_cl.adapters.base_layers import sides
from manifold_cl.adapters.identity import ModelIdentity
from manifold_cl.adapters.layers import named_linears, require_linear
from manifold_cl.continual.subspaces.capacity import POLICIES, LayerGrowth, Policy, validate_entries
from manifold_cl.continual.subspaces.layer_columns import Columns, GrowthOptions, grow_layer
from manifold_cl.continual.subspaces.memory_files import MEMORY, PACKED, SUFFIX, MemoryFile, require_memory
from manifold_cl.continual.subspaces.statistic import Importance
from manifold_cl.files import FileError, file_errors
from manifold_cl.geometry import ProtectedSubspace
from manifold_cl.geometry.subspace import ThresholdRule
from manifold_cl.lists import listed
from manifold_cl.rules import validate_kind, validate_whole
from manifold_cl.tensor_files import write_tensors

logger = logging.getLogger("manifold_cl")


@dataclass(frozen=True, eq=False)
class SubspaceMemory(Mapping[str, ProtectedSubspace]):
    """Layer name → protected subspace of its inputs. A value: growing returns a new memory.

    Args:
        subspaces: one per adapted layer.
        full: layers whose last growth was truncated, to leave room for an adapter.
        tasks: names of the tasks so far, in order.
        columns: layer → energies and origins of its columns.
        growth: layer → result of the last growth.
        model: the model it belongs to, if known.
        compact: columns are rounded to six bits per entry before anything is made orthogonal to them
            (`ProtectedSubspace.compacted`): files of a fifth of the size, for about 1e-3 of the energy.
    """

    subspaces: Mapping[str, ProtectedSubspace]
    full: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    columns: Mapping[str, Columns] = field(default_factory=dict)
    growth: Mapping[str, LayerGrowth] = field(default_factory=dict)
    model: ModelIdentity | None = None
    compact: bool = False

    @classmethod
    def empty(cls, sizes: Mapping[str, int] | Mapping[str, nn.Module], *, compact: bool = False) -> SubspaceMemory:
        """A memory that protects nothing, for a number of inputs per layer or for the linear layers themselves.

        Raises:
            TypeError: for a layer that is not linear, or a model in place of its layers.
        """
        remedy = "give target_linears(model, targets), or layer name → number of inputs"
        validate_kind("sizes", sizes, Mapping, remedy=remedy)
        inputs = {n: s if isinstance(s, int) else sides(require_linear(n, s))[1] for n, s in sizes.items()}
        return cls({name: ProtectedSubspace.empty(n) for name, n in inputs.items()}, compact=compact)

    def extended(
        self,
        importances: Mapping[str, Importance] | Iterable[tuple[str, Importance]],
        *,
        energy: float,
        rank: int,
        policy: Policy = "stop",
        threshold_rule: ThresholdRule = "inclusive",
        task: str = "",
    ) -> SubspaceMemory:
        """The memory that also protects the share ``energy`` of each layer's importance; old columns come first.

        A layer with fewer than ``rank`` free directions left is full: ``policy`` decides, and ``full``, ``growth`` and
        the log name it. Source: docs/method.md, "The energy rule" and "Capacity".

        Args:
            importances: layer → second moment (n, n) or `Directions`. An iterable is consumed layer by layer, so that
                those of a large model need not exist all at once.
            energy: threshold in (0, 1].
            rank: directions to keep free in every layer.
            policy: ``"stop"`` adds the columns that fit, ``"evict"`` drops those with least energy, ``"raise"``.
            threshold_rule: whether the column that crosses the threshold is added (`ThresholdRule`).
            task: name of the task. The name of the last task adds to that task.

        Raises:
            CapacityError: by policy; this memory is unchanged.
            ValueError: for an unknown layer, a rank beyond the number of inputs, or values that are not finite.
        """
        if policy not in POLICIES:
            raise ValueError(f"the policy for full layers is {', '.join(POLICIES)}, got {policy!r}")
        validate_whole("rank, the number of directions to keep free,", rank, least=0)
        task = task or f"task {len(self.tasks) + 1}"
        tasks = self.tasks if self.tasks[-1:] == (task,) else (*self.tasks, task)
        subspaces, columns, growth, full = dict(self.subspaces), dict(self.columns), dict(self.growth), []
        options = GrowthOptions(task, tasks, energy, rank, policy, threshold_rule, self.compact)
        before: tuple[Any, ...] = ()
        for name, importance in importances.items() if isinstance(importances, Mapping) else importances:
            if name not in subspaces:
                raise ValueError(f"the memory has no layer {name!r}: it holds {listed(subspaces, 5)}")
            old, history = subspaces[name], columns.get(name) or Columns.unknown(subspaces[name].k)
            present = (importance, old, history, self.growth.get(name))
            if not _same(before, present):  # layers that share a statistic share their subspace
                before, grown = present, grow_layer(name, old, history, importance, options)
            subspaces[name], columns[name] = grown.subspace, grown.columns
            growth[name] = grown.result.after(self.growth.get(name))
            if grown.result.full:
                full.append(name)
        if full:
            shown = listed(full)
            change = {"stop": "growth stopped", "evict": "the columns with least energy were dropped"}[policy]
            logger.warning("%s: %d of %d layers are full (%s): %s", task, len(full), len(subspaces), shown, change)
        return replace(self, subspaces=subspaces, full=tuple(full), tasks=tasks, columns=columns, growth=growth)

    def require_layers(self, layers: Iterable[str]) -> None:
        """Raise ValueError for layers that the memory lacks: their adapters would be free."""
        validate_entries(self, layers)

    def with_model(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> SubspaceMemory:
        """The same memory, marked as belonging to the model that has these layers."""
        return replace(self, model=ModelIdentity.of(model, layers))

    def differences(self, model: nn.Module) -> list[str]:
        """One line per layer that does not fit ``model``: absent, of another width, or with other weights."""
        linears = named_linears(model)
        layers = {name: linears[name] for name in self if name in linears}
        differences = [f"{name}: no linear module of the model" for name in self if name not in layers]
        differences += [
            f"{name}: protects {n} inputs, the model's has {sides(layers[name])[1]}"
            for name, (n, _) in self.shapes().items()
            if name in layers and sides(layers[name])[1] != n
        ]
        if differences or self.model is None:
            return differences
        return [f"{name}: {line}" for name, line in self.model.differences(layers, updated=True).items()]

    def require_fit(self, model: nn.Module, *, source: Path | None = None) -> None:
        """Raise FileError with the `differences` from ``model``, if any; ``source`` is the memory's file."""
        if differing := self.differences(model):
            shown = listed(differing, 5, separator="; ")
            start = "" if source is None else f"{source}: "
            raise FileError(f"{start}the memory does not fit the model ({len(differing)} differences): {shown}")

    def to(self, device: torch.device | str) -> SubspaceMemory:
        """The same memory with its bases on ``device``: itself if they are there already."""
        target = torch.empty(0, device=device).device  # "cuda" becomes the current device, with its index
        if all(subspace.basis.device == target for subspace in self.values()):
            return self
        moved: dict[int, ProtectedSubspace] = {}  # layers that share a basis go on sharing it
        subspaces = {}
        for name, subspace in [*self.items()]:
            if id(subspace) not in moved:
                moved[id(subspace)] = subspace.to(target)
            subspaces[name] = moved[id(subspace)]
        return replace(self, subspaces=subspaces)

    def shapes(self) -> dict[str, tuple[int, int]]:
        """(n, k) per layer, without reading the bases of a lazy memory."""
        if isinstance(self.subspaces, MemoryFile):
            return dict(self.subspaces.shapes)
        return {name: (subspace.n, subspace.k) for name, subspace in self.items()}

    def fractions(self) -> dict[str, float]:
        """Share of each layer's input directions that is protected, in [0, 1]."""
        return {name: k / n for name, (n, k) in self.shapes().items()}

    def occupancy(self) -> dict[str, float]:
        """Mean and largest share of protected input directions, and the number of full layers; 0 without layers."""
        shares = list(self.fractions().values()) or [0.0]
        mean, full = sum(shares) / len(shares), float(len(self.full))
        return {"mean_fraction": mean, "max_fraction": max(shares), "full_layers": full}

    def save(self, folder: Path | str, **details: Any) -> None:
        """Write ``memory.safetensors``, with the ``details`` in its manifest, or leave the present file untouched.

        Raises:
            OSError: when the disk is full or the folder cannot be written.
        """
        manifest = {
            **details,
            "full": list(self.full),
            "tasks": list(self.tasks),
            "columns": {name: columns.to_dict() for name, columns in self.columns.items()},
            "growth": {name: growth.to_dict() for name, growth in self.growth.items()},
            "model": None if self.model is None else self.model.to_dict(),
        }
        if self.compact:
            manifest["compact"] = True
        owners: dict[int, str] = {}
        items = [*self.items()]  # held, so that identities stay unique
        shared = {name: owner for name, s in items if (owner := owners.setdefault(id(s.basis), name)) != name}
        if shared:
            manifest["shared"] = shared
        stored = [(name, subspace) for name, subspace in items if name not in shared]
        bases = {f"{name}{SUFFIX}": s.basis for name, s in stored if s.packed is None}
        if packed := {f"{name}{PACKED}": s.packed for name, s in stored if s.packed is not None}:
            manifest["rows"] = {name: s.n for name, s in stored if s.packed is not None}
        write_tensors(Path(folder) / MEMORY, bases | packed, manifest)

    @classmethod
    def load(cls, folder: Path | str, *, lazy: bool = False, model: nn.Module | None = None) -> SubspaceMemory:
        """The memory in ``folder``.

        Args:
            folder: that `save` wrote to.
            lazy: read and verify each layer's basis when it is used.
            model: refuse a memory that does not fit this model.

        Raises:
            FileError: when the file is missing, damaged, or does not fit the model.
        """
        require_memory(Path(folder))
        bases = MemoryFile(Path(folder))
        manifest, shapes = bases.manifest, bases.shapes
        with file_errors(bases.path):
            tasks, full = (_words(key, manifest.get(key, [])) for key in ("tasks", "full"))
            histories, growth = manifest.get("columns", {}).items(), manifest.get("growth", {}).items()
            identity = manifest.get("model")
            memory = cls(
                bases if lazy else dict(bases),
                full,
                tasks,
                {name: Columns.from_dict(each, tasks=len(tasks), k=shapes[name][1]) for name, each in histories},
                {name: LayerGrowth.from_dict(each) for name, each in growth},
                ModelIdentity.from_dict(identity) if identity else None,
                bool(manifest.get("compact", False)),
            )
        if model is not None:
            memory.require_fit(model, source=bases.path)
        return memory

    def __getitem__(self, name: str) -> ProtectedSubspace:
        return self.subspaces[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.subspaces)

    def __len__(self) -> int:
        return len(self.subspaces)

    def max_error(self) -> float:
        """Largest entry of ``FᵀF − I`` over all layers, in float64."""
        bases = [subspace.basis.double() for subspace in self.values() if subspace.k]
        errors = [(basis.mT @ basis - torch.eye(basis.shape[1]).to(basis)).abs().max() for basis in bases]
        return float(np.max([0.0, *map(float, errors)]))  # NaN if one is


def _words(key: str, given: Any) -> tuple[str, ...]:
    if not isinstance(given, list) or not all(isinstance(word, str) for word in given):
        raise TypeError(f"{key} is a list of words, got {given!r}")
    return tuple(given)


def _same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether two layers have one importance, and the same columns with the same history: then they grow alike."""
    if not one or one[0] is not other[0]:
        return False
    (_, old, history, last), (_, new, later, latest) = one, other
    bases = old.basis is new.basis or (old.k == new.k == 0 and old.basis.device == new.basis.device)
    energies = torch.equal(history.energies.nan_to_num(-1), later.energies.nan_to_num(-1))
    return bases and energies and torch.equal(history.origins, later.origins) and last == latest
