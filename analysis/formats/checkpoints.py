"""Checkpoints of complete models: base weights, and pairs of checkpoints as updates."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analysis.formats.adapter_names import adapter_kind
from analysis.formats.patterns import search_names
from analysis.formats.plain_files import is_file, is_folder, read_json
from analysis.formats.quantised import (
    STATES,
    four_bit_state,
    is_packed,
    is_scale,
    part_of_weight,
    refused,
    weight_numbers,
)
from analysis.formats.sources import Shape
from analysis.formats.tensor_files import INDEX, NUMBERS, OpenFile, open_file, stored_tensor
from analysis.names import common_name, listed, matched_names, natural_key, unwrapped

NAMES = ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors")
OVERSAMPLING, POWER_ITERATIONS = 10, 4
TIED = {"embed_tokens", "wte", "word_embeddings", "word_embedding", "tok_embeddings", "embed_in", "shared"}
"""Last components of token embeddings in the models of transformers, which a model may tie to its output."""
EMBEDDINGS = TIED | {
    *("wpe", "position_embeddings", "token_type_embeddings", "embed_positions", "position_embedding"),
    *("token_embedding", "relative_attention_bias"),
}
"""Last components of all embeddings there."""
_HEADS = {"lm_head", "embed_out", "output", "output_projection", "decoder", "generator"}
_GENERATING = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM")


@dataclass(frozen=True)
class Checkpoint:
    """A model's weights in one file or in shards, of which nothing but names and shapes is in memory.

    `stored` maps each tensor's name in the model, without what compile, FSDP or DDP put around modules, to its name
    in the file. Quantised weights are read as the numbers they stand for, where that is known, and refused by name
    otherwise.
    """

    path: Path
    file: Path
    shapes: Mapping[str, tuple[int, ...]]
    stored: Mapping[str, str]

    @classmethod
    def load(cls, path: str | Path) -> "Checkpoint":
        """The checkpoint in a file, or in a folder as transformers and diffusers write it.

        Raises:
            FileNotFoundError: there is no checkpoint, or a shard that the index names is missing.
            ValueError: a file is truncated, a pickle of more than tensors, or holds the factors of an adapter.
        """
        place = Path(path)
        file = _tensor_file(place)
        if file is None:
            raise FileNotFoundError(
                f"{place} holds no checkpoint: looked for {', '.join(NAMES)}, each alone or with .index.json"
            )
        opened = open_file(file)
        stored: dict[str, str] = {}
        for name in opened.keys():  # noqa: SIM118
            if kind := adapter_kind(name):
                raise ValueError(
                    f"{file} holds {kind} ({name}), not the weights of a model: give the model's checkpoint, "
                    "with adapters merged or left out"
                )
            if stored.setdefault(unwrapped(name), name) != name:
                raise ValueError(f"{file}: {name} and {stored[unwrapped(name)]} are the same layer")
        shapes = {name: tuple(opened.get_slice(own).get_shape()) for name, own in stored.items()}
        if not any(name.endswith(".weight") or is_packed(name) for name in shapes):
            raise ValueError(f"{file} holds no weights: no tensor's name ends with .weight")
        found = cls(place, file, shapes, stored)
        found.__dict__["_opened"] = opened
        return found

    @cached_property
    def _opened(self) -> OpenFile:
        return open_file(self.file)

    @cached_property
    def _parts(self) -> Mapping[str, tuple[str, ...]]:
        """Layer to the last components of its tensors."""
        found: dict[str, list[str]] = {}
        for name in self.shapes:
            if split := part_of_weight(name):
                found.setdefault(split[0], []).append(split[1])
        return {layer: tuple(parts) for layer, parts in found.items()}

    @cached_property
    def _common(self) -> Mapping[str, list[str]]:
        """Names of weights by what is common to all versions of a model's names."""
        found: dict[str, list[str]] = {}
        for name in self.shapes:
            if name.endswith(".weight"):
                found.setdefault(common_name(name), []).append(name)
        return found

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The model's configuration beside the weights; empty where there is none."""
        path = self.file.parent / "config.json"
        return read_json(path) if is_file(path) else {}

    @property
    def _quantisation(self) -> Mapping[str, Any]:
        found = self.config.get("quantization_config")
        return found if isinstance(found, dict) else {}

    @property
    def ties_output(self) -> bool | None:
        """Whether the token embedding is the model's output too; None where nothing says it."""
        if any(name.removesuffix(".weight").rpartition(".")[2] in _HEADS for name in self.shapes):
            return False
        inner = self.config.get("text_config")
        said = [found.get("tie_word_embeddings") for found in (self.config, inner) if isinstance(found, dict)]
        models = self.config.get("architectures")
        generating = [str(model).endswith(_GENERATING) for model in models] if isinstance(models, list) else []
        if True in said or True in generating:  # a model that generates and stores no output has a tied one
            return True
        return False if False in said or generating else None

    def name_of(self, layer: str) -> str:
        """Name of a layer's weight: its own, that of another version, or the only one that ends or continues like it.

        Versions of transformers name the parts of vision-language models differently, in memory and in files.

        Raises:
            ValueError: there is none, or several, or it is packed into integers.
        """
        wanted = f"{unwrapped(layer)}.weight"
        if wanted in self.shapes:
            return wanted
        near = self._common.get(common_name(wanted), [])
        if not near:
            weights = (name for names in self._common.values() for name in names)
            near = [name for name in weights if name.endswith(f".{wanted}") or wanted.endswith(f".{name}")]
        if len(near) == 1:
            return near[0]
        common = common_name(layer)
        for name in () if near else self.shapes:
            split = part_of_weight(name)
            if is_packed(name) and split is not None and common in (common_name(split[0]), common_name(name)):
                raise refused(self.file, name, "packed into integers")
        close = near or difflib.get_close_matches(wanted, list(self.shapes), n=3, cutoff=0.3)
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
                f"{self.file}: {name} has shape {tuple(weight.shape)}, the update needs {shape}: another base model?"
            )
        return weight

    def tensor(self, name: str) -> Tensor:
        """One tensor in float32; of a quantised weight the numbers that it stands for.

        Raises:
            ValueError: it is quantised in a way that is not read, or holds NaN or infinite numbers.
        """
        layer = name.removesuffix(".weight")
        beside = [part for part in self._parts.get(layer, ()) if part != "weight"] if layer != name else []

        def load(part: str) -> Tensor:
            return self.stored_tensor(f"{layer}.{part}")

        return weight_numbers(self.file, name, self.stored_tensor(name), beside, load, self._quantisation)

    def stored_tensor(self, name: str) -> Tensor:
        """One tensor as it is stored."""
        return stored_tensor(self._opened, self.file, self.stored[name])

    def parts(self, layer: str) -> tuple[str, ...]:
        """Last components of the tensors of a layer, ``weight`` and what stands beside it."""
        return self._parts.get(layer, ())

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight; of a 4-bit one that of the matrix it stands for."""
        for state in STATES:
            key = f"{name.removesuffix('.weight')}.{state}"
            if key in self.shapes:
                return tuple(four_bit_state(self.file, name, self.stored_tensor(key))["shape"])
        return self.shapes[name]


def is_checkpoint(path: Path) -> bool:
    """Whether a folder holds a checkpoint of a complete model."""
    return is_folder(path) and _tensor_file(path) is not None


def _tensor_file(path: Path) -> Path | None:
    """The file of a checkpoint, or its index."""
    if not is_folder(path):
        return path if is_file(path) else None
    files = (path / f"{name}{end}" for name in NAMES for end in ("", INDEX))
    return next((file for file in files if is_file(file)), None)


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
            raise ValueError(f"no matrix differs between {before.path} and {after.path}: nothing to analyse")
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
