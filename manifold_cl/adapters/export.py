"""Exact export to plain LoRA: what any reader of PEFT folders loads, without this package.

``A = rightᵀ`` and ``B = left · core``, at alpha = r, so that nothing is left to a reader's idea of scaling.
"""

from __future__ import annotations

import json
import logging
import math
import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from manifold_cl.adapters.adapter_files import ADAPTER, read_adapters
from manifold_cl.adapters.adapter_geometry import validate_on_manifolds
from manifold_cl.adapters.base_layers import is_conv1d
from manifold_cl.adapters.frames import OFF
from manifold_cl.adapters.inject import adapters_of
from manifold_cl.adapters.low_rank import Factors
from manifold_cl.adapters.named_adapters import PREFIX
from manifold_cl.files import (
    FileError,
    file_errors,
    load_tensors,
    read_json,
    read_text,
    replacing,
    require_file,
    save_tensors,
)
from manifold_cl.geometry import RestrictedStiefel

logger = logging.getLogger("manifold_cl")

WRAPPED = "base_model.model."
MODEL, CONFIG = "adapter_model.safetensors", "adapter_config.json"
CARRIED = ("task_type", "base_model_name_or_path", "revision", "modules_to_save", "auto_mapping")
"""What a PEFT configuration says that holds for plain LoRA as well."""

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


def export_lora(
    source: nn.Module | Path | str | Sequence[Path | str],
    out: Path | str,
    *,
    base_model: str | None = None,
    task_type: str | None = None,
    adapter: str = "default",
) -> dict[str, Factors]:
    """Write ``source`` as a plain PEFT LoRA folder and return what was written, by layer.

    Exact: nothing is decomposed or truncated. Several folders, as of the tasks of one run, are summed by putting
    their columns side by side, so the rank is the sum of theirs.

    Args:
        source: a model with adapters (ours or the PEFT tuner's), a folder that `save_adapters` or PEFT wrote, a run
            folder (all its tasks), or several of these folders.
        out: where ``adapter_model.safetensors`` and ``adapter_config.json`` go.
        base_model: name or path of the base, for readers that load it themselves.
        task_type: PEFT's, such as ``"CAUSAL_LM"``.
        adapter: which one, of a PEFT model with several.

    Raises:
        FileError: for a folder without adapters, or a damaged one.
        ValueError: for a model without adapters, or folders whose layers differ in shape.
    """
    carried: dict[str, Any] = {}
    others: dict[str, Tensor] = {}
    if isinstance(source, nn.Module):
        if hasattr(source, "peft_config"):
            return _export_peft_model(source, out, base_model=base_model, task_type=task_type, adapter=adapter)
        validate_on_manifolds(source, to="export")
        updates = {name: found.factors() for name, found in adapters_of(source).items()}
        if not updates:
            raise ValueError("the model has no adapters to export: inject_adapters, or pass the folder they are in")
        carried["fan_in_fan_out"] = any(is_conv1d(found.base) for found in adapters_of(source).values())
        told = type(source).__name__
    else:
        folders = [Path(source)] if isinstance(source, Path | str) else [Path(folder) for folder in source]
        folders = [task for folder in folders for task in _task_folders(folder)]
        read = [_read(folder) for folder in folders]
        _warn_of_others(folders)
        updates = summed([part for part, _, _ in read])
        carried, others = dict(read[-1][1]), dict(read[-1][2])
        told = ", ".join(folder.name for folder in folders)
    carried |= {"base_model_name_or_path": base_model} if base_model else {}
    carried |= {"task_type": task_type} if task_type else {}
    _write(Path(out), updates, carried, others, told=told)
    return updates


def summed(updates: Sequence[Mapping[str, Factors]]) -> dict[str, Factors]:
    """The sum of updates layer by layer, as factors whose columns stand side by side.

    Raises:
        ValueError: for a layer whose shape differs between them.
    """
    names = dict.fromkeys(name for part in updates for name in part)
    total: dict[str, Factors] = {}
    for name in names:
        parts = [part[name] for part in updates if name in part]
        shapes = {(part.left.shape[0], part.right.shape[0]) for part in parts}
        if len(shapes) > 1:
            raise ValueError(f"{name} has different shapes in the folders: {', '.join(map(str, sorted(shapes)))}")
        if len(parts) == 1:
            total[name] = parts[0]
            continue
        left = torch.cat([part.weighted_left() for part in parts], dim=-1)
        total[name] = Factors(left, torch.cat([part.right for part in parts], dim=-1), torch.ones(()))
    return total


