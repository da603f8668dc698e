"""Checkpoints of complete models: base weights, and the tensors that two checkpoints are compared by."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from analysis.formats.files import INDEX, TensorFile, finite_floats, is_file, is_folder, open_file, read_json
from analysis.formats.hub import from_hub, is_hub_address
from analysis.formats.quantised import STATES, four_bit_state, is_packed, part_of_weight, refused, weight_numbers
from analysis.formats.tensor_names import adapter_contents
from analysis.names import common_name, is_flattened, matched_names, renamed, unwrapped

NAMES = ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors")
_HEADS = {"lm_head", "embed_out", "output", "output_projection", "decoder", "generator"}
_GENERATING = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM")


@dataclass(frozen=True)
class Checkpoint:
    """A model's weights in one file or in shards; only names and shapes are in memory.

    `stored` maps each tensor's name in the model, without the wrappers of compile, FSDP and DDP, to its name in the
    file. Quantised weights are read as the numbers they stand for, where the format is known, and refused by name
    otherwise.
    """

    path: Path
    opened: TensorFile
    shapes: Mapping[str, tuple[int, ...]]
    stored: Mapping[str, str]
    renames: Mapping[str, str] = field(default_factory=dict)
    """Components of names to those that replace them, in the model's names and in those that are looked for."""

    @classmethod
    def load(cls, path: str | Path) -> "Checkpoint":
        """The checkpoint in a file, in a folder as transformers and diffusers write it, or at ``hf://owner/name``.

        Raises:
            FileNotFoundError: there is no checkpoint, or a shard that the index names is missing.
            ValueError: a file is truncated, a pickle of more than tensors, or holds the factors of an adapter.
        """
        path = from_hub(path, weights=True).path if is_hub_address(path) else Path(path)
        file = _tensor_file(path)
        if file is None:
            names = ", ".join(NAMES)
            raise FileNotFoundError(f"{path} holds no checkpoint: looked for {names}, each alone or with {INDEX}")
        opened = open_file(file)
        stored: dict[str, str] = {}
        for name in opened.names:
            if contents := adapter_contents(name):
                remedy = "give the model's checkpoint, with adapters merged or left out"
                raise ValueError(f"{file} holds {contents} ({name}), not the weights of a model: {remedy}")
            if stored.setdefault(unwrapped(name), name) != name:
                raise ValueError(f"{file}: {name} and {stored[unwrapped(name)]} are the same layer")
        if not any(name.endswith(".weight") or is_packed(name) for name in stored):
            raise ValueError(f"{file} holds no weights: no tensor's name ends with .weight")
        return cls(path, opened, {name: opened.shape(own) for name, own in stored.items()}, stored)

    def renamed(self, renames: Mapping[str, str]) -> "Checkpoint":
        """The same weights with components of their names replaced; ValueError if two get the same name."""
        stored: dict[str, str] = {}
        for name, own in self.stored.items():
            if stored.setdefault(renamed(name, renames), own) != own:
                raise ValueError(
                    f"{self.file}: {stored[renamed(name, renames)]} and {own} have the same name after rename="
                )
        shapes = {renamed(name, renames): shape for name, shape in self.shapes.items()}
        return replace(self, shapes=shapes, stored=stored, renames={**self.renames, **renames})

    @property
    def file(self) -> Path:
        """The file of the tensors, or the index of its shards."""
        return self.opened.path

    @cached_property
    def _parts(self) -> Mapping[str, list[str]]:
        """Layer to the last components of its tensors."""
        parts: dict[str, list[str]] = {}
        for name in self.shapes:
            if split := part_of_weight(name):
                parts.setdefault(split[0], []).append(split[1])
        return parts

    @cached_property
    def _weights(self) -> Mapping[str, list[str]]:
        """Names of weights by the part that all versions of a model's names have in common."""
        names: dict[str, list[str]] = {}
        for name in self.shapes:
            if name.endswith(".weight"):
                names.setdefault(common_name(name), []).append(name)
        return names

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The model's configuration beside the weights; empty without one."""
        path = self.file.parent / "config.json"
        return read_json(path) if is_file(path) else {}

    @property
    def ties_output(self) -> bool | None:
        """Whether the token embedding is the model's output too; None if unknown."""
        if any(name.removesuffix(".weight").rpartition(".")[2] in _HEADS for name in self.shapes):
            return False
        inner = self.config.get("text_config")
        ties = [config.get("tie_word_embeddings") for config in (self.config, inner) if isinstance(config, dict)]
        models = self.config.get("architectures")
        generating = [str(model).endswith(_GENERATING) for model in models] if isinstance(models, list) else []
        if True in ties or True in generating:  # a model that generates and stores no output has a tied one
            return True
        return False if False in ties or generating else None

    def name_of(self, layer: str) -> str:
        """Name of a layer's weight: its own, another version's, or the only one with the same start or end.

        Versions of transformers name the parts of vision-language models differently, in memory and in files. Names of
        Kohya's scripts and of LyCORIS have underscores in place of dots.

        Raises:
            ValueError: there is none, or several, or it is packed into integers.
        """
        layer = renamed(unwrapped(layer).replace(".base_layer.", "."), self.renames)
        wanted = f"{layer}.weight"
        for own in (wanted, f"{layer}.in_proj_weight"):  # the second is that of torch's MultiheadAttention
            if own in self.shapes:
                return own
        near = self._weights.get(common_name(wanted), [])
        if not near:
            weights = [name for names in self._weights.values() for name in names]
            near = [name for name in weights if name.endswith(f".{wanted}") or wanted.endswith(f".{name}")]
            near = near or [name for name in weights if is_flattened(layer, name.removesuffix(".weight"))]
        if len(near) == 1:
            return near[0]
        common = common_name(layer)
        for name in () if near else self.shapes:
            split = part_of_weight(name)
            stems = () if split is None else (split[0], name.removesuffix("_blocks"))
            if is_packed(name) and common in map(common_name, stems):
                raise refused(self.file, name, "packed into integers")
        close = near or difflib.get_close_matches(wanted, list(self.shapes), n=3, cutoff=0.3)
        count = "several weights" if near else "no weight"
        found = f": {', '.join(close[:3])}" if near else f"; it has {', '.join(close[:3])}" if close else ""
        remedy = "give the checkpoint that was adapted (--base), or a map between its names (--map)"
        raise ValueError(f"{self.path} has {count} for layer {layer}{found}: {remedy}")

    def weight(self, layer: str, shape: tuple[int, int], *, transposed: bool = False) -> Tensor:
        """A layer's weight as (outputs, inputs), kernels flattened, float32; ValueError without one of this shape.

        The shape decides which way it is stored; a square one is (inputs, outputs) if `transposed`.
        """
        expert = self._expert(layer)
        if expert is None:
            weight = self.tensor(name := self.name_of(layer))
        else:
            name, weight = expert
        if weight.ndim > 2:  # of a convolution
            weight = weight.flatten(1)
        if weight.shape == shape[::-1] and (transposed or weight.shape != shape):
            weight = weight.mT
        if weight.shape != shape:
            found = f"{self.file}: {name} has shape {tuple(weight.shape)}"
            raise ValueError(f"{found}, the update needs {shape}: another base model?")
        return weight

    def _expert(self, layer: str) -> tuple[str, Tensor] | None:
        """The name of a stack of experts' weights, and the matrix of the layer ``module.number.parameter`` in it."""
        layer = renamed(unwrapped(layer), self.renames)
        module, number, parameter = ("", "", *layer.rsplit(".", 2))[-3:]
        stack = f"{module}.{parameter}"
        if not number.isdecimal() or f"{layer}.weight" in self.shapes:
            return None
        name = matched_names([stack], self.shapes).get(stack)
        if name is None or len(self.shapes[name]) != 3 or int(number) >= self.shapes[name][0]:
            return None
        return name, finite_floats(self.stored_tensor(name)[int(number)], self.file, name)

    def tensor(self, name: str) -> Tensor:
        """One tensor in float32; a quantised weight as the numbers that it stands for, if `weight_numbers` reads it."""
        layer = name.removesuffix(".weight")
        beside = [part for part in self.parts(layer) if part != "weight"] if layer != name else []
        quantisation = self.config.get("quantization_config")
        config = quantisation if isinstance(quantisation, dict) else {}
        stored = self.stored_tensor(name)
        return weight_numbers(
            self.file, name, stored, beside, lambda part: self.stored_tensor(f"{layer}.{part}"), config
        )

    def stored_tensor(self, name: str) -> Tensor:
        """One tensor as it is stored."""
        return self.opened.stored(self.stored[name])

    def parts(self, layer: str) -> list[str]:
        """Last components of the tensors of a layer, ``weight`` among them."""
        return self._parts.get(layer, [])

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight; for a 4-bit one that of the matrix it stands for."""
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
