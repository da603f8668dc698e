"""Exact export to plain LoRA folders, which any reader of PEFT folders loads without this package.

``A = rightᵀ`` and ``B = left · core`` at alpha = r, so that all readers apply the same scaling.
"""

from __future__ import annotations

import json
import logging
import math
import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from manifold_cl.adapters.adapter_files import ADAPTER, read_adapters
from manifold_cl.adapters.adapter_geometry import validate_on_manifolds
from manifold_cl.adapters.base_layers import is_conv1d
from manifold_cl.adapters.frames import OFF
from manifold_cl.adapters.frozen_updates import kept_updates
from manifold_cl.adapters.inject import adapters_of
from manifold_cl.adapters.layers import named_linears
from manifold_cl.adapters.low_rank import Factors, Update
from manifold_cl.adapters.named_adapters import FRAMES, PREFIX
from manifold_cl.adapters.stored_complements import expanded
from manifold_cl.files import FileError, file_errors, read_json, read_text, replacing, require_file
from manifold_cl.geometry import RestrictedStiefel
from manifold_cl.linalg import is_finite
from manifold_cl.tensor_files import load_tensors, save_tensors

logger = logging.getLogger("manifold_cl")

WRAPPED = "base_model.model."
MODEL, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
"""PEFT's task types: it refuses to load a folder with another one."""

CARRIED = ("task_type", "base_model_name_or_path", "revision", "modules_to_save", "auto_mapping")
"""Entries of a PEFT configuration that hold for plain LoRA as well."""

CARD = """---
library_name: peft
tags: [lora]
---
# Plain LoRA

Exported by manifold_cl from {source}: {layers} layers, rank {rank}. Loads in stock PEFT:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/folder")
```
"""


@dataclass(frozen=True)
class Export:
    """Updates by layer name, with the configuration and the other tensors of the folder they come from."""

    updates: Mapping[str, Factors]
    config: Mapping[str, Any] = field(default_factory=dict)
    others: Mapping[str, Tensor] = field(default_factory=dict)


def export_lora(
    source: nn.Module | Path | str | Sequence[Path | str],
    out: Path | str,
    *,
    base_model: str | None = None,
    task_type: str | None = None,
    adapter: str = "default",
) -> dict[str, Factors]:
    """Write ``source`` as a plain PEFT LoRA folder and return the updates by layer.

    Nothing is decomposed or truncated. Several folders, such as the tasks of one run, are summed by putting their
    columns side by side, so the rank is the sum of theirs.

    Args:
        source: a model with adapters (injected or PEFT's; updates of `keep_adapters` are summed with them), a folder
            that `save_adapters` or PEFT wrote, a run folder (all its tasks), or several of these folders.
        out: folder for ``adapter_model.safetensors`` and ``adapter_config.json``.
        base_model: name or path of the base, for readers that load it themselves.
        task_type: PEFT's, such as ``"CAUSAL_LM"``.
        adapter: name of the adapter, in a PEFT model with several.

    Raises:
        FileError: for a folder without adapters, or a damaged one.
        ValueError: for a model without adapters, folders whose layers differ in shape, or a task type that PEFT lacks.

    >>> from tempfile import mkdtemp
    >>> from manifold_cl import EBLoRALinear
    >>> model = nn.Sequential(EBLoRALinear(nn.Linear(6, 4), 2))
    >>> folder = Path(mkdtemp())
    >>> export_lora(model, folder)["0"].rank, json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]
    (2, 2)
    """
    if task_type and task_type not in TASK_TYPES:
        raise ValueError(f"task_type={task_type} is none of PEFT's: give {', '.join(TASK_TYPES)}, or leave it out")
    if isinstance(source, nn.Module) and hasattr(source, "peft_config"):
        return _export_peft_model(source, out, base_model=base_model, task_type=task_type, adapter=adapter)
    if isinstance(source, nn.Module):
        export, name = _from_model(source), type(source).__name__
    else:
        folders = [Path(source)] if isinstance(source, Path | str) else [Path(folder) for folder in source]
        folders = [task for folder in folders for task in _task_folders(folder)]
        exports = [_read(folder) for folder in folders]
        _warn_of_others(folders)
        updates = sum_updates([export.updates for export in exports])
        export, name = Export(updates, exports[-1].config, exports[-1].others), ", ".join(f.name for f in folders)
    given = {"base_model_name_or_path": base_model, "task_type": task_type}
    config = {**export.config, **{key: value for key, value in given.items() if value}}
    _write(Path(out), Export(export.updates, config, export.others), source=name)
    return dict(export.updates)


