"""Reading PEFT's folders without PEFT: LoRA with all its scalings, DoRA, OSF, our EBLoRA, and StelLA's."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from analysis.formats.base_updates import DoraAdapter, OsfAdapter
from analysis.formats.checkpoints import Checkpoint
from analysis.formats.files import INDEX, is_file, number, read_json, shards_of, stored_shapes
from analysis.formats.own import own_entry, require_sizes, tensors_of
from analysis.formats.patterns import first_suffix_matches
from analysis.formats.sources import Entry, Shape, StoredAdapter
from analysis.names import listed, natural_key, unwrapped

CONFIG = "adapter_config.json"
FILES = ("adapter_model.safetensors", "adapter_model.bin")
INDICES = (f"adapter_model.safetensors{INDEX}", f"model.safetensors{INDEX}")
"""Names of the index of an adapter in shards; transformers writes the second."""
# What changes ΔW into something else than scaling · B A, or takes part of it from tensors that are not read.
_UNSUPPORTED = {
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
_KNOWN = {
    *_UNSUPPORTED,
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out"),
    *("bias", "use_rslora", "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "alpha_pattern", "megatron_config", "megatron_core", "trainable_token_indices"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "use_dora", "qalora_group_size"),
    *("runtime_config", "ensure_weight_tying", "velora_config"),
}
"""Options of PEFT's LoRA that are read, that do not change the update, or that are refused."""
# These write the base model's weights at initialisation, so B A alone is not the change of the weight.
_RESIDUAL_INITIALISATIONS = ("pissa", "olora", "corda", "loftq", "lora_ga")
PeftAdapter = StoredAdapter | DoraAdapter | OsfAdapter
_STELLA = re.compile(r"(?P<layer>.+)\.stella_(?P<part>U|S|Vt?)(\.default)?(\.weight)?$")
_LORA = re.compile(r"(?P<stem>.+)\.lora_(?:(?P<part>[AB])\.weight|embedding_(?P<embedding>[AB]))")
_MAGNITUDE = re.compile(r"(?P<stem>.+)\.lora_magnitude_vector(?:\.weight)?")


@dataclass(frozen=True)
class _Files:
    """What the readers of all methods share: names and shapes of the tensors, and the configuration."""

    folder: Path
    source: Path
    path: Path
    config: Mapping[str, Any]
    stored: Mapping[str, tuple[int, ...]]
    model: str | None


def read_peft(folder: Path, *, base: Checkpoint | None = None) -> PeftAdapter:
    """The update in a PEFT folder, ``adapter_config.json`` with ``adapter_model.safetensors`` or ``.bin``, or shards.

    LoRA's scaling is ``alpha / r``, or ``alpha / sqrt(r)`` for rank-stabilised LoRA, with alpha and r from the
    patterns where they match, as PEFT itself matches them. ``fan_in_fan_out`` says how the *base* weight is
    stored; B and A keep their meaning, so ΔW is (out, in) here for such layers too, and they are `transposed`.
    Factors of embeddings act on one-hot inputs, and their weight is stored transposed too.
    Parameters that PEFT saved in full beside the adapter have no factors: they are named in the notices.
    DoRA and OSF change the weight by an amount that depends on it and need `base`.
    """
    source = folder / CONFIG
    config = read_json(source)
    kind, model = config.get("peft_type"), config.get("base_model_name_or_path")
    readers: dict[Any, Callable[[_Files, Checkpoint | None], tuple[PeftAdapter, set[str]]]] = {
        "EBLORA": _read_eblora,
        "LORA": _read_lora,
        "OSF": _read_osf,
        "STELLA": _read_stella,
    }
    if not isinstance(kind, str) or kind not in readers:
        raise ValueError(f"{source}: peft_type is {kind!r}, only {', '.join(map(repr, readers))} are supported")
    if not isinstance(model, str | None):
        raise ValueError(f"{source}: 'base_model_name_or_path' is {model!r}, text was expected")
    turned = _flag(source, config, "fan_in_fan_out")
    if kind == "LORA":
        check_lora(source, config)
    path = tensor_file(folder)
    stored = stored_shapes(path)
    found, read = readers[kind](_Files(folder, source, path, config, stored, model), base)
    notices = []
    if rest := [name for name in sorted(stored, key=natural_key) if name not in read]:
        notices.append(f"saved in full beside the factors, so not part of the update: {listed(rest)}")
    unread = [name for name in (*FILES, *INDICES) if name != path.name and is_file(folder / name)]
    if unread := [name for name in unread if name in FILES or is_adapter_index(folder / name)]:
        notices.append(f"{listed(unread)} is there too and was not read, {path.name} was")
    if _flag(source, config, "ensure_weight_tying") and found.embeddings:
        notices.append("the model's output is tied to its embedding and has the same update, which is not listed")
    if kind == "LORA" and (odd := [key for key in config if key not in _KNOWN and config[key]]):
        notices.append(f"options of {CONFIG} that are not known here and not read: {listed(odd)}")
    turned_layers = frozenset(found.shapes) if turned else found.embeddings
    return replace(found, transposed=turned_layers, notices=tuple(notices))


