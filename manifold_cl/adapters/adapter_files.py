"""Adapters on disk: ``adapter.safetensors`` with its manifest ``adapter.json`` (docs/record-format.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from manifold_cl.adapters.adapter import Adapter
from manifold_cl.adapters.adapter_geometry import validate_on_manifolds
from manifold_cl.adapters.base_layers import WIDE, fingerprint, other_base
from manifold_cl.adapters.eblora import EBLoRALinear
from manifold_cl.adapters.inject import adapters_of
from manifold_cl.adapters.low_rank import Factors
from manifold_cl.files import VERSION, FileError, interpreted, read_tensors, write_tensors

ADAPTER_FORMAT = "manifold_cl.adapter"
ADAPTER_VERSION = 2
"""Read up to this one. Adapters with a scalar core and no compensation are still written as version 1."""
PARTS = ("left", "right", "scale")
OFF = 1e-4
"""Constraint error beyond which a saved frame belongs to another manifold: fifty times what training leaves."""


def save_adapters(model: nn.Module, folder: Path | str, *, task: str = "") -> None:
    """Write the model's adapters as ``adapter.safetensors`` and ``adapter.json`` (docs/record-format.md).

    Adapters that are in the folder already are replaced at once or, if the write fails or is killed at any moment,
    not at all.

    Raises:
        ValueError: when the model has no adapters, adapters of several kinds or ranks, merged ones, frames off their
            manifolds, or factors with NaN or infinite entries.
        TypeError: for factors that were forced into half precision.
        OSError: when the disk is full or the folder cannot be written.
    """
    adapters = adapters_of(model)
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
            "orthonormality. model.to(torch.bfloat16) leaves them alone; what set .data must convert back and retrain"
        )
    if broken := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
        raise ValueError(
            f"{broken[0]} has NaN or infinite entries: the training diverged, so nothing is written; lower the "
            "learning rate and train again"
        )
    plain = all(tensor.ndim == 0 and "start_" not in key for key, tensor in tensors.items() if "scale" in key)
    bases = {name: fingerprint(adapter.base) for name, adapter in adapters.items()}
    manifest = {
        "format": ADAPTER_FORMAT,
        "version": VERSION if plain else ADAPTER_VERSION,
        "kind": kind,
        "task": task,
        "rank": rank,
        "alpha": alpha,
        "scaling": alpha / rank,
        "layers": {
            name: {"left": list(adapter.left.shape), "right": list(adapter.right.shape)}
            for name, adapter in adapters.items()
        },
        "base": {name: text for name, text in bases.items() if text is not None},
    }
    write_tensors(Path(folder) / "adapter", tensors, manifest)


def read_adapters(folder: Path | str) -> dict[str, Factors]:
    """The updates in an adapter folder, by layer name; a start that is compensated is subtracted, in more columns.

    Raises:
        FileError: when a file is missing or damaged, or contradicts its manifest.
    """
    tensors, manifest = _read(Path(folder))
    if other := [name for name in tensors if name.rpartition(".")[2].removeprefix("start_") not in PARTS]:
        raise FileError(f"{folder} has {other[0]}, which is no part of an update (left, right, scale): load_adapters")
    one, scaling = torch.tensor(1.0), manifest["scaling"]
    found: dict[str, Factors] = {}
    for name in manifest["layers"]:
        part = {
            prefix: Factors(
                tensors[f"{name}.{prefix}left"],
                tensors[f"{name}.{prefix}right"],
                tensors.get(f"{name}.{prefix}scale", one) * scaling,
            )
            for prefix in ("", "start_")
            if f"{name}.{prefix}left" in tensors
        }
        found[name] = part[""].minus(part["start_"]) if "start_" in part else part[""]
    return found


def _read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the manifest of an adapter folder, once they agree in everything that the update depends on."""
    tensors, manifest = read_tensors(folder / "adapter", expected=ADAPTER_FORMAT, version=ADAPTER_VERSION)
    described, path = folder / "adapter.json", folder / "adapter.safetensors"
    with interpreted(described):
        rank, alpha, scaling = (_number(key, manifest[key]) for key in ("rank", "alpha", "scaling"))
        if rank < 1 or not math.isclose(scaling, alpha / rank, rel_tol=1e-9):  # a division of float64, and its text
            raise FileError(f"{described}: scaling {scaling:g} is not alpha / rank, which is {alpha:g} / {rank:g}")
        if not isinstance(manifest["kind"], str) or not manifest["layers"]:
            raise FileError(f"{described}: kind {manifest['kind']!r} is a word, and layers are at least one")
        for name, shapes in manifest["layers"].items():
            left, right = tuple(shapes["left"]), tuple(shapes["right"])
            if len(left) != 2 or len(right) != 2 or left[1] != rank or right[1] != rank:
                raise FileError(f"{described}: {name} has factors {left} and {right}, rank {rank:g} was expected")
    keys: dict[str, set[str]] = {name: set() for name in manifest["layers"]}
    for name, tensor in tensors.items():
        layer, _, key = name.rpartition(".")
        keys[layer].add(key)
        shapes = manifest["layers"][layer]
        cores = [(), (int(rank),), (int(rank), int(rank))]
        part = key.removeprefix("start_")
        if part in PARTS and tuple(tensor.shape) not in (cores if part == "scale" else [tuple(shapes[part])]):
            raise FileError(f"{path}: {name} has shape {tuple(tensor.shape)}, which does not fit rank {rank:g}")
        if tensor.dtype not in WIDE:
            raise FileError(f"{path}: {name} is {tensor.dtype}: factors are kept in float32, rounding costs 1e-3")
    needed = ["left", "right", *(["scale"] if manifest["kind"] == EBLoRALinear.kind else [])]
    for name, own in keys.items():
        started = [f"start_{key}" for key in needed] if any(key.startswith("start_") for key in own) else []
        if lacking := sorted({*needed, *started} - own):
            raise FileError(f"{path} lacks {', '.join(f'{name}.{key}' for key in lacking)}")
    return tensors, manifest


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{key} is {value!r}, a finite number is needed")
    return value


