"""Reading PEFT's LoRA folders without PEFT."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from analysis.formats import Entry, StoredAdapter, open_tensors, read_json
from analysis.names import natural_key

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
        entries[layer] = Entry(left, right, (m, n, r), scaling, right_is_wide=True)
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