def sum_updates(updates: Sequence[Mapping[str, Factors]]) -> dict[str, Factors]:
    """The sum of updates layer by layer, as factors with their columns side by side.

    Raises:
        ValueError: for a layer whose shape differs between them.
    """
    total: dict[str, Factors] = {}
    for name in dict.fromkeys(name for part in updates for name in part):
        parts = [part[name] for part in updates if name in part]
        shapes = {(part.left.shape[0], part.right.shape[0]) for part in parts}
        if len(shapes) > 1:
            raise ValueError(f"{name} has different shapes in the folders: {', '.join(map(str, sorted(shapes)))}")
        total[name] = parts[0]
        if len(parts) > 1:
            left = torch.cat([part.weighted_left() for part in parts], dim=-1)
            total[name] = Factors(left, torch.cat([part.right for part in parts], dim=-1), torch.ones(()))
    return total


def _from_model(model: nn.Module) -> Export:
    validate_on_manifolds(model, to="export")
    adapters = adapters_of(model)
    kept = kept_updates(model)
    if not adapters and not kept:
        raise ValueError("the model has no adapters to export: inject_adapters, or pass the folder they are in")
    transposed = any(is_conv1d(layer) for name, layer in named_linears(model).items() if name in {*adapters, *kept})
    earlier = [{name: one} for name, updates in kept.items() for one in updates]
    return Export(
        sum_updates([*earlier, {name: adapter.factors() for name, adapter in adapters.items()}]),
        {"fan_in_fan_out": transposed},
    )


def _export_peft_model(model: nn.Module, out: Path | str, *, adapter: str, **options: Any) -> dict[str, Factors]:
    """Export through the folder that PEFT itself writes, which includes modules saved whole."""
    configs = cast(Mapping[str, Any], model.peft_config)
    if adapter not in configs:
        raise ValueError(f"no adapter {adapter!r} in this model: it has {', '.join(configs)}")
    if str(getattr(configs[adapter], "peft_type", "")).rpartition(".")[-1] == "LORA":
        raise ValueError(f"adapter {adapter!r} is plain LoRA already: call model.save_pretrained(folder)")
    with tempfile.TemporaryDirectory() as folder:
        if hasattr(model, "get_base_model"):
            cast(Any, model).save_pretrained(folder, selected_adapters=[adapter])
            return export_lora(folder if adapter == "default" else Path(folder) / adapter, out, **options)
        cast(Any, model).save_pretrained(folder)  # transformers' own add_adapter: writes the active one
        return export_lora(folder, out, **options)


def _read(folder: Path) -> Export:
    if (folder / ADAPTER).exists():
        return Export(read_adapters(folder))
    if (folder / CONFIG).exists():
        return _read_peft_folder(folder)
    raise FileError(
        f"{folder} holds no adapter: looked for {ADAPTER} (save_adapters), {CONFIG} (PEFT) and record.json (a run)"
    )


def _read_peft_folder(folder: Path) -> Export:
    """An EBLoRA folder that PEFT wrote; peft is not needed."""
    config = _read_config(folder / CONFIG)
    if config.get("peft_type") == "LORA":
        raise FileError(f"{folder} holds plain LoRA already, as export_lora would write it: use that folder as it is")
    if config.get("peft_type") != "EBLORA":
        raise FileError(f"{folder} holds a PEFT adapter of type {config.get('peft_type')!r}, not EBLORA")
    path = folder / MODEL
    require_file(path, "does not exist, though its configuration does")
    with file_errors(path):
        tensors = expanded(load_tensors(path))
    updates: dict[str, Factors] = {}
    for key in tensors:
        if not key.endswith(f".{PREFIX}left"):
            continue
        stem = key.removesuffix("left")
        layer = key.removesuffix(f".{PREFIX}left").removeprefix(WRAPPED)
        if lacking := [stem + part for part in ("right", "scale") if stem + part not in tensors]:
            raise FileError(f"{path} lacks {', '.join(lacking)}")
        _validate_saved_frames(path, layer, tensors, stem)
        with file_errors(folder / CONFIG):
            alpha = _pattern_value(config.get("alpha_pattern") or {}, layer, config.get("alpha"))
            scaling = 1.0 if alpha is None else alpha / tensors[key].shape[-1]
            if not math.isfinite(scaling):
                raise ValueError(f"alpha of {layer} is {alpha}")
        with file_errors(path):
            start = _factors(tensors, f"{stem}start.", scaling) if f"{stem}start.left" in tensors else None
            updates[layer] = Update(_factors(tensors, stem, scaling), start).factors()
    return Export(updates, config, {key: tensor for key, tensor in tensors.items() if f".{PREFIX}" not in key})


def _validate_saved_frames(path: Path, layer: str, tensors: Mapping[str, Tensor], stem: str) -> None:
    for part, side in FRAMES:
        try:
            manifold = RestrictedStiefel(tensors.get(f"{stem}{side}.complement"))
            residuals = manifold.constraint_error(tensors[stem + part])
        except (RuntimeError, TypeError, ValueError) as problem:
            raise FileError(f"{path}: {layer}.{part} and its protected subspace do not fit ({problem})") from None
        if not all(value <= OFF for value in residuals):
            raise FileError(
                f"{path}: {layer}.{part} is off its manifold ({residuals}): an average of adapters, or one that an "
                "ordinary optimizer trained; load it, call retract_adapters(model) and save it again"
            )


