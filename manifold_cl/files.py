"""Atomic JSON and tensor files: a safetensors file with a JSON manifest that carries its checksum.

Tensors and manifest are replaced together (`replacing`), so a killed write leaves the old pair or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from manifold_cl._version import __version__
from manifold_cl.replacing import replaced_together

VERSION = 1
PIECE = 2**24
"""Bytes that are hashed at once."""


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
    write_atomically(path, json_bytes(content))


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """``content`` as indented JSON; NaN is refused (unknown numbers are null)."""
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        FileError: when it is missing, not a regular file (reading a pipe would never end), or not UTF-8.
    """
    require_file(path)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is damaged or truncated ({error}): restore it, or delete its folder") from None
    except OSError as error:
        raise FileError(f"{path} cannot be read ({error.strerror})") from error


def require_file(path: Path, missing: str = "does not exist") -> None:
    """Refuse what is not a file.

    Raises:
        FileError: when it is missing, or a folder, a pipe or a device.
    """
    if not path.is_file():
        raise FileError(f"{path} {'is not a regular file' if path.exists() else missing}")


@contextmanager
def interpreted(path: Path) -> Iterator[None]:
    """Turns what Python raises about content of the wrong kind into an error that names the file.

    Raises:
        FileError: for a missing key, a list in place of an object, a word in place of a number and the like.
    """
    try:
        yield
    except FileError:
        raise
    except KeyError as error:
        raise FileError(f"{path} lacks the key {error}: restore it, or delete its folder") from error
    except (TypeError, ValueError, AttributeError, IndexError, OverflowError, RuntimeError, re.error) as error:
        raise FileError(f"{path} does not follow its format ({error}): restore it, or delete its folder") from error


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
        content = json.loads(read_text(path))
    except FileError:
        raise
    except (ValueError, RecursionError) as error:  # RecursionError: brackets in brackets, thousands deep
        raise FileError(f"{path} is damaged or truncated ({error}): {remedy}") from None
    found = content.get("format") if isinstance(content, dict) else None
    if found != expected:
        raise FileError(f"{path} is not of format {expected!r} (found {found!r})")
    written = content.get("version", 1)
    if type(written) is not int or written < 1:
        raise FileError(f"{path} has version {written!r}, a whole number from 1 on is needed: {remedy}")
    if written > version:
        raise FileError(f"{path} has version {written}, this library reads up to {version}: update it")
    return dict(content)


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file that a user wrote.

    Raises:
        FileError: when it is missing or malformed.
    """
    try:
        return tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise FileError(f"{path} is no TOML file: {error}") from None


def write_tensors(stem: Path, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> None:
    """Write ``stem.safetensors`` and ``stem.json``, the checksum in it; both are replaced together, or neither is.

    Raises:
        OSError: when the disk is full or the folder cannot be written; what was there before is untouched.
    """
    path, described = stem.with_suffix(".safetensors"), stem.with_suffix(".json")
    with replaced_together(path.parent, (path.name, described.name)) as new:
        save_tensors(new / path.name, tensors, final=path)
        content = {**manifest, "library": __version__, "sha256": file_digest(new / path.name)}
        (new / described.name).write_bytes(json_bytes(content))


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], *, final: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file, readable to whom its folder is. Tensors that share memory are written one by one.

    Args:
        path: of the file.
        tensors: by name.
        final: the path that errors name.
        metadata: of the file's header.

    Raises:
        OSError: when it cannot be written.
    """
    ready: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        start = tensor.untyped_storage().data_ptr()
        ready[name] = tensor.clone() if start in seen else tensor  # safetensors refuses memory that is shared
        seen.add(start)
    try:
        save_file(ready, path, metadata)
    except SafetensorError as error:  # its way to report what the disk said
        raise OSError(f"{final} could not be written ({error}): what was there before is untouched") from error
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets nobody else read it