@torch.no_grad()
def load_adapters(model: nn.Module, folder: Path | str, *, any_base: bool = False) -> None:
    """Set the adapters injected in the model to the values in ``folder``.

    Args:
        model: with adapters injected.
        folder: that `save_adapters` wrote.
        any_base: load onto a base whose weights are not those the adapters were trained on.

    Raises:
        FileError: when the file's adapters differ from the model's in name, kind, rank, scaling, shape or base, or
            reach into what the model protects; the differences are listed and nothing is loaded.
    """
    folder = Path(folder)
    tensors, manifest = _read(folder)
    adapters = adapters_of(model)
    here = {f"{name}.{key}": tensor for name, a in adapters.items() for key, tensor in a.own_tensors()}
    differing = _differences(here, tensors, adapters, manifest) or _off_manifold(tensors, adapters)
    if differing := differing or ([] if any_base else _other_bases(folder, manifest, adapters)):
        shown = "; ".join(sorted(differing)[:5]) + (" …" if len(differing) > 5 else "")
        raise FileError(f"{folder} does not fit the model ({len(differing)} differences): {shown}")
    for name, tensor in here.items():
        tensor.copy_(tensors[name])


def _differences(
    here: Mapping[str, Tensor], tensors: Mapping[str, Tensor], adapters: Mapping[str, Adapter], manifest: dict[str, Any]
) -> list[str]:
    said = [f"missing in the file: {name}" for name in here.keys() - tensors.keys()]
    said += [f"not in the model: {name}" for name in tensors.keys() - here.keys()]
    said += [
        f"{name}: file {tuple(tensors[name].shape)}, model {tuple(here[name].shape)}"
        for name in here.keys() & tensors.keys()
        if tensors[name].shape != here[name].shape
    ]
    return said + [
        f"{name}: file {manifest['kind']} scaled by {manifest['scaling']:g}, "
        f"model {adapter.kind} scaled by {adapter.scaling:g}"
        for name, adapter in adapters.items()
        if (adapter.kind, adapter.scaling) != (manifest["kind"], manifest["scaling"])
    ]


def _other_bases(folder: Path, manifest: Mapping[str, Any], adapters: Mapping[str, Adapter]) -> list[str]:
    """Layers whose base weight is not the one that the adapters were trained on."""
    with interpreted(folder / "adapter.json"):
        saved = manifest.get("base", {}).items()
    found = {name: other_base(text, adapters[name].base) for name, text in saved if name in adapters}
    hint = "any_base=True loads it nevertheless"
    return [f"{name}: trained on another model, {what} ({hint})" for name, what in found.items() if what]


def _off_manifold(tensors: Mapping[str, Tensor], adapters: Mapping[str, Adapter]) -> list[str]:
    """Frames in the file that are no points of the manifolds of the adapters they are meant for."""
    said = []
    for name, adapter in adapters.items():
        for key, _, manifold in adapter.manifold_parameters() if isinstance(adapter, EBLoRALinear) else ():
            error = manifold.constraint_error(tensors[f"{name}.{key}"])
            if not all(part <= OFF for part in error):  # NaN is off as well
                said.append(f"{name}.{key}: off the model's manifold ({error})")
    return said
