"""Whole checkpoints: base weights for what depends on them, and pairs of checkpoints as updates."""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from analysis.formats.sources import Shape
from analysis.formats.tensor_files import open_tensors, read_json, read_tensor, stored_shapes
from analysis.names import natural_key

NAMES = ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors")
OVERSAMPLING, POWER_ITERATIONS = 10, 4


@dataclass(frozen=True)
class Checkpoint:
    """A model's weights in one file or in shards, of which nothing but names and shapes is in memory."""

    path: Path
    files: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def load(cls, path: str | Path) -> "Checkpoint":
        """The checkpoint in a file, or in a folder as transformers and diffusers write it.

        Raises:
            FileNotFoundError: there is no checkpoint, or a shard that the index names is missing.
            ValueError: a file is truncated or a pickle of more than tensors.
        """
        place = Path(path)
        shards = list(dict.fromkeys(_shards(place)))
        if not shards:
            raise FileNotFoundError(
                f"{place} holds no checkpoint: looked for {', '.join(NAMES)}, each alone or with .index.json"
            )
        files: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for shard in shards:
            found = stored_shapes(shard)
            shapes |= found
            files |= dict.fromkeys(found, shard)
        return cls(place, files, shapes)

    def name_of(self, layer: str) -> str:
        """Name of a layer's weight: the layer's own, or the one name that ends or continues like it.

        Raises:
            ValueError: there is none, or several.
        """
        wanted = f"{layer}.weight"
        if wanted in self.files:
            return wanted
        near = [name for name in self.files if name.endswith(f".{wanted}") or wanted.endswith(f".{name}")]
        if len(near) == 1:
            return near[0]
        close = near or difflib.get_close_matches(wanted, list(self.files), n=3, cutoff=0.3)
        raise ValueError(
            f"{self.path} has {'several weights' if near else 'no weight'} for layer {layer}"
            f"{': ' if close else ''}{', '.join(close[:3])}"
        )

    def weight(self, layer: str, shape: tuple[int, int], *, transposed: bool = False) -> Tensor:
        """A layer's weight as (outputs, inputs), float32.

        The shape tells which way it is stored; of a square one `transposed` says that it is (inputs, outputs).

        Raises:
            ValueError: there is no such weight, or it has another shape.
        """
        name = self.name_of(layer)
        weight = self.tensor(name)
        if weight.shape == shape[::-1] and (transposed or weight.shape != shape):
            weight = weight.mT
        if weight.shape != shape:
            raise ValueError(
                f"{self.files[name]}: {name} has shape {tuple(weight.shape)}, the update needs {shape}: "
                "another base model?"
            )
        return weight

    def tensor(self, name: str) -> Tensor:
        """One tensor in float32."""
        with open_tensors(self.files[name]) as file:
            return read_tensor(file, self.files[name], name)


def is_checkpoint(path: Path) -> bool:
    """Whether a folder holds a checkpoint of a whole model."""
    return path.is_dir() and any((path / f"{name}{end}").exists() for name in NAMES for end in ("", ".index.json"))


def _shards(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    for name in NAMES:
        if (path / name).exists():
            yield path / name
            return
        index = path / f"{name}.index.json"
        if index.exists():
            found = read_json(index).get("weight_map")
            if not isinstance(found, dict) or not found:
                raise ValueError(f"{index}: key 'weight_map' is missing or not an object")
            for shard in sorted(set(found.values())):
                if not (path / shard).exists():
                    raise FileNotFoundError(f"{path / shard} does not exist, though {index.name} names it")
                yield path / shard
            return


@dataclass(frozen=True)
class CheckpointDifference:
    """A `Source` from two checkpoints, ``ΔW = after − before``, one layer in memory at a time."""

    task: str
    before: Checkpoint
    after: Checkpoint
    layers: Mapping[str, Shape]
    rank: int | None = None
    transposed: frozenset[str] = frozenset()
    kind: str = "dense"

    @classmethod
    def between(
        cls,
        task: str,
        before: Checkpoint,
        after: Checkpoint,
        *,
        rank: int | None = None,
        pattern: str | None = None,
        transposed: str | None = None,
    ) -> "CheckpointDifference":
        """The matrices that differ between two checkpoints, or those whose names match `pattern`.

        Both are read once, shard by shard, to see what differs. With a `rank`, updates are cut to it. A file does
        not say which way a matrix is stored: (outputs, inputs) is taken, as in ``nn.Linear``, and (inputs, outputs)
        for names that the pattern `transposed` finds: GPT-2's Conv1D, and embeddings, whose inputs are one-hot.

        Raises:
            ValueError: a shape differs, nothing differs, or rank is not positive.
        """
        if rank is not None and rank < 1:
            raise ValueError(f"rank is {rank}, at least 1 was expected")
        layers: dict[str, Shape] = {}
        turned: set[str] = set()
        for name in sorted(after.shapes, key=natural_key):
            shape = after.shapes[name]
            if len(shape) != 2 or not name.endswith(".weight") or name not in before.shapes:
                continue
            layer = name.removesuffix(".weight")
            if pattern is not None and not re.search(pattern, layer):
                continue
            if before.shapes[name] != shape:
                raise ValueError(f"{name} has shape {before.shapes[name]} in {before.path} and {shape} in {after.path}")
            if pattern is not None or not torch.equal(before.tensor(name), after.tensor(name)):
                if transposed is not None and re.search(transposed, layer):
                    shape = shape[::-1]
                    turned.add(layer)
                layers[layer] = (*shape, min(*shape, rank or min(shape)))
        if not layers:
            raise ValueError(f"no matrix differs between {before.path} and {after.path}: nothing to analyse")
        return cls(task, before, after, layers, rank, frozenset(turned))

    @property
    def base(self) -> str | None:
        """Where the weights before the update lie."""
        return str(self.before.path)

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Layer name to (m, n, r)."""
        return self.layers

    def read(self, layers: Iterable[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """Left and right; of full rank where no rank was given."""
        for layer in layers:
            name = f"{layer}.weight"
            change = self.after.tensor(name) - self.before.tensor(name)
            yield cut_to_rank(change.mT.contiguous() if layer in self.transposed else change, self.layers[layer][2])


def cut_to_rank(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Left (m, r) and right (n, r) with ``left rightᵀ`` the matrix, exactly, or its leading part of rank r.

    At full rank one factor is the matrix and the other the identity. Below it, a randomised range finder with
    four power iterations; its draw has a fixed seed, so the same matrix gives the same factors. O(m n r).
    """
    m, n = change.shape
    if rank >= min(m, n):
        return (change, torch.eye(n)) if n <= m else (torch.eye(m), change.mT.contiguous())
    draw = torch.Generator().manual_seed(0)
    basis = change @ torch.randn(n, min(n, rank + OVERSAMPLING), generator=draw)
    for _ in range(POWER_ITERATIONS):
        basis = change @ torch.linalg.qr(change.mT @ torch.linalg.qr(basis).Q).Q
    basis = torch.linalg.qr(basis).Q
    u, values, vt = torch.linalg.svd(basis.mT @ change, full_matrices=False)
    return (basis @ u[:, :rank]) * values[:rank], vt[:rank].mT.contiguous()
