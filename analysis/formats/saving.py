"""LoRA folders that PEFT loads, written from factors."""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from analysis.files import LONGEST, new_folder
from analysis.formats.bare_parameters import stacked_experts
from analysis.formats.carried import Carried
from analysis.formats.sources import BareParameter
from analysis.formats.tensor_names import OUT_OF_ATTENTION


def save_lora(
    folder: Path,
    tasks: Sequence[tuple[str, Iterable[Any]]],
    *,
    transposed: Collection[str] = (),
    embeddings: Collection[str] = (),
    parameters: Mapping[str, BareParameter] | None = None,
    kernels: Mapping[str, tuple[int, ...]] | None = None,
) -> Path:
    """Write one PEFT LoRA folder per task, from (task, layer, left, right), and ``tasks.json``; all or nothing.

    ``alpha = r`` for every layer, so that PEFT's scaling is 1 and the factors are the update. PEFT has one
    ``fan_in_fan_out`` for all layers: it is set if a layer is `transposed` that is no embedding. The factors of
    `embeddings` are ``lora_embedding_A`` (r, tokens) and ``lora_embedding_B`` (width, r); without `transposed`, left
    is on the side of the tokens. Layers in `parameters` are written as PEFT's ``target_parameters``, those in
    `kernels` as factors of convolutions, (m, r, 1, 1) and (r, inputs, height, width).
    FileExistsError if the folder exists and is not empty.
    """
    with new_folder(folder) as unfinished:
        manifest = []
        for number, (task, factors) in enumerate(tasks, start=1):
            name = f"{number:02d}-{re.sub(r'[^A-Za-z0-9._-]+', '_', task)[:LONGEST]}"
            kinds: Any = {"transposed": transposed, "embeddings": embeddings, "parameters": parameters}
            kinds["kernels"] = kernels
            write_lora(unfinished / name, factors, **kinds)
            manifest.append({"name": task, "path": name})
        write_manifest(unfinished, manifest)
    return folder


def write_manifest(folder: Path, tasks: Sequence[Mapping[str, str]]) -> None:
    """Write ``tasks.json``, which keeps the names and the order of tasks, each with ``name`` and ``path``."""
    described = {"format": "analysis.tasks", "version": 1, "tasks": list(tasks)}
    (folder / "tasks.json").write_text(json.dumps(described, indent=2), encoding="utf-8")


def write_lora(
    folder: Path,
    updates: Iterable[Any],
    *,
    transposed: Collection[str] = (),
    embeddings: Collection[str] = (),
    parameters: Mapping[str, BareParameter] | None = None,
    kernels: Mapping[str, tuple[int, ...]] | None = None,
    carried: Carried | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write one PEFT folder from (task, layer, left, right), as `save_lora` does, with the contents of `carried`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors, ranks, experts = dict(carried.tensors) if carried is not None else {}, {}, {}
    for _, layer, left, right in updates:
        left, right = left.to(dtype), right.to(dtype)
        if layer.endswith(OUT_OF_ATTENTION):
            left = left / 2  # PEFT adds it twice
        if layer in (parameters or {}):
            experts[layer] = (left, right)
            continue
        stem = f"base_model.model.{layer}.lora_"
        if layer in embeddings:
            width, tokens = (left, right) if layer in transposed else (right, left)
            tensors[f"{stem}embedding_A"] = tokens.mT.contiguous()
            tensors[f"{stem}embedding_B"] = width.contiguous()
        else:
            sizes = (kernels or {}).get(layer, ())
            tensors[f"{stem}A.weight"] = right.mT.reshape(right.shape[1], -1, *sizes).contiguous()
            tensors[f"{stem}B.weight"] = left.reshape(*left.shape, *(1 for _ in sizes)).contiguous()
        ranks[layer] = left.shape[1]
    stacked, of_parameters = stacked_experts(experts, parameters or {})
    tensors |= {name: tensor.to(dtype) for name, tensor in stacked.items()}
    path = folder / "adapter_model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes it readable for its owner only
    config = _config(ranks, of_parameters, not ranks.keys().isdisjoint(set(transposed) - set(embeddings)))
    options = config | dict(carried.options if carried is not None else {})
    path.with_name("adapter_config.json").write_text(json.dumps(options, indent=2), encoding="utf-8")


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