def tensor_file(folder: Path) -> Path:
    """The file of a PEFT folder's tensors, or the index of its shards.

    Raises:
        FileNotFoundError: there is none.
    """
    for name in (*FILES, *INDICES):
        file = folder / name
        if is_file(file) and (name in FILES or is_adapter_index(file)):
            return file
    if shards := sorted(path.name for path in folder.glob("adapter_model-*-of-*")):
        raise FileNotFoundError(
            f"{folder} holds shards without an index, {listed(shards)}: looked for {' and '.join(INDICES)}"
        )
    raise FileNotFoundError(f"{folder / FILES[0]} does not exist")


def is_adapter_index(index: Path) -> bool:
    """Whether the shards that an index names are those of an adapter, not of a model."""
    return all(shard.name.startswith("adapter_") for shard in shards_of(index).values())


def _layers(path: Path, stems: Iterable[str]) -> dict[str, str]:
    """Layer to the start of its tensors' names, in the order of the model."""
    layers: dict[str, str] = {}
    for stem in stems:
        if layers.setdefault(unwrapped(stem), stem) != stem:
            raise ValueError(f"{path}: {stem} and {layers[unwrapped(stem)]} are the same layer")
    return {layer: layers[layer] for layer in sorted(layers, key=natural_key)}


def _read_lora(files: _Files, base: Checkpoint | None) -> tuple[PeftAdapter, set[str]]:
    source, path, stored, config = files.source, files.path, files.stored, files.config
    factors: dict[str, bool] = {}
    magnitudes: dict[str, str] = {}
    for name in stored:
        if magnitude := _MAGNITUDE.fullmatch(name):
            magnitudes[magnitude["stem"]] = name
        elif factor := _LORA.fullmatch(name):
            embedding = factor["embedding"] is not None
            if factors.setdefault(factor["stem"], embedding) != embedding:
                raise ValueError(f"{path}: {factor['stem']} has factors of an embedding and of a linear layer")
        elif ".lora_" in name:
            raise ValueError(f"{path}: {name} is not supported; only lora_A, lora_B and lora_embedding_A and _B are")
    if not factors:
        raise ValueError(f"{path} holds no lora_A and lora_B tensors")
    layers = _layers(path, factors)
    own = [stem.removeprefix("base_model.model.") for stem in layers.values()]
    ranks = by_pattern(source, config, "rank_pattern", own, config["r"])
    alphas = by_pattern(source, config, "alpha_pattern", own, config["lora_alpha"])
    stable = _flag(source, config, "use_rslora")
    entries: dict[str, Entry] = {}
    for (layer, stem), configured, alpha in zip(layers.items(), ranks, alphas, strict=True):
        names = ("lora_embedding_B", "lora_embedding_A") if factors[stem] else ("lora_B.weight", "lora_A.weight")
        left, right = (f"{stem}.{name}" for name in names)
        for part in (left, right):
            if len(stored.get(part, ())) != 2:
                raise ValueError(
                    f"{path}: {part} has shape {stored.get(part)}, a matrix was expected (no convolutions)"
                )
        (m, r), (rank, n) = stored[left], stored[right]
        if not r == rank == configured:
            raise ValueError(f"{path}: {layer} has ranks {r} and {rank}, {source.name} says {configured}")
        require_sizes(path, layer, (m, n, r))
        entries[layer] = Entry(left, right, (m, n, r), alpha / (math.sqrt(r) if stable else r), right_is_wide=True)
    read = {name for entry in entries.values() for name in tensors_of(entry)}
    embeddings = frozenset(layer for layer, stem in layers.items() if factors[stem])
    plain = StoredAdapter(files.folder.name, "lora", path, entries, files.model, embeddings=embeddings)
    if not _flag(source, config, "use_dora"):
        if magnitudes:
            raise ValueError(f"{path}: {next(iter(magnitudes.values()))} is there, but use_dora is not set")
        return plain, read
    if missing := [layer for layer, stem in layers.items() if stem not in magnitudes]:
        raise ValueError(f"{path}: use_dora is set, but {missing[0]} has no lora_magnitude_vector")
    if lone := magnitudes.keys() - layers.values():
        raise ValueError(f"{path}: {magnitudes[min(lone)]} has no lora_A and lora_B")
    named = {layer: magnitudes[stem] for layer, stem in layers.items()}
    for layer, name in named.items():
        if math.prod(stored[name]) != entries[layer].shape[0]:
            raise ValueError(f"{path}: {name} has shape {stored[name]}, {entries[layer].shape[0]} rows need one each")
    return DoraAdapter(plain, named, _needed(source, base, "DoRA"), embeddings=embeddings), read | {*named.values()}


