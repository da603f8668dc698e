"""Adapters on disk: one file ``adapter.safetensors`` per folder (docs/record-format.md, "adapter.safetensors")."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from manifold_cl.adapters.adapter import Adapter
from manifold_cl.adapters.adapter_geometry import validate_on_manifolds
from manifold_cl.adapters.base_layers import WIDE
from manifold_cl.adapters.eblora import EBLoRALinear
from manifold_cl.adapters.identity import ModelIdentity
from manifold_cl.adapters.inject import adapters_of
from manifold_cl.adapters.low_rank import Factors
from manifold_cl.files import FileError, file_errors, require_file
from manifold_cl.kinds import is_number
from manifold_cl.linalg import is_finite
from manifold_cl.lists import listed
from manifold_cl.tensor_files import read_tensors, write_tensors

ADAPTER = "adapter.safetensors"
PARTS = ("left", "right", "scale")
OFF = 1e-4
"""Constraint residual beyond which a saved frame belongs to another manifold: fifty times what training leaves."""


def save_adapters(model: nn.Module, folder: Path | str, *, task: str = "") -> None:
    """Write the model's adapters as ``adapter.safetensors``, or leave the file that is there untouched.

    Raises:
        ValueError: when the model has no adapters, adapters of several kinds or ranks, merged ones, frames off their
            manifolds, or factors with NaN or infinite entries.
        TypeError: for factors that were forced into half precision.
        OSError: when the disk is full or the folder cannot be written.
    """
    adapters = adapters_of(model)
    if not adapters:
        raise ValueError("the model has no adapters to save: call inject_adapters first, and save before a merge")
    shared = {(a.kind, a.rank, a.alpha) for a in adapters.values()}
    if len(shared) != 1:
        raise ValueError(f"one file holds adapters of one kind, rank and alpha; the model has {sorted(shared)}")
    if merged := [name for name, adapter in adapters.items() if adapter.merged]:
        raise ValueError(f"{merged[0]} is merged into its base weight at present: unmerge() before saving")
    validate_on_manifolds(model, to="save")
    kind, rank, alpha = shared.pop()
    tensors = {f"{name}.{key}": tensor for name, a in adapters.items() for key, tensor in a.own_tensors()}
    if narrow := [name for name, tensor in tensors.items() if tensor.dtype not in WIDE]:
        raise TypeError(
            f"{narrow[0]} is {tensors[narrow[0]].dtype}: factors are kept in float32, rounding them costs 1e-3 of "
            "orthonormality. model.to(torch.bfloat16) leaves them alone; code that sets .data must convert back and "
            "train again"
        )
    if broken := [name for name, tensor in tensors.items() if not is_finite(tensor)]:
        raise ValueError(
            f"{broken[0]} has NaN or infinite entries: the training diverged, so nothing is written; lower the "
            "learning rate and train again"
        )
    identity = ModelIdentity.of(model, {name: adapter.base for name, adapter in adapters.items()})
    manifest = {"kind": kind, "task": task, "rank": rank, "alpha": alpha, "model": identity.to_dict()}
    write_tensors(Path(folder) / ADAPTER, tensors, manifest)


def read_adapters(folder: Path | str) -> dict[str, Factors]:
    """Layer name → update. A compensated start is subtracted, by columns of its own.

    Raises:
        FileError: when the file is missing, damaged, or contradicts its manifest.
    """
    layers, manifest = _read(Path(folder) / ADAPTER)
    one, scaling = torch.tensor(1.0), manifest["alpha"] / manifest["rank"]
    updates: dict[str, Factors] = {}
    for name, tensors in layers.items():
        if other := [key for key in tensors if key.removeprefix("start_") not in PARTS]:
            raise FileError(
                f"{folder} has {name}.{other[0]}, which is no part of an update (left, right, scale): load_adapters"
            )
        part = {
            start: Factors(
                tensors[f"{start}left"], tensors[f"{start}right"], tensors.get(f"{start}scale", one) * scaling
            )
            for start in ("", "start_")
            if f"{start}left" in tensors
        }
        updates[name] = part[""].minus(part["start_"]) if "start_" in part else part[""]
    return updates


@torch.no_grad()
def load_adapters(model: nn.Module, folder: Path | str, *, any_base: bool = False) -> None:
    """Set the adapters injected in the model to the values in ``folder``, which `save_adapters` wrote.

    ``any_base`` accepts a base whose weights are not those that the adapters were trained on.

    Raises:
        ValueError: for a model without adapters.
        FileError: when the file's adapters differ from the model's in name, kind, rank, scaling, shape or base, or
            reach into what the model protects. The differences are listed and nothing is loaded.
    """
    adapters = adapters_of(model)
    path = Path(folder) / ADAPTER
    layers, manifest = _read(path)
    if not adapters:
        kind, rank, alpha = (manifest[key] for key in ("kind", "rank", "alpha"))
        raise ValueError(
            f"the model has no adapters to load {path} into: call inject_adapters first, for {', '.join(layers)} (kind "
            f"{kind}, rank {rank}, alpha {alpha})"
        )
    saved = {f"{name}.{key}": tensor for name, tensors in layers.items() for key, tensor in tensors.items()}
    own = {f"{name}.{key}": tensor for name, adapter in adapters.items() for key, tensor in adapter.own_tensors()}
    differences = _differences(own, saved, adapters, manifest) or _off_manifold(saved, adapters)
    if not differences and not any_base:
        with file_errors(path):  # version 1 has the fingerprints alone
            identity = ModelIdentity.from_dict(manifest.get("model", {"name": "", "weights": manifest.get("base", {})}))
        bases = {name: adapter.base for name, adapter in adapters.items()}
        differences = [
            f"{name}: trained on another model, {difference} (any_base=True loads it nevertheless)"
            for name, difference in identity.differences(bases).items()
        ]
    if differences:
        shown = listed(sorted(differences), 5, separator="; ")
        raise FileError(f"{path} does not fit the model ({len(differences)} differences): {shown}")
    for name, tensor in own.items():
        tensor.copy_(saved[name])
    for adapter in adapters.values():
        if isinstance(adapter, EBLoRALinear):
            adapter.starts_due = frozenset()


def _read(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Layer → part → tensor, and the manifest, once they agree in everything that the update depends on."""
    require_file(path, f"does not exist: give the folder, with {ADAPTER} in it, that save_adapters wrote")
    tensors, manifest = read_tensors(path)
    with file_errors(path):
        for key in ("rank", "alpha"):
            if not is_number(manifest[key]) or not math.isfinite(manifest[key]):
                raise TypeError(f"{key} is {manifest[key]!r}, a finite number is needed")
        rank, kind = manifest["rank"], manifest["kind"]
        if rank < 1 or not isinstance(kind, str):
            raise ValueError(f"rank is {rank!r} and kind {kind!r}, a number from 1 on and a word are needed")
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, key = name.rpartition(".")
        layers.setdefault(layer, {})[key] = tensor
        shape, part = tuple(tensor.shape), key.removeprefix("start_")
        fits = shape in ((), (rank,), (rank, rank)) if part == "scale" else len(shape) == 2 and shape[1] == rank
        if part in PARTS and not fits:
            raise FileError(f"{path}: {name} has shape {shape}, which does not fit rank {rank:g}")
        if tensor.dtype not in WIDE:
            raise FileError(f"{path}: {name} is {tensor.dtype}: factors are kept in float32, rounding costs 1e-3")
    if not layers:
        raise FileError(f"{path} has no layers")
    needed = ["left", "right", *(["scale"] if kind == EBLoRALinear.kind else [])]
    for layer, parts in layers.items():
        started = any(key.startswith("start_") for key in parts)
        for key in [*needed, *(f"start_{key}" for key in needed if started)]:
            if key not in parts:
                raise FileError(f"{path} lacks {layer}.{key}")
            if key.startswith("start_") and key != "start_scale" and parts[key].shape != parts[key[6:]].shape:
                raise FileError(f"{path}: {layer}.{key} has another shape than {key[6:]}")
    return layers, manifest


