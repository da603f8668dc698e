"""Updates that depend on the base weights: pairs of checkpoints, ``ΔW = after − before``, DoRA's and OSF's."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from analysis.formats.checkpoints import Checkpoint
from analysis.formats.files import NUMBERS, open_tensors, read_tensor
from analysis.formats.patterns import search_names
from analysis.formats.quantised import is_packed, is_scale, part_of_weight, refused
from analysis.formats.sources import Shape, StoredAdapter
from analysis.names import listed, matched_names, natural_key

OVERSAMPLING, POWER_ITERATIONS = 10, 4
TIED = {"embed_tokens", "wte", "word_embeddings", "word_embedding", "tok_embeddings", "embed_in", "shared"}
"""Last components of token embeddings in the models of transformers, which a model may tie to its output."""
EMBEDDINGS = TIED | {
    *("wpe", "position_embeddings", "token_type_embeddings", "embed_positions", "position_embedding"),
    *("token_embedding", "relative_attention_bias"),
}
"""Last components of all embeddings there."""


@dataclass(frozen=True)
class CheckpointDifference:
    """A `Source` from two checkpoints, ``ΔW = after − before``, one layer in memory at a time."""

    task: str
    before: Checkpoint
    after: Checkpoint
    layers: Mapping[str, Shape]
    names: Mapping[str, str]
    """Weight's name after the update to its name before it."""
    rank: int | None = None
    transposed: frozenset[str] = frozenset()
    notices: tuple[str, ...] = ()
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

        Both are read once, shard by shard, to see what differs. With a `rank`, updates are truncated to it. A file
        does not say which way a matrix is stored: (outputs, inputs) is taken, as in ``nn.Linear``, and (inputs,
        outputs) for names that the pattern `transposed` finds: GPT-2's Conv1D, and embeddings, whose inputs are
        one-hot. What differs and is no matrix, or is in one of both only, is named in `notices`.

        Raises:
            ValueError: a shape differs, nothing differs, a weight that differs is packed into integers, or rank is
                not positive.
        """
        if rank is not None and rank < 1:
            raise ValueError(f"rank is {rank}, at least 1 was expected")
        ordered = sorted(after.shapes, key=natural_key)
        names = matched_names(ordered, before.shapes)
        stems = {name: (part_of_weight(name) or (name, ""))[0] for name in ordered}
        chosen = dict.fromkeys(stems.values(), True)
        if pattern is not None:
            chosen = dict(zip(chosen, search_names(pattern, list(chosen)), strict=True))
        layers: dict[str, Shape] = {}
        others: list[str] = []
        rounded: list[str] = []
        for name in ordered:
            layer = stems[name]
            if name not in names or not chosen[layer]:
                continue
            asked_for = pattern is not None and _is_matrix(after, name)
            if not asked_for and not _differ(before, after, names[name], name):
                continue
            if packed := next((part for part in after.parts(layer) if is_packed(f"{layer}.{part}")), None):
                raise refused(after.file, f"{layer}.{packed}", "packed into integers")
            if not _is_matrix(after, name):
                if not _belongs_to_weight(after, name):
                    others.append(name)
                continue
            shape = after.shape(name)
            if before.shape(names[name]) != shape:
                raise ValueError(
                    f"{name} has shape {before.shape(names[name])} in {before.path} and {shape} in {after.path}"
                )
            if after.stored_tensor(name).dtype not in NUMBERS:
                after.tensor(name), before.tensor(names[name])  # refused here rather than when it is read
                rounded.append(name)
            layers[layer] = (shape[0], shape[1], min(*shape, rank or min(shape)))
        if not layers:
            lone = [name for name in ordered if name not in names]
            more = f", and {len(lone)} of the names are in {after.path} only: {listed(lone)}" if lone else ""
            raise ValueError(f"no matrix differs between {before.path} and {after.path}: nothing to analyse{more}")
        turned: frozenset[str] = frozenset()
        if transposed is not None:
            found = search_names(transposed, list(layers))
            turned = frozenset(layer for layer, turn in zip(layers, found, strict=True) if turn)
            layers |= {layer: (layers[layer][1], layers[layer][0], layers[layer][2]) for layer in turned}
        notices = []
        if others:
            notices.append(f"differ and are no matrices, so not part of the update: {listed(others)}")
        if pattern is None:
            for checkpoint, lone in (
                (after, [name for name in ordered if name not in names]),
                (before, sorted(set(before.shapes) - set(names.values()), key=natural_key)),
            ):
                if lone := [name for name in lone if not _belongs_to_weight(checkpoint, name)]:
                    notices.append(f"in {checkpoint.path} only, so not part of the update: {listed(lone)}")
        unknown = [layer for layer in layers if layer.rpartition(".")[2] in TIED]
        if unknown and after.ties_output is None:
            notices.append(
                f"{after.path} holds no output layer and no config.json says whether the model ties it to "
                f"{listed(unknown)}: if so, the update acts there too, and a saved LoRA does not"
            )
        if rounded:
            notices.append(f"stored quantised, so the update holds their rounding errors: {listed(rounded)}")
        return cls(task, before, after, layers, names, rank, turned, tuple(notices))

    @property
    def base(self) -> str | None:
        """Where the weights before the update lie."""
        return str(self.before.path)

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Layer name to (m, n, r)."""
        return self.layers

    @property
    def embeddings(self) -> frozenset[str]:
        """Layers that are embeddings by their names."""
        return frozenset(layer for layer in self.layers if layer.rpartition(".")[2] in EMBEDDINGS)

    @property
    def tied(self) -> frozenset[str]:
        """Embeddings whose weight is the model's output too."""
        embeddings = frozenset(layer for layer in self.layers if layer.rpartition(".")[2] in TIED)
        return embeddings if self.after.ties_output else frozenset()

    def read(self, layers: Iterable[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """Left and right; of full rank where no rank was given."""
        for layer in layers:
            name = f"{layer}.weight"
            change = self.after.tensor(name) - self.before.tensor(self.names[name])
            yield cut_to_rank(change.mT.contiguous() if layer in self.transposed else change, self.layers[layer][2])


def _is_matrix(checkpoint: Checkpoint, name: str) -> bool:
    return name.endswith(".weight") and len(checkpoint.shapes[name]) == 2


def _belongs_to_weight(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor is read with the quantised weight that it belongs to."""
    layer, part = part_of_weight(name) or ("", "")
    return is_scale(part) and "weight" in checkpoint.parts(layer)


def _differ(before: Checkpoint, after: Checkpoint, old: str, new: str) -> bool:
    """Whether a tensor, or what it stands for, is stored otherwise; float8 by its bytes, torch does not compare it."""
    if _is_matrix(after, new) and before.shape(old) == after.shape(new):
        layers = old.removesuffix(".weight"), new.removesuffix(".weight")
        parts = [before.parts(layers[0]), after.parts(layers[1])]
        quantised = [tensor.dtype not in NUMBERS for tensor in (before.stored_tensor(old), after.stored_tensor(new))]
        if any(quantised):
            beside = [part for part in parts[1] if part != "bias"]
            return set(parts[0]) != set(parts[1]) or not all(
                _same(before.stored_tensor(f"{layers[0]}.{part}"), after.stored_tensor(f"{layers[1]}.{part}"))
                for part in beside
            )
        return not torch.equal(before.tensor(old), after.tensor(new))
    return not _same(before.stored_tensor(old), after.stored_tensor(new))


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bytes, or equal numbers of different types."""
    if a.shape != b.shape:
        return False
    if a.dtype == b.dtype:
        return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    return a.is_floating_point() and b.is_floating_point() and torch.equal(a.double(), b.double())


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