def _read_osf(files: _Files, base: Checkpoint | None) -> tuple[PeftAdapter, set[str]]:
    path, stored = files.path, files.stored
    stems = [name.removesuffix(".osf_svd_params.U_low") for name in stored if name.endswith(".osf_svd_params.U_low")]
    if not stems:
        raise ValueError(f"{path} holds no osf_svd_params tensors")
    layers: dict[str, tuple[str, Shape]] = {}
    read: set[str] = set()
    for layer, start in _layers(path, stems).items():
        stem = f"{start}.osf_svd_params"
        high, wide = stored[f"{stem}.U_low"], stored.get(f"{stem}.V_low", ())
        if len(high) != 2 or len(wide) != 2 or wide[0] != high[1] or stored.get(f"{stem}.S_low") != (high[1],):
            raise ValueError(f"{path}: {stem} needs U_low (m, d), S_low (d,) and V_low (d, n)")
        require_sizes(path, layer, (high[0], wide[1], high[1]))
        layers[layer] = (stem, (high[0], wide[1], 2 * high[1]))
        read |= {f"{stem}.{part}" for part in ("U_low", "S_low", "V_low")}
    needed = _needed(files.source, base, "OSF")
    return OsfAdapter(files.folder.name, path, layers, needed, files.model), read


def _read_eblora(files: _Files, base: Checkpoint | None) -> tuple[PeftAdapter, set[str]]:
    """``(alpha / r) left S rightᵀ`` of our own PEFT method, without a compensated start."""
    path, stored, config = files.path, files.stored, files.config
    stems = [name.removesuffix(".eblora_left") for name in stored if name.endswith(".eblora_left")]
    if not stems:
        raise ValueError(f"{path} holds no eblora_left tensors")
    layers = _layers(path, stems)
    own = [stem.removeprefix("base_model.model.") for stem in layers.values()]
    alpha = config.get("alpha")
    usual = math.nan if alpha is None else number(files.source, "alpha", alpha)
    alphas = by_pattern(files.source, config, "alpha_pattern", own, usual)
    entries = {}
    for (layer, start), alpha in zip(layers.items(), alphas, strict=True):
        stem = f"{start}.eblora_"
        shapes = [stored.get(f"{stem}{part}", ()) for part in ("left", "right")]
        if any(len(shape) != 2 for shape in shapes) or shapes[0][1] != shapes[1][1] or f"{stem}scale" not in stored:
            raise ValueError(f"{path}: {layer} needs eblora_left (m, r), eblora_right (n, r) and eblora_scale")
        (m, r), n = shapes[0], shapes[1][0]
        require_sizes(path, layer, (m, n, r))
        scaling = 1.0 if math.isnan(alpha) else alpha / r
        entries[layer] = own_entry(path, stored, stem, f"{stem}start.", (m, n, r), scaling)
    read = {name for entry in entries.values() for name in tensors_of(entry)}
    return StoredAdapter(files.folder.name, "eblora", path, entries, files.model), read


