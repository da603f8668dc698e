"""`AdapterCollection`: the adapters of a folder, and one streamed pass over all their layers."""

import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from analysis.adapters.batches import Progress
from analysis.files import as_paths
from analysis.formats import Checkpoint, held_adapter
from analysis.many.collection_tables import CollectionTables, collection_tables
from analysis.many.layer_pass import Side
from analysis.many.members import Member, Omission, agreeing, find_members, narrowed
from analysis.many.workers import IMPORTS, Pass, measure
from analysis.names import listed

MEMORY_BUDGET = 10**9
"""Bytes that all processes may take together."""
CURVES = 16
"""Layers whose curve of common directions is measured: an eigenvalue problem each."""
READING = 60_000_000
"""Bytes of the factors that are read at a time, their copies in double precision, and a tile of products."""
LEAST_BLOCK = 20_000_000
"""Bytes of frames that are held in any case."""
GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True, eq=False)
class AdapterCollection:
    """Many adapters of one model, without an order: names and shapes are in memory, factors are read when measured."""

    members: tuple[Member, ...]
    layers: tuple[str, ...]
    left_out: tuple[Omission, ...] = ()
    """Parts of the folder that are no member, and why."""
    notices: tuple[str, ...] = ()

    @classmethod
    def load(
        cls,
        *paths: str | Path,
        common: bool = False,
        base: str | Path | Checkpoint | None = None,
        alpha: float | str | None = None,
        layers: str | None = None,
        transposed: str | None = None,
        rank: int | None = None,
        rename: Mapping[str, str] | None = None,
    ) -> "AdapterCollection":
        """The adapters in a folder of folders or files, or at several paths, in any format of `AdapterSet.load`.

        What cannot be read is named in `left_out`, and the others are read. Members must have the layers of most
        members; with `common`, the layers that all members have are read instead. The other options are those of
        `AdapterSet.load`.

        Raises:
            FileNotFoundError: a path does not exist.
            ValueError: fewer than two adapters can be read, or no layer is common to them.
        """
        given = as_paths("AdapterCollection.load", paths)
        if missing := [path for path in given if not path.exists() and not str(path).startswith("hf:/")]:
            raise FileNotFoundError(f"{missing[0]} does not exist: give a folder of adapters, or several adapters")
        if not given:
            raise ValueError("AdapterCollection.load needs a folder of adapters, or several adapters")
        options: dict[str, Any] = {"base": base, "alpha": alpha, "layers": layers, "transposed": transposed}
        if base is not None and not isinstance(base, Checkpoint):
            options["base"] = Checkpoint.load(base)
        found, left_out = find_members(given, {**options, "rank": rank, "common": common, "rename": rename})
        kept: list[Member] = []
        if found:
            kept, names, notices = agreeing(found, left_out, common=common)
        if len(kept) < 2:
            reasons = listed([f"{each.name}: {each.reason}" for each in left_out], separator="; ")
            where = given[0] if len(given) == 1 else f"{len(given)} paths"
            raise ValueError(
                f"{where}: {len(kept)} of {len(found)} adapters can be compared, at least 2 are needed"
                f"{f' ({reasons})' if reasons else ''}"
            )
        return cls(tuple(kept), names, tuple(left_out), tuple(notices))

    @classmethod
    def from_factors(cls, factors: Mapping[str, Mapping[str, Any]]) -> "AdapterCollection":
        """A collection from member to layer to (left (m, r), right (n, r)), all scale in left."""
        members = [Member(name, held_adapter(name, dict(layers))) for name, layers in factors.items()]
        left_out: list[Omission] = []
        kept, layers, notices = agreeing(members, left_out, common=False)
        return cls(tuple(kept), layers, tuple(left_out), tuple(notices))

    def __repr__(self) -> str:
        """Numbers of members, layers, and parts left out."""
        return (
            f"AdapterCollection({len(self.members)} adapters; {len(self.layers)} layers; {len(self.left_out)} left out)"
        )

    def measure(
        self,
        *,
        side: Side = "input",
        device: torch.device | str = "cpu",
        processes: int = 1,
        memory_budget: int = MEMORY_BUDGET,
        curves: int = CURVES,
        clusters: int | None = None,
        progress: Progress | None = None,
    ) -> CollectionTables:
        """All tables, from one pass over the layers that reads each factor once.

        Per layer, the frames of all members are in memory: 4 n R bytes for R the sum of their ranks. Where that is
        more than the budget allows, pairs of blocks of members are read instead, and there is no curve. Products of
        frames are in float32, everything else in float64. Cost: O(n R²) per layer, O(R³) more per curve.

        Args:
            side: the side whose directions are compared, ``"input"`` or ``"output"``.
            device: where the factors are decomposed and compared.
            processes: processes that share the layers; 1 for this one. A script needs ``if __name__ == "__main__"``.
            memory_budget: bytes for all processes together.
            curves: number of layers, evenly spaced, whose curve of common directions is measured.
            clusters: number of clusters; by default the tree is cut as `cluster_tree` says.
            progress: called with the number of finished layers and of all layers.

        Raises:
            ValueError: fewer than two members can be read to the end.
            RuntimeError: a process ended unexpectedly.
        """
        if side not in ("input", "output"):
            raise ValueError(f"side is {side!r}, choose 'input' or 'output'")
        if processes < 1:
            raise ValueError(f"processes is {processes}, at least 1 was expected")
        if curves < 0:
            raise ValueError(f"curves is {curves}, a number of layers from 0 on was expected")
        if clusters is not None and not 1 <= clusters <= len(self.members):
            raise ValueError(f"clusters is {clusters}, a number from 1 to {len(self.members)} was expected")
        if processes > 1 and not self._can_travel():
            processes = 1
        work = self._work(side, str(device), curves, processes, memory_budget)
        measured = measure(work, self.members, processes=processes, progress=progress)
        if len(measured.members) < 2:
            reasons = listed([f"{each.name}: {each.reason}" for each in measured.failed], separator="; ")
            raise ValueError(
                f"{len(measured.members)} adapters can be read to the end, at least 2 are needed ({reasons})"
            )
        return collection_tables(work, measured, left_out=self.left_out, notices=self.notices, clusters=clusters)

    def _can_travel(self) -> bool:
        """Whether the members can be sent to other processes: open checkpoints cannot."""
        try:
            pickle.dumps([narrowed(member.source, self.layers[:1]) for member in self.members])
        except (TypeError, AttributeError, pickle.PicklingError):
            return False
        return True

    def _work(self, side: Side, device: str, curves: int, processes: int, memory_budget: int) -> Pass:
        """The pass, with as many frames in memory and as many curves as the budget of each process allows."""
        shapes = {layer: self.members[0].source.shapes[layer][:2] for layer in self.layers}
        block = max(LEAST_BLOCK, (memory_budget - IMPORTS) // processes - READING)
        position = 1 if side == "input" else 0
        fitting = []
        for layer, shape in shapes.items():
            width, columns = shape[position], sum(each.source.shapes[layer][2] for each in self.members)
            # the frames, and the smaller Gram matrix with its copy for the eigenvalues
            if 4 * (width * columns + 2 * min(width, columns) ** 2) <= block:
                fitting.append(layer)
        # multiples of the golden ratio spread evenly, whatever the period in which modules follow each other
        spread = sorted(range(len(fitting)), key=lambda index: index * GOLDEN % 1)[:curves]
        chosen = [fitting[index] for index in sorted(spread)]
        widths = [shapes[layer][position] for layer in chosen]
        first = [widths.index(width) for width in widths]  # random members are drawn once per width
        drawn = {layer: first[index] == index for index, layer in enumerate(chosen)}
        return Pass(shapes, side, drawn, device, block)


def usable_processes() -> int:
    """Cores of this machine that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