def _differences(
    own: Mapping[str, Tensor], saved: Mapping[str, Tensor], adapters: Mapping[str, Adapter], manifest: dict[str, Any]
) -> list[str]:
    kind, scaling = manifest["kind"], manifest["alpha"] / manifest["rank"]
    differences = [f"missing in the file: {name}" for name in own.keys() - saved.keys()]
    differences += [f"not in the model: {name}" for name in saved.keys() - own.keys()]
    differences += [
        f"{name}: file {tuple(saved[name].shape)}, model {tuple(own[name].shape)}"
        for name in own.keys() & saved.keys()
        if saved[name].shape != own[name].shape
    ]
    return differences + [
        f"{name}: file {kind} scaled by {scaling:g}, model {adapter.kind} scaled by {adapter.scaling:g}"
        for name, adapter in adapters.items()
        if (adapter.kind, adapter.scaling) != (kind, scaling)
    ]


def _off_manifold(saved: Mapping[str, Tensor], adapters: Mapping[str, Adapter]) -> list[str]:
    """Frames in the file that are not points of the manifolds of the model's adapters, one line each."""
    differences = []
    for name, adapter in adapters.items():
        for key, _, manifold in adapter.manifold_parameters() if isinstance(adapter, EBLoRALinear) else ():
            error = manifold.constraint_error(saved[f"{name}.{key}"])
            if not all(part <= OFF for part in error):  # NaN as well
                differences.append(f"{name}.{key}: off the model's manifold ({error})")
    return differences