def _read_stella(files: _Files, base: Checkpoint | None) -> tuple[PeftAdapter, set[str]]:
    """``(alpha / r) U S Vᵀ`` with orthonormal U and V and a full or diagonal S."""
    path, stored, config = files.path, files.stored, files.config
    _check_numbers(files.source, config)
    parts: dict[str, dict[str, str]] = {}
    for name in stored:
        if match := _STELLA.match(name):
            parts.setdefault(match["layer"], {})[match["part"]] = name
    if not parts:
        raise ValueError(f"{path} holds no stella_U, stella_S and stella_V (or stella_Vt) tensors")
    layers = _layers(path, parts)
    own = [stem.removeprefix("base_model.model.") for stem in layers.values()]
    alphas = by_pattern(files.source, config, "alpha_pattern", own, config["lora_alpha"])
    entries = {}
    for (layer, stem), alpha in zip(layers.items(), alphas, strict=True):
        found = parts[stem]
        wide = "Vt" in found
        right = found.get("Vt") or found.get("V") or ""
        left, core = found.get("U", ""), found.get("S")
        shapes = (stored.get(left, ()), stored.get(right, ()), stored.get(core or "", ()))
        if len(shapes[0]) != 2 or len(shapes[1]) != 2 or core is None:
            raise ValueError(f"{path}: {layer} needs stella_U, stella_S and stella_V or stella_Vt, found {found}")
        m, r = shapes[0]
        n, rank = shapes[1][::-1] if wide else shapes[1]
        if r != rank or shapes[2] not in ((r,), (r, r), ()):
            raise ValueError(f"{path}: {layer} has stella_U {shapes[0]}, stella_S {shapes[2]}, stella_V {shapes[1]}")
        require_sizes(path, layer, (m, n, r))
        entries[layer] = Entry(left, right, (m, n, r), alpha / r, core, right_is_wide=wide)
    read = {name for entry in entries.values() for name in tensors_of(entry)}
    return StoredAdapter(files.folder.name, "stella", path, entries, files.model), read


def _needed(source: Path, base: Checkpoint | None, kind: str) -> Checkpoint:
    if base is None:
        raise ValueError(f"{source}: {kind}'s update depends on the base weight: give the base checkpoint (base=)")
    return base


def check_lora(source: Path, config: Mapping[str, Any]) -> None:
    """Accept a LoRA configuration whose update is ``scaling · B A``.

    Raises:
        ValueError: an option changes the update into something else, or a number is none.
    """
    for option, reason in _UNSUPPORTED.items():
        if config.get(option):
            raise ValueError(f"{source}: {option} is set and not supported: {reason}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_RESIDUAL_INITIALISATIONS):
        raise ValueError(
            f"{source}: init_lora_weights={start!r} changed the base weights too, so the factors are not the "
            "update: save with path_initial_model_for_weight_conversion"
        )
    _check_numbers(source, config)


def _check_numbers(source: Path, config: Mapping[str, Any]) -> None:
    for key in ("r", "lora_alpha"):
        number(source, key, config.get(key))
    if not config["r"] > 0:
        raise ValueError(f"{source}: 'r' is {config['r']!r}, a rank of at least 1 was expected")


def _flag(source: Path, config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{source}: {key!r} is {value!r}, true or false was expected")
    return bool(value)


def by_pattern(source: Path, config: Mapping[str, Any], key: str, layers: Iterable[str], default: float) -> list[float]:
    """For each layer the value of the first pattern that matches the end of its name, or the default.

    Raises:
        ValueError: the patterns are no object of numbers, are no regular expressions, or do not end in time.
    """
    layers, patterns = list(layers), config.get(key) or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{source}: {key!r} is {patterns!r:.80}, an object from patterns to numbers was expected")
    values = [number(source, f"{key}: {pattern}", value) for pattern, value in patterns.items()]
    try:
        matches = first_suffix_matches(list(patterns), layers)
    except ValueError as error:
        raise ValueError(f"{source}: {key!r}: {error}") from error
    return [default if match is None else values[match] for match in matches]
