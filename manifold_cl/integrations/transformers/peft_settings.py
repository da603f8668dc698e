"""Options of a method from a PEFT configuration, and the base of a PEFT model; read without importing PEFT."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any, cast

import torch
from torch import nn

SAME: dict[str, dict[str, str]] = {
    "LORA": {"r": "rank", "lora_alpha": "alpha", "target_modules": "targets"},
    "EBLORA": {"r": "rank", "alpha": "alpha", "target_modules": "targets", "initial_scale": "initial_scale"},
}
"""Type of the configuration → its option → the method's option of the same meaning."""

WITHOUT_EFFECT = (
    *(
        "peft_type",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "task_type",
        "inference_mode",
        "peft_version",
    ),
    *("seed", "bias", "base_fingerprint", "protected", "runtime_config"),
)
"""Options that change nothing here: each task starts fresh adapters in the method's own way."""


def settings_of(config: Any) -> dict[str, Any]:
    """Method options, and ``targets``, of a ``LoraConfig`` or ``EBLoraConfig``.

    Raises:
        TypeError: for another kind of configuration.
        ValueError: for an option that a method has no counterpart of, with its name.
    """
    kind = str(getattr(getattr(config, "peft_type", ""), "value", getattr(config, "peft_type", "")))
    if kind not in SAME:
        raise TypeError(
            f"peft_config is a LoraConfig or an EBLoraConfig, got {type(config).__name__}: rank, alpha and targets can "
            "also be given directly"
        )
    same, settings = SAME[kind], {}
    for option in fields(config):
        default = option.default if option.default_factory is MISSING else option.default_factory()
        value = getattr(config, option.name)
        if option.name in same:
            if option.name in ("r", "target_modules", "lora_alpha", "alpha") or value != default:
                settings[same[option.name]] = value
        elif option.name == "start" and value == "task":
            continue  # as every method that has such a start
        elif option.name not in WITHOUT_EFFECT and value != default and value:
            raise ValueError(
                f"{type(config).__name__}({option.name}={value!r}): the adapters of a method have no such option; "
                "leave it out"
            )
    if getattr(config, "bias", "none") != "none":
        raise ValueError(f"{type(config).__name__}(bias={config.bias!r}): methods train no biases; leave it out")
    settings["alpha"] = float(settings["rank"] if settings["alpha"] is None else settings["alpha"])
    if settings["targets"] is None:
        del settings["targets"]
    elif not isinstance(settings["targets"], str):
        settings["targets"] = tuple(sorted(settings["targets"]))
    return settings


def base_of_peft(model: Any, config: Any) -> tuple[Any, Any]:
    """The base of a PEFT model and its configuration; model and configuration as they are otherwise.

    Raises:
        ValueError: for a model with several adapters or a trained one, or with a second configuration.
    """
    configs = getattr(model, "peft_config", None)
    if not isinstance(model, nn.Module) or not isinstance(configs, dict) or not hasattr(model, "unload"):
        return model, config
    if config is not None:
        raise ValueError("the model has a PEFT configuration, and peft_config is another: give one of them")
    if len(configs) > 1:
        raise ValueError(f"the PEFT model has the adapters {', '.join(configs)}: give the base model instead")
    if _is_trained(model, next(iter(configs.values()))):
        raise ValueError(
            "the PEFT model has a trained adapter, which fresh adapters would replace: give model.merge_and_unload()"
        )
    return cast(Any, model).unload(), next(iter(configs.values()))


def _is_trained(model: nn.Module, config: Any) -> bool:
    """Whether an adapter has moved from its start, as its own zero or first magnitude shows."""
    start = getattr(config, "initial_scale", 0.0)
    marks = ("eblora_scale",) if hasattr(config, "initial_scale") else ("lora_B", "lora_embedding_B")
    values = [p.detach() for name, p in model.named_parameters() if any(mark in name for mark in marks)]
    return any(not torch.allclose(value, torch.full_like(value, start)) for value in values)