def read_tensors(stem: Path, *, expected: str, version: int = VERSION) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the manifest that `write_tensors` wrote.

    Raises:
        FileError: when either file is missing or damaged, the two do not belong together, or a tensor is not finite.
    """
    described, path = stem.with_suffix(".json"), stem.with_suffix(".safetensors")
    manifest = read_json(described, expected=expected, version=version)
    check_digest(path, manifest)
    tensors = load_tensors(path)
    with interpreted(described):
        layers = manifest.get("layers", {})
        listed = {f"{name}.{key}": tuple(shape) for name, shapes in layers.items() for key, shape in shapes.items()}
    if lacking := [name for name in listed if name not in tensors]:
        raise FileError(f"{described} names tensors that {path.name} lacks: {', '.join(lacking[:5])}")
    if "layers" in manifest and (more := [name for name in tensors if name.rpartition(".")[0] not in layers]):
        raise FileError(f"{path} has tensors of layers that {described.name} lacks: {', '.join(more[:5])}")
    for name, shape in listed.items():
        if tuple(tensors[name].shape) != shape:
            raise FileError(f"{path}: {name} has shape {tuple(tensors[name].shape)}, {described.name} says {shape}")
    return tensors, manifest


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, all of them finite.

    Raises:
        FileError: when it is missing, no safetensors file, or holds NaN, infinite entries or other kinds of numbers.
    """
    require_file(path)
    try:
        # Copies: inside the file's buffer tensors lie at odd addresses, and MKL promises equal bits for equal
        # alignment only.
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise FileError(f"{path} is no safetensors file, or cut short ({error})") from None
    for name, tensor in tensors.items():
        require_finite(path, name, tensor)
    return tensors


def require_finite(path: Path, name: str, tensor: Tensor) -> None:
    """Refuse a tensor of a file that holds NaN, infinite entries, or numbers that nothing here writes.

    Raises:
        FileError: naming the tensor.
    """
    if not tensor.is_floating_point() or tensor.element_size() == 1:
        raise FileError(f"{path}: {name} is {tensor.dtype}, floating point of 16 bits or more is needed")
    if not bool(tensor.isfinite().all()):
        raise FileError(f"{path}: {name} has NaN or infinite entries: the run that wrote it had diverged")


def check_digest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse a file whose checksum is not the one in its manifest.

    Raises:
        FileError: when it is missing or another one.
    """
    require_file(path, "does not exist, though its manifest does")
    digest, written = file_digest(path), str(manifest.get("sha256"))
    if digest != written:
        raise FileError(
            f"{path} does not match its manifest (sha256 {digest[:12]}…, expected {written[:12]}…): it was changed, "
            "or its write was interrupted"
        )


def file_digest(path: Path) -> str:
    """The sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def damage(folder: Path, expected: Iterable[str] = ()) -> str | None:
    """What is wrong with the tensor files in ``folder``, None where each is what its manifest vouches for.

    Args:
        folder: of one task.
        expected: names of files that must be there, beside those of which a manifest is.
    """
    manifests = (path for path in folder.glob("*.json") if promised_digest(path) is not None)
    tensors = (path.name.removesuffix(".json").removesuffix(".next") + ".safetensors" for path in manifests)
    for name in sorted({*expected, *tensors}):
        if not (folder / name).exists():
            return f"{folder / name} is missing"
    for path in sorted(folder.glob("*.safetensors")):
        if not path.is_file():
            return f"{path} is not a regular file"
        vouchers = [path.with_suffix(suffix) for suffix in (".json", ".next.json")]  # of older versions' memories
        if file_digest(path) not in (promised_digest(manifest) for manifest in vouchers):
            return f"{path} is not what its manifest vouches for"
    return None


def promised_digest(manifest: Path) -> str | None:
    """The checksum in a manifest; None where there is none, or the file cannot be read."""
    try:
        content = json.loads(read_text(manifest))
    except (ValueError, RecursionError):
        return None
    return content.get("sha256") if isinstance(content, dict) else None
