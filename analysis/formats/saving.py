"""Writing factors as LoRA folders that PEFT loads."""

import json
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file


def save_lora(folder: Path, tasks: Sequence[tuple[str, Iterable[Any]]], transposed: Collection[str] = ()) -> Path:
    """The folder: one PEFT LoRA folder a task, from (task, layer, left, right), and ``tasks.json``.

    ``alpha = r`` for every layer, so that PEFT's scaling is 1 and the factors are the update. PEFT has one
    ``fan_in_fan_out`` for all layers: it is set where any is `transposed`.

    Raises:
        FileExistsError: the folder exists and is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: adapters are written into a new folder")
    manifest = []
    for number, (task, factors) in enumerate(tasks, start=1):
        name = f"{number:02d}-{re.sub(r'[^A-Za-z0-9._-]+', '_', task)}"
        place = folder / name
        place.mkdir(parents=True)
        tensors, ranks = {}, {}
        for _, layer, left, right in factors:
            tensors[f"base_model.model.{layer}.lora_A.weight"] = right.mT.contiguous()
            tensors[f"base_model.model.{layer}.lora_B.weight"] = left.contiguous()
            ranks[layer] = left.shape[1]
        save_file(tensors, place / "adapter_model.safetensors", metadata={"format": "pt"})
        config = _config(ranks, not ranks.keys().isdisjoint(transposed))
        (place / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        manifest.append({"name": task, "path": name})
    described = {"format": "analysis.tasks", "version": 1, "tasks": manifest}
    (folder / "tasks.json").write_text(json.dumps(described, indent=2), encoding="utf-8")
    return folder


def _config(ranks: dict[str, int], transposed: bool) -> dict[str, Any]:
    """A LoRA configuration that names every layer in full: a bare ending would also hit another tower's layers."""
    usual = max(set(ranks.values()), key=list(ranks.values()).count)
    # PEFT puts "(.*\.)?" in front of a pattern; "^" behind it keeps the name whole.
    patterns = {f"^{re.escape(layer)}": rank for layer, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": "|".join(re.escape(layer) for layer in ranks),
        "fan_in_fan_out": transposed,
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
        "task_type": None,
        "base_model_name_or_path": None,
    }