def _factors(tensors: Mapping[str, Tensor], stem: str, scaling: float) -> Factors:
    return Factors(tensors[f"{stem}left"], tensors[f"{stem}right"], tensors[f"{stem}scale"] * scaling)


def _pattern_value(patterns: Mapping[str, float], layer: str, default: float | None) -> float | None:
    """PEFT's rule: the first key that the layer's name ends with, at a dot, as a regular expression."""
    return next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", layer)), default)


def _task_folders(folder: Path) -> list[Path]:
    """The adapter folders of a run's finished tasks in order, or the folder itself."""
    path = folder / "record.json"
    if not path.exists():
        return [folder]
    record = read_json(path, expected="manifold_cl.record")
    with file_errors(path):
        if not isinstance(record["tasks"], list):
            raise TypeError(f"tasks is a list of names, got {record['tasks']!r}")
        if unfit := [task for task in record["tasks"] if Path(task).name != task]:
            raise ValueError(f"the task {unfit[0]!r} cannot name a folder")
        # A task that was learned has the losses of its steps; joint training learns at the first task only.
        learned = [bool(losses) for losses in record["losses"]]
        tasks = [folder / "tasks" / f"{i + 1:02d}-{task}" for i, task in enumerate(record["tasks"])]
        finished = [task for task, steps in zip(tasks, learned, strict=False) if steps]
        complete = record["status"] == "complete"
    if not finished:
        raise FileError(f"{folder} is a run without a finished task: nothing to export yet")
    for task in finished:
        if not (task / ADAPTER).is_file():
            weights = (task / "weights.safetensors").exists()
            hint = "its method keeps weights, not adapters" if weights else "restore it"
            raise FileError(f"{task / ADAPTER} does not exist, though {path} lists the task as learned: {hint}")
    if not complete:
        logger.warning("%s is not complete: %d of %d tasks are exported", folder, len(learned), len(tasks))
    names = {task.name for task in tasks[: len(learned)]}
    if other := sorted({p.parent.name for p in folder.glob(f"tasks/*/{ADAPTER}")} - names):
        logger.warning("%s: left out %s, not among the record's finished tasks", folder, ", ".join(other))
    return finished


def _warn_of_others(folders: Sequence[Path]) -> None:
    """Warn about adapters in subfolders, where PEFT puts further ones, unless they are exported as well."""
    chosen = {folder.resolve() for folder in folders}
    for folder in folders:
        subfolders = (path.parent for path in folder.glob(f"*/{CONFIG}"))
        if others := sorted(path.name for path in subfolders if path.resolve() not in chosen):
            warnings.warn(
                f"{folder} has other adapters in subfolders, which are not exported: {', '.join(others)}; pass such a "
                "subfolder to export it, or a list of the folder and its subfolders to export their sum",
                UserWarning,
                stacklevel=3,
            )


def _write(out: Path, export: Export, *, source: str) -> None:
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in export.others.items()}
    for name, factors in export.updates.items():
        tensors[f"{WRAPPED}{name}.lora_A.weight"] = factors.right.float().mT.cpu().contiguous()
        tensors[f"{WRAPPED}{name}.lora_B.weight"] = factors.weighted_left().float().cpu().contiguous()
    if broken := [key for key, tensor in tensors.items() if not is_finite(tensor)]:
        raise ValueError(f"{broken[0]} of {source} has NaN or infinite entries: nothing is exported")
    ranks = {name: factors.rank for name, factors in export.updates.items()}
    rank = max(ranks.values())
    odd = {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank}
    content = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": odd,
        "alpha_pattern": odd,
        # PEFT would take a list as endings of names, which may hit layers of another tower.
        "target_modules": "|".join(re.escape(name) for name in ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": bool(export.config.get("fan_in_fan_out", False)),
        "inference_mode": True,
        **{key: export.config[key] for key in CARRIED if export.config.get(key) is not None},
    }
    card = CARD.format(source=source, layers=len(ranks), rank=rank)
    with replacing(out / CONFIG) as last, replacing(out / "README.md") as readme, replacing(out / MODEL) as model:
        save_tensors(model, tensors, {"format": "pt"})
        readme.write(card.encode())
        last.write(json.dumps(content, indent=1, allow_nan=False).encode())
        # PEFT refuses a folder without a configuration, but would scale new tensors by an old one.
        (out / CONFIG).unlink(missing_ok=True)


def _read_config(path: Path) -> dict[str, Any]:
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is damaged or truncated ({error})") from None
    if not isinstance(content, dict):
        raise FileError(f"{path} is no configuration: a JSON object was expected")
    return content
