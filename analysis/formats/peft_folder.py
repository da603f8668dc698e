"""Reading PEFT's folders without PEFT: LoRA with all its scalings, DoRA, OSF, our EBLoRA, and StelLA's."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from analysis.formats.checkpoints import Checkpoint
from analysis.formats.on_base import DoraAdapter, OsfAdapter
from analysis.formats.own import own_entry
from analysis.formats.sources import Entry, Shape, StoredAdapter
from analysis.formats.tensor_files import read_json, stored_shapes
from analysis.names import natural_key

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
# These write the base model's weights at initialisation, so B A alone is not the change of the weight.
_RESIDUAL_INITIALISATIONS = ("pissa", "olora", "corda", "loftq", "lora_ga")
PeftAdapter = StoredAdapter | DoraAdapter | OsfAdapter
_STELLA = re.compile(r"(?P<layer>.+)\.stella_(?P<part>U|S|Vt?)(\.default)?(\.weight)?$")


def read_peft(folder: Path, *, base: Checkpoint | None = None) -> PeftAdapter:
    """The update in a PEFT folder, ``adapter_config.json`` with ``adapter_model.safetensors`` or ``.bin``.

    LoRA's scaling is ``alpha / r``, or ``alpha / sqrt(r)`` for rank-stabilised LoRA, with alpha and r from the
    patterns where they match, as PEFT itself matches them. ``fan_in_fan_out`` says how the *base* weight is
    stored; B and A keep their meaning, so ΔW is (out, in) here for such layers too, and they are `transposed`.
    Tensors without ``lora_`` in their name are whole parameters that PEFT saved beside the adapter: they have no
    factors and are skipped.
    DoRA and OSF change the weight by an amount that depends on it and need `base`.
    """
    source = folder / "adapter_config.json"
    config = read_json(source)
    path = folder / "adapter_model.safetensors"
    if not path.exists() and (folder / "adapter_model.bin").exists():
        path = folder / "adapter_model.bin"
    kind = config.get("peft_type")
    readers: dict[Any, Callable[..., PeftAdapter]] = {
        "EBLORA": _read_eblora,
        "LORA": _read_lora,
        "OSF": _read_osf,
        "STELLA": _read_stella,
    }
    if kind not in readers:
        raise ValueError(f"{source}: peft_type is {kind!r}, only {', '.join(map(repr, readers))} are supported")
    found = readers[kind](folder, path, config, base)
    return replace(found, transposed=frozenset(found.shapes)) if config.get("fan_in_fan_out") else found


def _read_lora(folder: Path, path: Path, config: Mapping[str, Any], base: Checkpoint | None) -> PeftAdapter:
    source = folder / "adapter_config.json"
    _check_lora(source, config)
    stored = stored_shapes(path)
    entries, magnitudes = {}, {}
    for name in stored:
        if "lora_" not in name:
            continue
        if name.endswith((".lora_magnitude_vector", ".lora_magnitude_vector.weight")):
            stem = name.removesuffix(".weight").removesuffix(".lora_magnitude_vector")
            magnitudes[stem.removeprefix("base_model.model.")] = name
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
        entries[layer] = Entry(left, right, (m, n, r), scaling, right_is_wide=True)
    if not entries:
        raise ValueError(f"{path} holds no lora_A and lora_B tensors")
    ordered = {layer: entries[layer] for layer in sorted(entries, key=natural_key)}
    plain = StoredAdapter(folder.name, "lora", path, ordered, config.get("base_model_name_or_path"))
    if not config.get("use_dora"):
        if magnitudes:
            raise ValueError(f"{path}: {next(iter(magnitudes.values()))} is there, but use_dora is not set")
        return plain
    if missing := [layer for layer in ordered if layer not in magnitudes]:
        raise ValueError(f"{path}: use_dora is set, but {missing[0]} has no lora_magnitude_vector")
    return DoraAdapter(plain, magnitudes, _needed(source, base, "DoRA"))


def _read_osf(folder: Path, path: Path, config: Mapping[str, Any], base: Checkpoint | None) -> PeftAdapter:
    stored = stored_shapes(path)
    layers: dict[str, tuple[str, Shape]] = {}
    for name, shape in stored.items():
        if not name.endswith(".osf_svd_params.U_low"):
            continue
        stem = name.removesuffix(".U_low")
        width = stored.get(f"{stem}.V_low", (0, 0))
        if len(width) != 2 or width[0] != shape[1] or stored.get(f"{stem}.S_low") != (shape[1],):
            raise ValueError(f"{path}: {stem} needs U_low (m, d), S_low (d,) and V_low (d, n)")
        layer = stem.removesuffix(".osf_svd_params").removeprefix("base_model.model.")
        layers[layer] = (stem, (shape[0], width[1], 2 * shape[1]))
    if not layers:
        raise ValueError(f"{path} holds no osf_svd_params tensors")
    ordered = {layer: layers[layer] for layer in sorted(layers, key=natural_key)}
    needed = _needed(folder / "adapter_config.json", base, "OSF")
    return OsfAdapter(folder.name, path, ordered, needed, config.get("base_model_name_or_path"))


def _read_eblora(folder: Path, path: Path, config: Mapping[str, Any], base: Checkpoint | None) -> PeftAdapter:
    """``(alpha / r) left S rightᵀ`` of our own PEFT method, without a compensated start."""
    stored = stored_shapes(path)
    entries = {}
    for name in sorted(stored, key=natural_key):
        if not name.endswith(".eblora_left"):
            continue
        stem = name.removesuffix("left")
        layer = name.removesuffix(".eblora_left").removeprefix("base_model.model.")
        shapes = [stored.get(f"{stem}{part}", ()) for part in ("left", "right", "scale")]
        if any(len(shape) != 2 for shape in shapes[:2]) or shapes[0][1] != shapes[1][1] or not shapes[2]:
            raise ValueError(f"{path}: {layer} needs eblora_left (m, r), eblora_right (n, r) and eblora_scale")
        (m, r), n = shapes[0], shapes[1][0]
        alpha = _by_pattern(config.get("alpha_pattern"), layer, config.get("alpha") or r)
        entries[layer] = own_entry(stored, stem, f"{stem}start.", (m, n, r), alpha / r)
    if not entries:
        raise ValueError(f"{path} holds no eblora_left tensors")
    return StoredAdapter(folder.name, "eblora", path, entries, config.get("base_model_name_or_path"))


def _read_stella(folder: Path, path: Path, config: Mapping[str, Any], base: Checkpoint | None) -> PeftAdapter:
    """``(alpha / r) U S Vᵀ`` with orthonormal U and V and a full or diagonal S."""
    source = folder / "adapter_config.json"
    _check_numbers(source, config)
    stored = stored_shapes(path)
    parts: dict[str, dict[str, str]] = {}
    for name in stored:
        if match := _STELLA.match(name):
            layer = match["layer"].removeprefix("base_model.model.")
            parts.setdefault(layer, {})[match["part"]] = name
    if not parts:
        raise ValueError(f"{path} holds no stella_U, stella_S and stella_V (or stella_Vt) tensors")
    entries = {}
    for layer in sorted(parts, key=natural_key):
        found = parts[layer]
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
        alpha = _by_pattern(config.get("alpha_pattern"), layer, config["lora_alpha"])
        entries[layer] = Entry(left, right, (m, n, r), alpha / r, core, right_is_wide=wide)
    return StoredAdapter(folder.name, "stella", path, entries, config.get("base_model_name_or_path"))


def _needed(source: Path, base: Checkpoint | None, kind: str) -> Checkpoint:
    if base is None:
        raise ValueError(f"{source}: {kind}'s update depends on the base weight: give the base checkpoint (base=)")
    return base


def _check_lora(source: Path, config: Mapping[str, Any]) -> None:
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
        if not isinstance(config.get(key), int | float):
            raise ValueError(f"{source}: {key!r} is {config.get(key)!r}, a number was expected")


def _by_pattern(patterns: Mapping[str, float] | None, layer: str, default: float) -> float:
    """The value of the first pattern that matches the end of the layer's name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return default
