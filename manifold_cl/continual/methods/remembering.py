"""What methods with a `SubspaceMemory` share: how it is read back, what it weighs, how full it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from manifold_cl.continual.method import Method
from manifold_cl.continual.subspaces import SubspaceMemory


class Remembering(Method):
    """A method that carries a memory of protected input directions from task to task."""

    memory: SubspaceMemory | None

    def load_state(self, folder: Path) -> None:
        """Read the memory."""
        self.memory = SubspaceMemory.load(folder)

    def state(self) -> Iterator[Tensor]:
        """The protected bases."""
        yield from (subspace.basis for subspace in self.memory.subspaces.values()) if self.memory else ()

    def capacity(self) -> dict[str, float]:
        """Mean and largest share of protected input directions, and how many layers are full."""
        return self.memory.occupancy() if self.memory else {}
