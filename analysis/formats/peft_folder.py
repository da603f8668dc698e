"""PEFT's folders, read without PEFT: LoRA with all its scalings, DoRA, OSF, our EBLoRA, StelLA's, and `METHODS`."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from analysis.formats import peft_config
from analysis.formats.bare_parameters import bare_parameters, experts_of
from analysis.formats.base_updates import dora_adapter, osf_adapter
from analysis.formats.checkpoints import Checkpoint
from analysis.formats.files import INDEX, is_file, number, read_json, shards_of, stored_shapes
from analysis.formats.peft_config import flag
from analysis.formats.peft_methods import METHODS, PeftFiles
from analysis.formats.sources import BareParameter, LayerTensors, LeftOut, Source, StoredAdapter, kernels_of, shapes_of
from analysis.formats.tensor_names import OUT_OF_ATTENTION, StoredLayer, parse_name, stored_layers
from analysis.names import listed, natural_key

CONFIG = "adapter_config.json"
FILES = ("adapter_model.safetensors", "adapter_model.bin")
INDICES = (f"adapter_model.safetensors{INDEX}", f"model.safetensors{INDEX}")
"""Names of the index of an adapter in shards; transformers writes the second."""


def read_peft(folder: Path, *, base: Checkpoint | None = None) -> Source:
    """The update in a PEFT folder, ``adapter_config.json`` with ``adapter_model.safetensors`` or ``.bin``, or shards.

    LoRA's scaling is ``alpha / r``, or ``alpha / sqrt(r)`` for rank-stabilised LoRA, with alpha and r from the
    patterns where they match, as PEFT itself matches them. ``fan_in_fan_out`` says how the *base* weight is
    stored; B and A keep their meaning, so ΔW is (out, in) here for such layers too, and they are `transposed`.
    Factors of embeddings act on one-hot inputs, and their weight is stored transposed too.
    Parameters that PEFT saved in full beside the adapter have no factors: they are named in the notices.
    DoRA and OSF change the weight by an amount that depends on it and need `base`. Without a file of a usual name, the
    only one with LoRA factors is read.
    """
    source = folder / CONFIG
    config = read_json(source)
    method, model = config.get("peft_type"), config.get("base_model_name_or_path")
    if not isinstance(method, str) or method not in _READERS:
        raise ValueError(
            f"{source}: peft_type is {method!r}, only {', '.join(map(repr, sorted(_READERS)))} are supported"
        )
    if not isinstance(model, str | None):
        raise ValueError(f"{source}: 'base_model_name_or_path' is {model!r}, text was expected")
    fan_in_fan_out = flag(source, config, "fan_in_fan_out")
    if method == "LORA":
        peft_config.validate_lora(source, config)
    path = tensor_file(folder)
    files = _Folder(folder, source, config, path, stored_shapes(path), base)
    update, read = _READERS[method](files)
    transposed = frozenset(update.shapes) if fan_in_fan_out else update.embeddings
    update = replace(update, base=model, transposed=transposed)
    return update.noting(_notices(files, read, update, method), _left_out(files, read))


@dataclass(frozen=True)
class _Folder:
    """A PEFT folder: its configuration, names and shapes of its tensors, and the base model."""

    folder: Path
    source: Path
    config: Mapping[str, Any]
    path: Path
    stored: Mapping[str, tuple[int, ...]]
    base: Checkpoint | None

    def layers(self, method: str, tensors: str) -> dict[str, StoredLayer]:
        """Layer to its tensors; refuses a folder without `tensors`."""
        layers = stored_layers(self.path, self.stored, method)
        if not layers:
            raise ValueError(f"{self.path} holds no {tensors}")
        for layer, (_, parts) in layers.items():
            if method != "lora" and not ({"left", "core"} <= parts.keys() and parts.keys() & {"right", "wide_right"}):
                raise ValueError(f"{self.path}: {layer} needs {tensors}, it has {', '.join(parts.values())}")
        return layers

    def alphas(self, layers: Mapping[str, StoredLayer], default: float) -> list[float]:
        """Alpha of each layer by ``alpha_pattern``."""
        stems = [each.stem for each in layers.values()]
        return peft_config.by_pattern(self.source, self.config, "alpha_pattern", stems, default)

    def adapter(
        self, method: str, layers: Mapping[str, StoredLayer], alphas: Sequence[float | None] | None = None
    ) -> StoredAdapter:
        """The update of these layers, each with scaling ``alpha / r``; 1 without alphas."""
        known = zip(layers.items(), alphas or [None] * len(layers), strict=True)
        find = partial(LayerTensors.find, self.path, self.stored)
        return self.stored_adapter(method, {layer: find(parts, alpha=alpha) for (layer, (_, parts)), alpha in known})

    def stored_adapter(
        self, method: str, layers: Mapping[str, LayerTensors], embeddings: frozenset[str] = frozenset()
    ) -> StoredAdapter:
        """The update of these layers."""
        shared: dict[str, Any] = {"task": self.folder.name, "path": self.path, "embeddings": embeddings}
        shared["kernels"] = kernels_of(layers, self.stored)
        return StoredAdapter(**shared, kind=method, shapes=shapes_of(layers), layers=layers)

    def needed_base(self, method: str) -> Checkpoint:
        """The base checkpoint; ValueError without one."""
        if self.base is not None:
            return self.base
        remedy = "give the base checkpoint (base=)"
        raise ValueError(f"{self.source}: {method}'s update depends on the base weight: {remedy}")


Read = tuple[Source, set[str]]
"""An update, and the names of the tensors that it is read from."""


def _notices(files: _Folder, read: set[str], update: Source, method: str) -> list[str]:
    """Phrases that name the contents of the folder beside the update."""
    notices = []
    if rest := sorted(files.stored.keys() - read, key=natural_key):
        notices.append(f"saved in full beside the factors, so not part of the update: {listed(rest)}")
    if files.path.name not in (*FILES, *INDICES):
        notices.append(f"the tensors are those of {files.path.name}, the only file of factors beside {CONFIG}")
    if others := _other_files(files):
        notices.append(f"{listed(others)} is there too and was not read, {files.path.name} was")
    if any(layer.endswith(OUT_OF_ATTENTION) for layer in update.shapes):
        notices.append("PEFT adds the update of out_proj in a MultiheadAttention twice, so twice of it is read")
    if flag(files.source, files.config, "ensure_weight_tying") and update.embeddings:
        notices.append("the model's output is tied to its embedding and has the same update, which is not listed")
    unknown = [key for key, value in files.config.items() if key not in peft_config.KNOWN_OPTIONS and value]
    if method == "LORA" and unknown:
        notices.append(f"options of {CONFIG} that are not known here and not read: {listed(unknown)}")
    return notices


def _other_files(files: _Folder) -> list[str]:
    """Names of the files of tensors that are not read."""
    others = [name for name in (*FILES, *INDICES) if name != files.path.name and is_file(files.folder / name)]
    known = [name for name in others if name in FILES or is_adapter_index(files.folder / name)]
    shards = {Path(name).name.partition(".")[0] for name in (*FILES, *INDICES)}
    further = [
        path.name
        for path in sorted(files.folder.glob("*.safetensors"))
        if path != files.path and path.name not in FILES and path.stem.partition("-")[0] not in shards
    ]
    return known + further


def _left_out(files: _Folder, read: set[str]) -> Iterator[LeftOut]:
    """The tensors and files that are not part of the update, each with its reason."""
    saved = files.config.get("modules_to_save")
    modules = {name for name in saved if isinstance(name, str)} if isinstance(saved, list) else set()
    for name in sorted(files.stored.keys() - read, key=natural_key):
        components = set(name.split("."))
        reason = "saved in full beside the factors"
        if "trainable_tokens_delta" in name or "token_adapter" in components:
            reason = "new rows of an embedding (trainable_token_indices)"
        elif components & modules:
            reason = "module saved in full (modules_to_save)"
        elif name.endswith("bias"):
            reason = "bias"
        yield LeftOut(str(files.path), name, reason)
    for name in _other_files(files):
        yield LeftOut(str(files.folder / name), "", f"{files.path.name} was read in its place")


def tensor_file(folder: Path) -> Path:
    """The file of a PEFT folder's tensors, or the index of its shards; FileNotFoundError without either."""
    for name in (*FILES, *INDICES):
        file = folder / name
        if is_file(file) and (name in FILES or is_adapter_index(file)):
            return file
    if shards := sorted(path.name for path in folder.glob("adapter_model-*-of-*")):
        names = " and ".join(INDICES)
        raise FileNotFoundError(f"{folder} holds shards without an index, {listed(shards)}: looked for {names}")
    if renamed := renamed_file(folder):
        return renamed
    raise FileNotFoundError(f"{folder / FILES[0]} does not exist")


