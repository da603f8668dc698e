"""LoRA folders that PEFT loads, written from factors."""

import json
import re
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from analysis.formats.bare_parameters import stacked_experts
from analysis.formats.sources import BareParameter

LONGEST = 100
"""Characters of a task's name in its folder's name; file systems take 255 bytes."""


def save_lora(
    folder: Path,
    tasks: Sequence[tuple[str, Iterable[Any]]],
    *,
    transposed: Collection[str] = (),
    embeddings: Collection[str] = (),
    parameters: Mapping[str, BareParameter] | None = None,
) -> Path:
    """Write one PEFT LoRA folder per task, from (task, layer, left, right), and ``tasks.json``; all or nothing.

    ``alpha = r`` for every layer, so that PEFT's scaling is 1 and the factors are the update. PEFT has one
    ``fan_in_fan_out`` for all layers: it is set if a layer is `transposed` that is no embedding. The factors of
    `embeddings` are ``lora_embedding_A`` (r, tokens) and ``lora_embedding_B`` (width, r); without `transposed`, left
    is on the side of the tokens. Layers in `parameters` are written as PEFT's ``target_parameters``.
    FileExistsError if the folder exists and is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: adapters are written into a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name[:LONGEST]}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        _write(unfinished, tasks, transposed, embeddings, parameters or {})
        unfinished.replace(folder)  # takes the place of an empty folder too
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _write(
    folder: Path,
    tasks: Sequence[tuple[str, Iterable[Any]]],
    transposed: Collection[str],
    embeddings: Collection[str],
    parameters: Mapping[str, BareParameter],
) -> None:
    manifest = []
    for number, (task, factors) in enumerate(tasks, start=1):
        name = f"{number:02d}-{re.sub(r'[^A-Za-z0-9._-]+', '_', task)[:LONGEST]}"
        (folder / name).mkdir(parents=True)
        tensors, ranks, experts = {}, {}, {}
        for _, layer, left, right in factors:
            if layer in parameters:
                experts[layer] = (left, right)
                continue
            stem = f"base_model.model.{layer}.lora_"
            if layer in embeddings:
                width, tokens = (left, right) if layer in transposed else (right, left)
                tensors[f"{stem}embedding_A"] = tokens.mT.contiguous()
                tensors[f"{stem}embedding_B"] = width.contiguous()
            else:
                tensors[f"{stem}A.weight"] = right.mT.contiguous()
                tensors[f"{stem}B.weight"] = left.contiguous()
            ranks[layer] = left.shape[1]
        stacked, of_parameters = stacked_experts(experts, parameters)
        tensors |= stacked
        path = folder / name / "adapter_model.safetensors"
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes it readable for its owner only
        config = _config(ranks, of_parameters, not ranks.keys().isdisjoint(set(transposed) - set(embeddings)))
        path.with_name("adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        manifest.append({"name": task, "path": name})
    described = {"format": "analysis.tasks", "version": 1, "tasks": manifest}
    (folder / "tasks.json").write_text(json.dumps(described, indent=2), encoding="utf-8")


def _config(modules: dict[str, int], parameters: dict[str, int], transposed: bool) -> dict[str, Any]:
    """A LoRA configuration that names every layer in full: a bare ending would also hit another tower's layers."""
    ranks = modules | parameters
    usual = max(set(ranks.values()), key=list(ranks.values()).count)
    # PEFT puts "(.*\.)?" in front of a pattern; "^" behind it matches the complete name.
    patterns = {f"^{re.escape(layer)}": rank for layer, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": "|".join(re.escape(layer) for layer in modules) or [],
        "target_parameters": list(parameters) or None,
        "fan_in_fan_out": transposed,
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
        "task_type": None,
        "base_model_name_or_path": None,
    }
