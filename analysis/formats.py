"""Reading one folder: our adapters, our protected subspaces, PEFT's LoRA."""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from analysis.names import natural_key

Shape = tuple[int, int, int]
"""(m, n, r): outputs, inputs, rank."""

# What changes ΔW into something else than scaling · B A, or takes part of it from tensors that are not read.
_UNSUPPORTED = {
    "use_dora": "DoRA's magnitudes make the update depend on the base weight",
    "use_qalora": "QALoRA pools its inputs",
    "use_bdlora": "block-diagonal factors are stored in another layout",
    "kasa_config": "KaSA keeps singular values between its factors and truncates the base weight",
    "monteclora_config": "MonteCLoRA samples its factors",
    "arrow_config": "Arrow routes between several adapters",
    "alora_invocation_tokens": "an activated LoRA is never added to the weight",
    "lora_bias": "biases are not part of a low-rank update",
    "target_parameters": "factors of bare parameters are stored in another layout",
    "layer_replication": "replicated layers share one base weight",
}
# These write the base model's weights at initialisation, so B A alone is not the change of the weight.
_RESIDUAL_INITIALISATIONS = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Source(Protocol):
    """One task's update: names, shapes and, on demand, factors."""

    @property
    def task(self) -> str:
        """Name of the task."""

    @property
    def kind(self) -> str:
        """What made the update, such as ``"eblora"`` or ``"lora"``."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Layer name to (m, n, r), in the order of the model."""

    def read(self, layers: Iterable[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """Left (m, r) with all scale in it and right (n, r), float32, for each of `layers`."""


@dataclass(frozen=True)
class HeldAdapter:
    """A `Source` whose factors are already in memory."""

    task: str
    factors: Mapping[str, tuple[Tensor, Tensor]]
    kind: str = "factors"

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Layer name to (m, n, r)."""
        return {
            name: (left.shape[0], right.shape[0], left.shape[1])
            for name, (left, right) in sorted(self.factors.items(), key=lambda item: natural_key(item[0]))
        }

    def read(self, layers: Iterable[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """Left and right in float32."""
        for layer in layers:
            left, right = self.factors[layer]
            yield left.detach().float(), right.detach().float()


@dataclass(frozen=True)
class _Entry:
    """Where the factors of one layer lie in a safetensors file."""

    left: str
    right: str
    shape: Shape
    scaling: float
    scale: str | None = None
    right_is_wide: bool = False


@dataclass(frozen=True)
class StoredAdapter:
    """A `Source` that reads a safetensors file when asked."""

    task: str
    kind: str
    path: Path
    entries: Mapping[str, _Entry]

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Layer name to (m, n, r)."""
        return {name: entry.shape for name, entry in self.entries.items()}

    def read(self, layers: Iterable[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """Left and right, one layer at a time from one opened file."""
        with open_tensors(self.path) as file:
            for layer in layers:
                entry = self.entries[layer]
                left, right = _tensor(file, self.path, entry.left), _tensor(file, self.path, entry.right)
                scale = entry.scaling
                if entry.scale is not None:
                    scale *= float(_tensor(file, self.path, entry.scale))
                yield left * scale, (right.mT if entry.right_is_wide else right).contiguous()


@dataclass(frozen=True)
class StoredBases:
    """Protected subspaces of one task's end: layer name to orthonormal columns, read when asked."""

    path: Path
    shapes: Mapping[str, tuple[int, int]]

    def basis(self, layer: str) -> Tensor | None:
        """(n, k) in float32, or None for a layer without a protected subspace."""
        if layer not in self.shapes:
            return None
        with open_tensors(self.path) as file:
            return _tensor(file, self.path, f"{layer}.basis")


def open_tensors(path: Path) -> Any:
    """A safetensors file opened lazily.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated or no safetensors file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error


def _tensor(file: Any, path: Path, name: str) -> Tensor:
    tensor: Tensor = file.get_tensor(name).float()
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{path}: {name} contains NaN or infinite numbers; the run has diverged")
    return tensor


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, not JSON, or not an object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except ValueError as error:
        raise ValueError(f"{path} is truncated or not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}, not an object")
    return data


def _manifest(path: Path, expected: str, tensors: Path) -> dict[str, Any]:
    """The manifest of one of our files, once format, version and checksum agree."""
    manifest = read_json(path)
    check_format(path, manifest, expected)
    if not tensors.is_file():
        raise FileNotFoundError(f"{tensors} does not exist, though {path.name} describes it")
    with tensors.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != manifest.get("sha256"):
        raise ValueError(
            f"{tensors}: sha256 is {digest}, the manifest says {manifest.get('sha256')}; the file was truncated, "
            "edited or belongs to another manifest"
        )
    if not isinstance(manifest.get("layers"), dict):
        raise ValueError(f"{path}: key 'layers' is missing or not an object")
    return manifest


def check_format(path: Path, data: Mapping[str, Any], expected: str) -> None:
    """Accept version 1 of one of our formats, refuse anything else by name."""
    if data.get("format") != expected:
        raise ValueError(f"{path}: format is {data.get('format')!r}, {expected!r} was expected")
    if data.get("version") != 1:
        raise ValueError(f"{path}: version {data.get('version')!r} of {expected} is not known, only 1 is")


def read_adapter(folder: Path) -> StoredAdapter:
    """One of our adapter folders, ``adapter.safetensors`` with ``adapter.json``."""
    source, path = folder / "adapter.json", folder / "adapter.safetensors"
    manifest = _manifest(source, "manifold_cl.adapter", path)
    scaling = manifest.get("scaling")
    if not isinstance(scaling, int | float) or not math.isfinite(scaling):
        raise ValueError(f"{source}: 'scaling' is {scaling!r}, a finite number was expected")
    entries = {}
    with open_tensors(path) as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    for layer in sorted(manifest["layers"], key=natural_key):
        left, right, scale = f"{layer}.left", f"{layer}.right", f"{layer}.scale"
        for name in (left, right):
            said = tuple(manifest["layers"][layer].get(name.rpartition(".")[2], ()))
            if stored.get(name) != said:
                raise ValueError(f"{path}: {name} has shape {stored.get(name)}, {source.name} says {said}")
        (m, r), (n, rank) = stored[left], stored[right]
        if r != rank:
            raise ValueError(f"{path}: {left} has rank {r}, {right} has rank {rank}")
        entries[layer] = _Entry(left, right, (m, n, r), float(scaling), scale if scale in stored else None)
    task = str(manifest.get("task") or folder.name)
    return StoredAdapter(task, str(manifest.get("kind", "unknown")), path, entries)


def read_bases(folder: Path) -> StoredBases | None:
    """The protected subspaces that lie in a task's folder, or None when it has none."""
    source, path = folder / "memory.json", folder / "memory.safetensors"
    if not source.exists() and not path.exists():
        return None
    manifest = _manifest(source, "manifold_cl.memory", path)
    with open_tensors(path) as file:
        names = set(file.keys())
        shapes = {}
        for layer in manifest["layers"]:
            name, said = f"{layer}.basis", tuple(manifest["layers"][layer].get("basis", ()))
            shape = tuple(file.get_slice(name).get_shape()) if name in names else None
            if shape != said:
                raise ValueError(f"{path}: {name} has shape {shape}, {source.name} says {said}")
            shapes[layer] = (said[0], said[1])
    return StoredBases(path, shapes)


def read_peft(folder: Path) -> StoredAdapter:
    """A PEFT LoRA folder, ``adapter_config.json`` with ``adapter_model.safetensors``.

    The scaling is ``alpha / r``, or ``alpha / sqrt(r)`` for rank-stabilised LoRA, with alpha and r from the
    patterns where they match, as PEFT itself matches them. ``fan_in_fan_out`` says how the *base* weight is
    stored; B and A keep their meaning, so ΔW is (out, in) here for such layers too. Tensors without ``lora_``
    in their name are whole parameters that PEFT saved beside the adapter: they have no factors and are skipped.
    """
    source, path = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config = read_json(source)
    _check_peft(source, config)
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise ValueError(f"{folder / 'adapter_model.bin'} is a pickle, which is not read: save as safetensors")
    with open_tensors(path) as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    entries = {}
    for name in stored:
        if "lora_" not in name:
            continue
        if not name.endswith((".lora_A.weight", ".lora_B.weight")):
            raise ValueError(f"{path}: {name} is not supported; only lora_A.weight and lora_B.weight are")
        stem = name.rpartition(".lora_")[0]
        left, right = f"{stem}.lora_B.weight", f"{stem}.lora_A.weight"
        for factor in (left, right):
            if len(stored.get(factor, ())) != 2:
                raise ValueError(
                    f"{path}: {factor} has shape {stored.get(factor)}, a matrix was expected (no convolutions)"
                )
        layer = stem.removeprefix("base_model.model.")
        (m, r), (rank, n) = stored[left], stored[right]
        configured = _by_pattern(config.get("rank_pattern"), layer, config["r"])
        if not r == rank == configured:
            raise ValueError(f"{path}: {layer} has ranks {r} and {rank}, {source.name} says {configured}")
        alpha = _by_pattern(config.get("alpha_pattern"), layer, config["lora_alpha"])
        scaling = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
        entries[layer] = _Entry(left, right, (m, n, r), scaling, right_is_wide=True)
    if not entries:
        raise ValueError(f"{path} holds no lora_A and lora_B tensors")
    ordered = {layer: entries[layer] for layer in sorted(entries, key=natural_key)}
    return StoredAdapter(folder.name, "lora", path, ordered)


def _check_peft(source: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{source}: peft_type is {config.get('peft_type')!r}, only 'LORA' is supported")
    for option, reason in _UNSUPPORTED.items():
        if config.get(option):
            raise ValueError(f"{source}: {option} is set and not supported: {reason}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_RESIDUAL_INITIALISATIONS):
        raise ValueError(
            f"{source}: init_lora_weights={start!r} changed the base weights too, so the factors are not the "
            "update: save with path_initial_model_for_weight_conversion"
        )
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float):
            raise ValueError(f"{source}: {key!r} is {config.get(key)!r}, a number was expected")


def _by_pattern(patterns: Mapping[str, float] | None, layer: str, default: float) -> float:
    """The value of the first pattern that matches the end of the layer's name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return default