def renamed_file(folder: Path) -> Path | None:
    """The only safetensors file with PEFT's factors in a folder that has no file of a usual name; None otherwise."""
    if any((folder / name).exists() for name in (*FILES, *INDICES)) or any(folder.glob("adapter_model-*-of-*")):
        return None
    files = (path for path in sorted(folder.glob("*.safetensors")) if is_file(path))
    named = [path for path in files if any(map(_is_of_peft, stored_shapes(path)))]
    return named[0] if len(named) == 1 else None


def _is_of_peft(name: str) -> bool:
    parsed = parse_name(name)
    return parsed is not None and parsed.method == "lora"


def is_adapter_index(index: Path) -> bool:
    """Whether the shards that an index names are those of an adapter, not of a model."""
    return all(shard.name.startswith("adapter_") for shard in shards_of(index).values())


def _read_lora(files: _Folder) -> Read:
    path, config = files.path, files.config
    for name in files.stored:
        parsed = parse_name(name)
        if ".lora_" in name and not name.endswith(".bias") and (parsed is None or parsed.method != "lora"):
            raise ValueError(f"{path}: {name} is not supported; only lora_A, lora_B and lora_embedding_A and _B are")
    parts_of = files.layers("lora", "lora_A and lora_B tensors")
    factors = {layer: {part for part in each.parts if part != "magnitude"} for layer, each in parts_of.items()}
    embeddings = {layer for layer, parts in factors.items() if parts & {"embedding_left", "embedding_wide_right"}}
    targets = config.get("target_parameters")
    bare = bare_parameters(path, files.source, targets, parts_of, files.stored, files.base)
    stems = [
        bare[layer].key if layer in bare else each.stem.removesuffix(OUT_OF_ATTENTION)
        for layer, each in parts_of.items()
    ]
    scalings = peft_config.lora_scalings(files.source, config, stems)
    scalings = [
        (rank, 2 * scaling if layer.endswith(OUT_OF_ATTENTION) else scaling)
        for layer, (rank, scaling) in zip(parts_of, scalings, strict=True)
    ]
    layers: dict[str, LayerTensors] = {}
    parameters: dict[str, BareParameter] = {}
    for (layer, (stem, parts)), (rank, scaling) in zip(parts_of.items(), scalings, strict=True):
        if layer in bare:
            for name, expert, origin in experts_of(path, bare[layer], parts_of[layer], files.stored, rank, scaling):
                layers[name], parameters[name] = expert, origin
            continue
        if layer in embeddings:
            if factors[layer] & {"left", "wide_right"}:
                raise ValueError(f"{path}: {stem} has factors of an embedding and of a linear layer")
            parts = {part.removeprefix("embedding_"): name for part, name in parts.items()}
        elif not factors[layer]:
            raise ValueError(f"{path}: {parts['magnitude']} has no lora_A and lora_B")
        layers[layer] = LayerTensors.find(path, files.stored, parts, scaling=scaling, kernels=layer not in embeddings)
        if layers[layer].shape[2] != rank:
            raise ValueError(f"{path}: {layer} has rank {layers[layer].shape[2]}, {files.source.name} says {rank:g}")
    layers = {layer: layers[layer] for layer in sorted(layers, key=natural_key)}
    adapter = replace(files.stored_adapter("lora", layers, frozenset(embeddings)), parameters=parameters)
    magnitudes = {layer: parts["magnitude"] for layer, (_, parts) in parts_of.items() if "magnitude" in parts}
    if not flag(files.source, config, "use_dora"):
        if magnitudes:
            raise ValueError(f"{path}: {next(iter(magnitudes.values()))} is there, but use_dora is not set")
        return adapter, adapter.names
    if missing := [layer for layer in parts_of if layer not in magnitudes]:
        raise ValueError(f"{path}: use_dora is set, but {missing[0]} has no lora_magnitude_vector")
    for layer, name in magnitudes.items():
        if math.prod(files.stored[name]) != layers[layer].shape[0]:
            rows = layers[layer].shape[0]
            raise ValueError(f"{path}: {name} has shape {files.stored[name]}, {rows} rows need one number each")
    update = dora_adapter(adapter, magnitudes, files.needed_base("DoRA"))
    return update, adapter.names | {*magnitudes.values()}


