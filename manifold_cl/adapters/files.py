"""Tensors on disk: one safetensors file and a JSON manifest that vouches for it.

The manifest is written last and carries the tensors' sha256, so an interrupted write is noticed when read.
"""

from __future__ import annotations

import hashlib
import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from manifold_cl import __version__
from manifold_cl.adapters.adapter import Adapter, Factors
from manifold_cl.adapters.bases import WIDE, fingerprint, other_base
from manifold_cl.adapters.eblora import EBLoRALinear
from manifold_cl.adapters.inject import adapters_of
from manifold_cl.adapters.state import require_on_manifolds

ADAPTER_FORMAT = "manifold_cl.adapter"
VERSION = 1
ADAPTER_VERSION = 2
"""Read up to this one. Adapters with a scalar core and no compensation are still written as version 1."""
OFF = 1e-4
"""Constraint error beyond which a saved frame belongs to another manifold: fifty times what training leaves."""


class FileError(ValueError):
    """A file that is missing, damaged, or of another kind than expected; the message names it."""


def write_atomically(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content``, or leave it untouched: temporary file, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` atomically as indented JSON; NaN is refused (unknown numbers are null)."""
    write_atomically(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def read_json(
    path: Path, *, expected: str, version: int = VERSION, remedy: str = "restore it, or delete its folder"
) -> dict[str, Any]:
    """The JSON object at ``path``, whose ``format`` must be ``expected``.

    Args:
        path: of the file.
        expected: its format.
        version: read up to this one.
        remedy: what to do about a damaged one.

    Raises:
        FileError: when it is missing, truncated, of another format or of a newer version.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FileError(f"{path} is damaged or truncated ({error}): {remedy}") from None
    found = content.get("format") if isinstance(content, dict) else None
    if found != expected:
        raise FileError(f"{path} is not of format {expected!r} (found {found!r})")
    if content.get("version", 0) > version:
        raise FileError(f"{path} has version {content['version']}, this library reads up to {version}: update it")
    return dict(content)


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file that a user wrote.

    Raises:
        FileError: when it is missing or malformed.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileError(f"{path} does not exist") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FileError(f"{path} is no TOML file: {error}") from None


def write_tensors(stem: Path, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> None:
    """Write ``stem.safetensors`` and ``stem.json``, each atomically, the manifest last with the checksum."""
    content = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
    write_atomically(stem.with_suffix(".safetensors"), content)
    digest = hashlib.sha256(content).hexdigest()
    write_json(stem.with_suffix(".json"), {**manifest, "library": __version__, "sha256": digest})


def read_tensors(stem: Path, *, expected: str, version: int = VERSION) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the manifest that `write_tensors` wrote.

    Raises:
        FileError: when either file is missing or damaged, or the two do not belong together.
    """
    manifest = read_json(stem.with_suffix(".json"), expected=expected, version=version)
    path = stem.with_suffix(".safetensors")
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != manifest.get("sha256"):
            raise FileError(
                f"{path} does not match its manifest (sha256 {digest[:12]}…, expected "
                f"{str(manifest.get('sha256'))[:12]}…): it was changed, or its write was interrupted"
            )
        # Copies: inside the file's buffer tensors lie at odd addresses, and MKL promises equal bits for equal
        # alignment only.
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    except FileNotFoundError:
        raise FileError(f"{path} does not exist, though its manifest does") from None
    except SafetensorError as error:
        raise FileError(f"{path} is no safetensors file ({error})") from None
    listed = [f"{name}.{key}" for name, shapes in manifest.get("layers", {}).items() for key in shapes]
    if lacking := [name for name in listed if name not in tensors]:
        raise FileError(f"{stem.with_suffix('.json')} names tensors that {path.name} lacks: {', '.join(lacking[:5])}")
    return tensors, manifest


def damage(folder: Path, expected: Iterable[str] = ()) -> str | None:
    """What is wrong with the tensor files in ``folder``, None where each is what its manifest vouches for.

    Args:
        folder: of one task.
        expected: names of files that must be there, beside those of which a manifest is.
    """
    vouched = (path for path in folder.glob("*.json") if _promised(path) is not None)
    tensors = (path.name.removesuffix(".json").removesuffix(".next") + ".safetensors" for path in vouched)
    for name in sorted({*expected, *tensors}):
        if not (folder / name).exists():
            return f"{folder / name} is missing"
    for path in sorted(folder.glob("*.safetensors")):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        manifests = [path.with_suffix(suffix) for suffix in (".json", ".next.json")]  # a memory's next one may wait
        if digest not in (_promised(manifest) for manifest in manifests):
            return f"{path} is not what its manifest vouches for"
    return None


def _promised(manifest: Path) -> str | None:
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content.get("sha256") if isinstance(content, dict) else None


def save_adapters(model: nn.Module, folder: Path | str, *, task: str = "") -> None:
    """Write the model's adapters as ``adapter.safetensors`` and ``adapter.json`` (docs/record-format.md).

    Raises:
        ValueError: when the model has no adapters, adapters of several kinds or ranks, merged ones, or frames off
            their manifolds.
        TypeError: for factors that were forced into half precision.
    """
    adapters = adapters_of(model)
    shared = {(a.kind, a.rank, a.alpha) for a in adapters.values()}
    if len(shared) != 1:
        raise ValueError(f"one file holds adapters of one kind, rank and alpha; the model has {sorted(shared)}")
    if merged := [name for name, adapter in adapters.items() if adapter.merged]:
        raise ValueError(f"{merged[0]} is merged into its base weight at present: unmerge() before saving")
    require_on_manifolds(model, to="save")
    kind, rank, alpha = shared.pop()
    tensors = {f"{name}.{key}": tensor for name, a in adapters.items() for key, tensor in a.own_tensors()}
    if narrow := [name for name, tensor in tensors.items() if tensor.dtype not in WIDE]:
        raise TypeError(
            f"{narrow[0]} is {tensors[narrow[0]].dtype}: factors are kept in float32, rounding them costs 1e-3 of "
            "orthonormality. model.to(torch.bfloat16) leaves them alone; what set .data must convert back and retrain"
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
        FileError: when a file is missing or damaged.
    """
    tensors, manifest = read_tensors(Path(folder) / "adapter", expected=ADAPTER_FORMAT, version=ADAPTER_VERSION)
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
    tensors, manifest = read_tensors(folder / "adapter", expected=ADAPTER_FORMAT, version=ADAPTER_VERSION)
    adapters = adapters_of(model)
    here = {f"{name}.{key}": tensor for name, a in adapters.items() for key, tensor in a.own_tensors()}
    differing = _differences(here, tensors, adapters, manifest) or _off_manifold(tensors, adapters)
    if differing := differing or ([] if any_base else _other_bases(manifest.get("base", {}), adapters)):
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


def _other_bases(saved: Mapping[str, str], adapters: Mapping[str, Adapter]) -> list[str]:
    """Layers whose base weight is not the one that the adapters were trained on."""
    found = {name: other_base(text, adapters[name].base) for name, text in saved.items() if name in adapters}
    hint = "any_base=True loads it nevertheless"
    return [f"{name}: trained on another model, {what} ({hint})" for name, what in found.items() if what]


def _off_manifold(tensors: Mapping[str, Tensor], adapters: Mapping[str, Adapter]) -> list[str]:
    """Frames in the file that are no points of the manifolds of the adapters they are meant for."""
    said = []
    for name, adapter in adapters.items():
        for key, _, manifold in adapter.manifold_parameters() if isinstance(adapter, EBLoRALinear) else ():
            error = manifold.constraint_error(tensors[f"{name}.{key}"])
            if max(error) > OFF:
                said.append(f"{name}.{key}: off the model's manifold ({error})")
    return said
