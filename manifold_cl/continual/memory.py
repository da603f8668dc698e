"""What every layer protects: one subspace each, grown task by task, within its capacity, safe on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manifold_cl.adapters.files import VERSION, read_tensors, write_tensors
from manifold_cl.geometry import ProtectedSubspace

MEMORY_FORMAT = "manifold_cl.memory"


@dataclass(frozen=True, eq=False)
class SubspaceMemory(Mapping[str, ProtectedSubspace]):
    """Layer name → protected subspace of its inputs. A value: growing returns a new memory.

    Args:
        subspaces: one for each adapted layer.
        full: layers whose last growth was cut short because no room for an adapter would have been left.
    """

    subspaces: Mapping[str, ProtectedSubspace]
    full: tuple[str, ...] = ()

    @classmethod
    def empty(cls, sizes: Mapping[str, int]) -> SubspaceMemory:
        """A memory that protects nothing, for layers with the given numbers of inputs."""
        return cls({name: ProtectedSubspace.empty(n) for name, n in sizes.items()})

    def extended(self, moments: Mapping[str, Tensor], *, energy: float, rank: int) -> SubspaceMemory:
        """The memory that also holds the share ``energy`` of each layer's second moment (n, n).

        Growth stops, and the layer is listed in ``full``, where fewer than ``rank`` free directions would remain.

        Source: method.md 2.3; the capacity bound is ours (k ≤ n − rank).
        """
        grown, full = dict(self.subspaces), []
        for name, moment in moments.items():
            wanted = grown[name].extended_to_moment(moment, energy=energy)
            room = wanted.n - rank
            if wanted.k > room:
                full.append(name)
            grown[name] = ProtectedSubspace(wanted.basis[:, :room].contiguous()) if wanted.k > room else wanted
        return SubspaceMemory(grown, tuple(full))

    def to(self, device: torch.device | str) -> SubspaceMemory:
        """The same memory with its bases on ``device``."""
        return SubspaceMemory({name: ProtectedSubspace(s.basis.to(device)) for name, s in self.items()}, self.full)

    def fractions(self) -> dict[str, float]:
        """Share of each layer's input directions that is protected, in [0, 1]."""
        return {name: subspace.k / subspace.n for name, subspace in self.items()}

    def save(self, folder: Path | str, **details: Any) -> None:
        """Write ``memory.safetensors`` and ``memory.json`` (docs/record-format.md), ``details`` into the manifest."""
        manifest = {
            "format": MEMORY_FORMAT,
            "version": VERSION,
            **details,
            "full": list(self.full),
            "layers": {name: {"basis": list(subspace.basis.shape)} for name, subspace in self.items()},
        }
        write_tensors(Path(folder) / "memory", {f"{name}.basis": s.basis for name, s in self.items()}, manifest)

    @classmethod
    def load(cls, folder: Path | str) -> SubspaceMemory:
        """The memory in ``folder``.

        Raises:
            FileError: when a file is missing or damaged.
        """
        tensors, manifest = read_tensors(Path(folder) / "memory", expected=MEMORY_FORMAT)
        subspaces = {name: ProtectedSubspace(tensors[f"{name}.basis"]) for name in manifest["layers"]}
        return cls(subspaces, tuple(manifest.get("full", ())))

    def __getitem__(self, name: str) -> ProtectedSubspace:
        return self.subspaces[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.subspaces)

    def __len__(self) -> int:
        return len(self.subspaces)

    def max_error(self) -> float:
        """Largest entry of ``FᵀF − I`` over all layers, in float64."""
        worst = 0.0
        for subspace in self.values():
            gram = subspace.basis.double().mT @ subspace.basis.double()
            worst = max(worst, float((gram - torch.eye(subspace.k)).abs().max()) if subspace.k else 0.0)
        return worst