def _read_osf(files: _Folder) -> Read:
    adapter = files.adapter("osf", files.layers("osf", "U_low (m, d), S_low (d,) and V_low (d, n) of osf_svd_params"))
    return osf_adapter(adapter, files.needed_base("OSF")), adapter.names


def _read_eblora(files: _Folder) -> Read:
    """``(alpha / r) left S rightᵀ`` of our own PEFT method, without a compensated start; scaling 1 without alpha."""
    layers = files.layers("eblora", "eblora_left (m, r), eblora_right (n, r) and eblora_scale")
    given = files.config.get("alpha")
    alphas = files.alphas(layers, math.nan if given is None else number(files.source, "alpha", given))
    adapter = files.adapter("eblora", layers, [None if math.isnan(alpha) else alpha for alpha in alphas])
    return adapter, adapter.names


def _read_stella(files: _Folder) -> Read:
    """``(alpha / r) U S Vᵀ`` with orthonormal U and V and a full or diagonal S."""
    peft_config.validate_rank_and_alpha(files.source, files.config)
    layers = files.layers("stella", "stella_U, stella_S and stella_V or stella_Vt")
    adapter = files.adapter("stella", layers, files.alphas(layers, files.config["lora_alpha"]))
    return adapter, adapter.names


def _read_method(method: str, files: _Folder) -> Read:
    folder = PeftFiles(files.folder.name, files.source, files.config, files.path, files.stored, files.base)
    adapter = METHODS[method](folder)
    return adapter, adapter.names


_READERS: Mapping[str, Callable[[_Folder], Read]] = {
    "EBLORA": _read_eblora,
    "LORA": _read_lora,
    "OSF": _read_osf,
    "STELLA": _read_stella,
    **{method: partial(_read_method, method) for method in METHODS},
}