def read_peft_folder(folder: Path) -> tuple[dict[str, Factors], dict[str, Any], dict[str, Tensor]]:
    """The updates of an EBLoRA folder that PEFT wrote, its configuration, and its other tensors; needs no peft.

    Raises:
        FileError: for another method, a missing or a damaged file.
    """
    config = _json(folder / "adapter_config.json")
    if config.get("peft_type") != "EBLORA":
        raise FileError(f"{folder} holds a PEFT adapter of type {config.get('peft_type')!r}, not EBLORA")
    path = folder / MODEL
    require_file(path, "does not exist, though its configuration does")
    tensors = load_tensors(path)
    updates: dict[str, Factors] = {}
    for key in tensors:
        if key.endswith(f".{PREFIX}left"):
            stem = key.removesuffix("left")
            layer = key.removesuffix(f".{PREFIX}left").removeprefix(WRAPPED)
            if lacking := [stem + part for part in ("right", "scale") if stem + part not in tensors]:
                raise FileError(f"{path} lacks {', '.join(lacking)}")
            for part, side in (("left", "output"), ("right", "input")):
                try:
                    manifold = RestrictedStiefel(tensors.get(f"{stem}{side}.complement"))
                    off = manifold.constraint_error(tensors[stem + part])
                except (RuntimeError, TypeError, ValueError) as problem:
                    raise FileError(
                        f"{path}: {layer}.{part} and its protected subspace do not fit ({problem})"
                    ) from None
                if not all(value <= OFF for value in off):
                    raise FileError(
                        f"{path}: {layer}.{part} is off its manifold ({off}): an average of adapters, or one that an "
                        "ordinary optimizer trained; load it, call retract_adapters(model) and save it again"
                    )
            rank = tensors[key].shape[-1]
            with file_errors(folder / CONFIG):
                alpha = _pattern(config.get("alpha_pattern") or {}, layer, config.get("alpha"))
                scaling = 1.0 if alpha is None else alpha / rank
                if not math.isfinite(scaling):
                    raise ValueError(f"alpha of {layer} is {alpha}")
            with file_errors(path):
                parts = [_factors(tensors, stem, scaling)]
                parts += [_factors(tensors, f"{stem}start.", scaling)] if f"{stem}start.left" in tensors else []
                updates[layer] = parts[0] if len(parts) == 1 else parts[0].minus(parts[1])
    return updates, config, {key: tensor for key, tensor in tensors.items() if f".{PREFIX}" not in key}


def _factors(tensors: Mapping[str, Tensor], stem: str, scaling: float) -> Factors:
    return Factors(tensors[f"{stem}left"], tensors[f"{stem}right"], tensors[f"{stem}scale"] * scaling)


def _pattern(patterns: Mapping[str, float], layer: str, default: float | None) -> float | None:
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
    known = {task.name for task in tasks[: len(learned)]}
    if other := sorted({p.parent.name for p in folder.glob(f"tasks/*/{ADAPTER}")} - known):
        logger.warning("%s: left out %s, not among the record's finished tasks", folder, ", ".join(other))
    return finished


def _warn_of_others(folders: Sequence[Path]) -> None:
    """Name the adapters that PEFT has put into subfolders of these, unless they are exported as well."""
    chosen = {folder.resolve() for folder in folders}
    for folder in folders:
        found = (path.parent for path in folder.glob(f"*/{CONFIG}"))
        if others := sorted(path.name for path in found if path.resolve() not in chosen):
            warnings.warn(
                f"{folder} has other adapters in subfolders, which are not exported: {', '.join(others)}; pass such a "
                "subfolder to export it, or a list of the folder and its subfolders to export their sum",
                UserWarning,
                stacklevel=3,
            )


def _read(folder: Path) -> tuple[dict[str, Factors], dict[str, Any], dict[str, Tensor]]:
    if (folder / ADAPTER).exists():
        return read_adapters(folder), {}, {}
    if (folder / "adapter_config.json").exists():
        return read_peft_folder(folder)
    raise FileError(
        f"{folder} holds no adapter: looked for {ADAPTER} (save_adapters), {CONFIG} (PEFT) and record.json (a run)"
    )


def _export_peft_model(model: nn.Module, out: Path | str, *, adapter: str, **said: Any) -> dict[str, Factors]:
    """Through the folder that PEFT itself writes, which knows about modules saved whole."""
    known = list(cast(Mapping[str, Any], model.peft_config))
    if adapter not in known:
        raise ValueError(f"no adapter {adapter!r} in this model: it has {', '.join(known)}")
    with tempfile.TemporaryDirectory() as folder:
        if hasattr(model, "get_base_model"):
            cast(Any, model).save_pretrained(folder, selected_adapters=[adapter])
            return export_lora(folder if adapter == "default" else Path(folder) / adapter, out, **said)
        cast(Any, model).save_pretrained(folder)  # transformers' own add_adapter: writes the active one
        return export_lora(folder, out, **said)


def _write(
    out: Path, updates: Mapping[str, Factors], config: Mapping[str, Any], others: Mapping[str, Tensor], *, told: str
) -> None:
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in others.items()}
    for name, factors in updates.items():
        tensors[f"{WRAPPED}{name}.lora_A.weight"] = factors.right.float().mT.cpu().contiguous()
        tensors[f"{WRAPPED}{name}.lora_B.weight"] = factors.weighted_left().float().cpu().contiguous()
    if broken := [key for key, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
        raise ValueError(f"{broken[0]} of {told} has NaN or infinite entries: nothing is exported")
    ranks = {name: factors.rank for name, factors in updates.items()}
    rank = max(ranks.values())
    odd = {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank}
    content = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": odd,
        "alpha_pattern": odd,
        # A list would be read as endings of names, and hit layers of another tower.
        "target_modules": "|".join(re.escape(name) for name in updates),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": bool(config.get("fan_in_fan_out", False)),
        "inference_mode": True,
        **{key: config[key] for key in CARRIED if config.get(key) is not None},
    }
    card = CARD.format(source=told, layers=len(updates), rank=rank)
    with replacing(out / CONFIG) as last, replacing(out / "README.md") as readme, replacing(out / MODEL) as model:
        save_tensors(model, tensors, {"format": "pt"})
        readme.write(card.encode())
        last.write(json.dumps(content, indent=1, allow_nan=False).encode())
        # PEFT refuses a folder without a configuration, but would scale new tensors by an old one.
        (out / CONFIG).unlink(missing_ok=True)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text(path))
    except FileError:
        raise
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is damaged or truncated ({error})") from None
    if not isinstance(content, dict):
        raise FileError(f"{path} is no configuration: a JSON object was expected")
    return content
