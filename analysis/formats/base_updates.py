"""Updates that depend on the base weights: pairs of checkpoints, ``ΔW = after − before``, DoRA's and OSF's."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from analysis.formats.checkpoints import Checkpoint
from analysis.formats.files import NUMBERS, open_file
from analysis.formats.patterns import matching_names
from analysis.formats.quantised import is_packed, is_scale, part_of_weight, refused
from analysis.formats.sources import LeftOut, Shape, Source, StoredAdapter
from analysis.names import listed, matched_names, module_of, natural_key

OVERSAMPLING, POWER_ITERATIONS = 10, 4
TIED = {"embed_tokens", "wte", "word_embeddings", "word_embedding", "tok_embeddings", "embed_in", "shared"}
"""Last components of token embeddings in the models of transformers, which a model may tie to its output."""
EMBEDDINGS = TIED | {
    *("wpe", "position_embeddings", "token_type_embeddings", "embed_positions", "position_embedding"),
    *("token_embedding", "relative_attention_bias"),
}
"""Last components of all embeddings there."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CheckpointDifference(Source):
    """The update between two checkpoints, ``ΔW = after − before``, with one layer in memory at a time."""

    before: Checkpoint
    after: Checkpoint
    names: Mapping[str, str]
    """Weight's name after the update to its name before it."""

    @property
    def file(self) -> str:
        """The file of the checkpoint after the update."""
        return str(self.after.file)

    def read(self, layers: Iterable[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """Left and right, of the rank in `shapes`."""
        for layer in layers:
            name = f"{layer}.weight"
            change = self.after.tensor(name) - self.before.tensor(self.names[name])
            yield truncate(change.mT.contiguous() if layer in self.transposed else change, self.shapes[layer][2])


def checkpoint_difference(
    task: str,
    before: Checkpoint,
    after: Checkpoint,
    *,
    rank: int | None = None,
    pattern: str | None = None,
    transposed: str | None = None,
) -> CheckpointDifference:
    """The matrices that differ between two checkpoints, or those whose names match `pattern`.

    Both are read once, shard by shard, to find the differences. With a `rank`, updates are truncated to it. A file
    does not say which way a matrix is stored: (outputs, inputs) is taken, as in ``nn.Linear``, and (inputs, outputs)
    for names that the pattern `transposed` finds: GPT-2's Conv1D, and embeddings, whose inputs are one-hot. Tensors
    that differ and are no matrices, and those in one checkpoint only, are named in `notices`. ValueError if a shape
    differs, nothing differs, a weight that differs is packed into integers, or rank is not positive.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank is {rank}, at least 1 was expected")
    ordered = sorted(after.shapes, key=natural_key)
    names = matched_names(ordered, before.shapes)
    layers = {name: (part_of_weight(name) or (name, ""))[0] for name in ordered}
    matching = set(layers.values() if pattern is None else matching_names(pattern, sorted(set(layers.values()))))
    compared = {name: layers[name] for name in ordered if name in names and layers[name] in matching}
    shapes, others, rounded = _changed(before, after, names, compared, rank, everything=pattern is not None)
    if not shapes:
        lone = [name for name in ordered if name not in names]
        more = f", and {len(lone)} of the names are in {after.path} only: {listed(lone)}" if lone else ""
        raise ValueError(f"no matrix differs between {before.path} and {after.path}: nothing to analyse{more}")
    flipped = frozenset() if transposed is None else frozenset(matching_names(transposed, list(shapes)))
    shapes |= {layer: (shapes[layer][1], shapes[layer][0], shapes[layer][2]) for layer in flipped}
    tied = [layer for layer in shapes if module_of(layer) in TIED]
    notices = _notices(after, tied, others, rounded)
    left_out = [LeftOut(str(after.file), name, "differs and is no matrix") for name in others]
    if pattern is None:
        for checkpoint, common in ((after, names), (before, names.values())):
            if lone := _only_in(checkpoint, common):
                notices.append(f"in {checkpoint.path} only, so not part of the update: {listed(lone)}")
                left_out += [LeftOut(str(checkpoint.file), name, "in one of the two checkpoints only") for name in lone]
    else:
        unread = (name for name in ordered if layers[name] not in matching)
        left_out += [LeftOut(str(after.file), name, f"not found by layers={pattern!r}") for name in unread]
    return CheckpointDifference(
        task=task,
        kind="dense",
        shapes=shapes,
        base=str(before.path),
        transposed=flipped,
        embeddings=frozenset(layer for layer in shapes if module_of(layer) in EMBEDDINGS),
        tied=frozenset(tied) if after.ties_output else frozenset(),
        notices=tuple(notices),
        left_out=tuple(left_out),
        before=before,
        after=after,
        names=names,
    )


def _changed(
    before: Checkpoint,
    after: Checkpoint,
    names: Mapping[str, str],
    compared: Mapping[str, str],
    rank: int | None,
    *,
    everything: bool,
) -> tuple[dict[str, Shape], list[str], list[str]]:
    """The matrices that differ (all of them with `everything`), other tensors that differ, and quantised weights."""
    shapes: dict[str, Shape] = {}
    others: list[str] = []
    rounded: list[str] = []
    for name, layer in compared.items():
        matrix = _is_matrix(after, name)
        if not (matrix and everything) and not _differ(before, after, names[name], name):
            continue
        for part in after.parts(layer):
            if is_packed(packed := f"{layer}.{part}"):
                raise refused(after.file, packed, "packed into integers")
        if matrix:
            m, n = shape = after.shape(name)
            if (other := before.shape(names[name])) != shape:
                raise ValueError(f"{name} has shape {other} in {before.path} and {shape} in {after.path}")
            shapes[layer] = (m, n, min(m, n, rank or m))
            parts = after.parts(layer)
            if after.stored_tensor(name).dtype not in NUMBERS or any(part.startswith("weight.") for part in parts):
                after.tensor(name), before.tensor(names[name])  # refused here rather than when it is read
                rounded.append(name)
        elif not _belongs_to_weight(after, name):
            others.append(name)
    return shapes, others, rounded


def _notices(after: Checkpoint, tied: list[str], others: list[str], rounded: list[str]) -> list[str]:
    """Messages about what the update leaves out or may miss."""
    notices = [f"differ and are no matrices, so not part of the update: {listed(others)}"] if others else []
    if tied and after.ties_output is None:
        unknown = f"no config.json says whether the model ties it to {listed(tied)}"
        effect = "if so, the update acts there too, and a saved LoRA does not"
        notices.append(f"{after.path} holds no output layer and {unknown}: {effect}")
    if rounded:
        notices.append(f"stored quantised, so the update holds their rounding errors: {listed(rounded)}")
    return notices


def _only_in(checkpoint: Checkpoint, names: Iterable[str]) -> list[str]:
    common = set(names)
    lone = [name for name in checkpoint.shapes if name not in common and not _belongs_to_weight(checkpoint, name)]
    return sorted(lone, key=natural_key)


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
            return set(parts[0]) != set(parts[1]) or not all(
                _same(before.stored_tensor(f"{layers[0]}.{part}"), after.stored_tensor(f"{layers[1]}.{part}"))
                for part in parts[1]
                if part != "bias"
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


def truncate(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Left (m, r) and right (n, r) with ``left rightᵀ`` the matrix, exactly, or its leading part of rank r.

    At full rank one factor is the matrix and the other the identity. Below it, a randomised range finder with
    four power iterations; its draw has a fixed seed, so the same matrix gives the same factors. O(m n r).
    """
    m, n = change.shape
    if rank >= min(m, n):
        eye = torch.eye(min(m, n), dtype=change.dtype)
        return (change, eye) if n <= m else (eye, change.mT.contiguous())
    draw = torch.Generator().manual_seed(0)
    basis = change @ torch.randn(n, min(n, rank + OVERSAMPLING), generator=draw).to(change.dtype)
    for _ in range(POWER_ITERATIONS):
        basis = change @ torch.linalg.qr(change.mT @ torch.linalg.qr(basis).Q).Q
    basis = torch.linalg.qr(basis).Q
    u, values, vt = torch.linalg.svd(basis.mT @ change, full_matrices=False)
    return (basis @ u[:, :rank]) * values[:rank], vt[:rank].mT.contiguous()


@dataclass(frozen=True, kw_only=True, eq=False)
class DoraAdapter(Source):
    """DoRA's update ``diag(m / ‖W + sBA‖) (W + sBA) − W``, of full rank; the norms are those of rows.

    ``m`` is the magnitude vector; PEFT merges exactly this.
    """

    directions: StoredAdapter
    magnitudes: Mapping[str, str]
    """Layer to the name of its magnitude vector."""
    checkpoint: Checkpoint

    @property
    def file(self) -> str:
        """The file of the directions."""
        return self.directions.file

    def read(self, layers: Iterable[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """The update and an identity."""
        layers = tuple(layers)
        path = self.directions.path
        file = open_file(path)
        for layer, (left, right) in zip(layers, self.directions.read(layers), strict=True):
            m, n, _ = self.directions.shapes[layer]
            weight = self.checkpoint.weight(layer, (m, n), transposed=layer in self.transposed).double()
            direction = weight + left.double() @ right.double().mT
            magnitude = file.read(self.magnitudes[layer]).double().reshape(-1, 1)
            norms = torch.linalg.vector_norm(direction, dim=1, keepdim=True)
            if not norms.all():
                raise ValueError(f"{path}: {layer} has a row of W + ΔW that is zero: DoRA cannot scale it")
            change = direction * (magnitude / norms) - weight
            yield truncate(change.float(), self.shapes[layer][2])

    def limited(self, rank: int) -> "DoraAdapter":
        """The update truncated to a rank."""
        return replace(self, shapes={layer: (m, n, min(r, rank)) for layer, (m, n, r) in self.shapes.items()})


@dataclass(frozen=True, kw_only=True, eq=False)
class OsfAdapter(Source):
    """OSF's update, its trained low part less that of the base weight's SVD: rank 2d for d trained directions."""

    trained: StoredAdapter
    checkpoint: Checkpoint

    @property
    def file(self) -> str:
        """The file of the trained part."""
        return self.trained.file

    def read(self, layers: Iterable[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """Both parts side by side; one dense SVD per layer."""
        layers = tuple(layers)
        for layer, (left, right) in zip(layers, self.trained.read(layers), strict=True):
            m, n, d = self.trained.shapes[layer]
            weight = self.checkpoint.weight(layer, (m, n), transposed=layer in self.transposed)
            u, values, vt = torch.linalg.svd(weight, full_matrices=False)
            yield torch.cat([left, -u[:, -d:] * values[-d:]], dim=1), torch.cat([right, vt[-d:].mT], dim=1)


def dora_adapter(directions: StoredAdapter, magnitudes: Mapping[str, str], checkpoint: Checkpoint) -> DoraAdapter:
    """DoRA's update with the LoRA `directions`, of full rank."""
    shapes = {layer: (m, n, min(m, n)) for layer, (m, n, _) in directions.shapes.items()}
    values = directions.values() | {"kind": "dora", "shapes": shapes}
    return DoraAdapter(**values, directions=directions, magnitudes=magnitudes, checkpoint=checkpoint)


def osf_adapter(trained: StoredAdapter, checkpoint: Checkpoint) -> OsfAdapter:
    """OSF's update with the `trained` low part."""
    shapes = {layer: (m, n, 2 * d) for layer, (m, n, d) in trained.shapes.items()}
    return OsfAdapter(**trained.values() | {"shapes": shapes}, trained=trained, checkpoint=checkpoint)
