"""Configurations of PEFT: options that change the update, and one scaling per layer."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.formats.files import number
from analysis.formats.patterns import first_suffix_matches

Config = Mapping[str, Any]
# These make the update something else than scaling · B A, or keep a part of it in tensors that are not read.
_UNSUPPORTED = {
    "use_qalora": "QALoRA pools its inputs",
    "use_bdlora": "block-diagonal factors are stored in another layout",
    "kasa_config": "KaSA keeps singular values between its factors and truncates the base weight",
    "monteclora_config": "MonteCLoRA samples its factors",
    "arrow_config": "Arrow routes between several adapters",
    "alora_invocation_tokens": "an activated LoRA is never added to the weight",
    "layer_replication": "replicated layers share one base weight",
}
KNOWN_OPTIONS = {
    *_UNSUPPORTED,
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out"),
    *("bias", "use_rslora", "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "alpha_pattern", "megatron_config", "megatron_core", "trainable_token_indices"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "use_dora", "qalora_group_size"),
    *("runtime_config", "ensure_weight_tying", "velora_config", "lora_bias"),
    "target_parameters",
}
"""Options of PEFT's LoRA that are read, that do not change the update, or that are refused."""
# These also change the base weights at initialisation, so B A alone is not the update.
_RESIDUAL_INITIALISATIONS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def validate_lora(path: Path, config: Config) -> None:
    """Accept a LoRA configuration whose update is ``scaling · B A``; ValueError otherwise."""
    for option, reason in _UNSUPPORTED.items():
        if config.get(option):
            raise ValueError(f"{path}: {option} is set and not supported: {reason}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_RESIDUAL_INITIALISATIONS):
        problem = "changed the base weights too, so the factors are not the update"
        remedy = "save with path_initial_model_for_weight_conversion"
        raise ValueError(f"{path}: init_lora_weights={start!r} {problem}: {remedy}")
    validate_rank_and_alpha(path, config)


def validate_rank_and_alpha(path: Path, config: Config) -> None:
    """Accept a finite ``lora_alpha`` and a positive ``r``; ValueError otherwise."""
    for key in ("r", "lora_alpha"):
        number(path, key, config.get(key))
    if not config["r"] > 0:
        raise ValueError(f"{path}: 'r' is {config['r']!r}, a rank of at least 1 was expected")


def flag(path: Path, config: Config, key: str) -> bool:
    """An option that is true, false, null or missing; ValueError for another value."""
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{path}: {key!r} is {value!r}, true or false was expected")
    return bool(value)


def lora_scalings(path: Path, config: Config, stems: Sequence[str]) -> list[tuple[float, float]]:
    """Configured rank of each layer, and its scaling: ``alpha / r``, or ``alpha / √r`` if rank-stabilised."""
    ranks = by_pattern(path, config, "rank_pattern", stems, config["r"])
    if invalid := [rank for rank in ranks if not rank > 0]:
        raise ValueError(f"{path}: 'rank_pattern' gives the rank {invalid[0]:g}, at least 1 was expected")
    alphas = by_pattern(path, config, "alpha_pattern", stems, config["lora_alpha"])
    stable = flag(path, config, "use_rslora")
    return [(r, alpha / (math.sqrt(r) if stable else r)) for r, alpha in zip(ranks, alphas, strict=True)]


def by_pattern(path: Path, config: Config, key: str, stems: Iterable[str], default: float) -> list[float]:
    """The value for each layer: that of the first pattern that matches the end of its name, or the default."""
    names, patterns = [stem.removeprefix("base_model.model.") for stem in stems], config.get(key) or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{path}: {key!r} is {patterns!r:.80}, an object from patterns to numbers was expected")
    values = [number(path, f"{key}: {pattern}", value) for pattern, value in patterns.items()]
    try:
        matches = first_suffix_matches(list(patterns), names)
    except ValueError as error:
        raise ValueError(f"{path}: {key!r}: {error}") from error
    return [default if match is None else values[match] for match in matches]
