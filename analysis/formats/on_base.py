"""Updates that are known only beside the weight they change: DoRA's and OSF's."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from analysis.formats.checkpoint_differences import cut_to_rank
from analysis.formats.checkpoints import Checkpoint
from analysis.formats.sources import Shape, StoredAdapter
from analysis.formats.tensor_files import open_tensors, read_tensor


@dataclass(frozen=True)
class DoraAdapter:
    """DoRA's update ``diag(m / ‖W + sBA‖) (W + sBA) − W``, of full rank; the norms are those of rows.

    ``m`` is the magnitude vector; PEFT merges exactly this.
    """

    directions: StoredAdapter
    magnitudes: Mapping[str, str]
    checkpoint: Checkpoint
    transposed: frozenset[str] = frozenset()
    embeddings: frozenset[str] = frozenset()
    tied: frozenset[str] = frozenset()
    notices: tuple[str, ...] = ()
    kind: str = "dora"

    @property
    def task(self) -> str:
        """Name of the task."""
        return self.directions.task

    @property
    def base(self) -> str | None:
        """Name of the model that the update belongs to."""
        return self.directions.base

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Layer name to (m, n, min(m, n)): rescaling the rows of W has full rank."""
        return {layer: (m, n, min(m, n)) for layer, (m, n, _) in self.directions.shapes.items()}

    def read(self, layers: Iterable[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """The update and an identity."""
        layers = tuple(layers)
        path = self.directions.path
        with open_tensors(path) as file:
            for layer, (left, right) in zip(layers, self.directions.read(layers), strict=True):
                m, n, _ = self.directions.shapes[layer]
                weight = self.checkpoint.weight(layer, (m, n), transposed=layer in self.transposed).double()
                direction = weight + left.double() @ right.double().mT
                magnitude = read_tensor(file, path, self.magnitudes[layer]).double().reshape(-1, 1)
                norms = torch.linalg.vector_norm(direction, dim=1, keepdim=True)
                if not norms.all():
                    raise ValueError(f"{path}: {layer} has a row of W + ΔW that is zero: DoRA cannot scale it")
                change = direction * (magnitude / norms) - weight
                yield cut_to_rank(change.float(), min(m, n))


@dataclass(frozen=True)
class OsfAdapter:
    """OSF's update, its trained low part less that of the base weight's SVD: rank 2d for d trained directions."""

    task: str
    path: Path
    layers: Mapping[str, tuple[str, Shape]]
    checkpoint: Checkpoint
    base: str | None = None
    transposed: frozenset[str] = frozenset()
    embeddings: frozenset[str] = frozenset()
    tied: frozenset[str] = frozenset()
    notices: tuple[str, ...] = ()
    kind: str = "osf"

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Layer name to (m, n, 2d)."""
        return {layer: shape for layer, (_, shape) in self.layers.items()}

    def read(self, layers: Iterable[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """Both parts side by side; one dense SVD a layer."""
        with open_tensors(self.path) as file:
            for layer in layers:
                stem, (m, n, both) = self.layers[layer]
                trained = [read_tensor(file, self.path, f"{stem}.{part}") for part in ("U_low", "S_low", "V_low")]
                weight = self.checkpoint.weight(layer, (m, n), transposed=layer in self.transposed)
                u, values, vt = torch.linalg.svd(weight, full_matrices=False)
                low = both // 2
                left = torch.cat([trained[0] * trained[1], -u[:, -low:] * values[-low:]], dim=1)
                yield left, torch.cat([trained[2], vt[-low:]]).mT.contiguous()
