"""Repositories of the Hugging Face hub as local folders: ``hf://owner/name``, with a revision or a path inside.

``huggingface_hub`` downloads what is needed into its own cache, and reads the cache alone where there is no network.
"""

import re
from pathlib import Path
from typing import NamedTuple

_ADDRESS = re.compile(r"hf:/{1,2}(?P<repository>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<inner>.+))?")
_ADAPTERS = ("*adapter_config.json", "*adapter_model*")
_ALL = ("*.safetensors", "*.bin", "*.json")
"""Files that are downloaded where a repository holds no folder of PEFT, or for a base model."""
_FILES = (".safetensors", ".bin", ".pt", ".pth")


class HubFolder(NamedTuple):
    """A part of a repository that is on this machine."""

    path: Path
    """The folder or file in the cache."""
    name: str
    """``owner/name``, with the path inside the repository."""
    commit: str
    """The commit that was read."""


def is_hub_address(path: str | Path) -> bool:
    """Whether a path is the address of a repository. A `Path` has lost the second slash.

    >>> is_hub_address("hf://owner/name"), is_hub_address(Path("hf://owner/name")), is_hub_address("owner/name")
    (True, True, False)
    """
    return str(path).startswith("hf:/")


def from_hub(address: str | Path, *, weights: bool = False) -> HubFolder:
    """The local copy of ``hf://owner/name[@revision][/folder or file]``; with `weights` that of a base model.

    Raises:
        ImportError: huggingface_hub is not installed.
        ValueError: the address has another form.
        FileNotFoundError: the hub has no such repository, or it is not in the cache and the hub cannot be reached.
    """
    address = re.sub("^hf:/{1,2}", "hf://", str(address))
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise ValueError(f"{address} is no address on the hub: hf://owner/name was expected, with @revision or /folder")
    inner = match["inner"]
    if inner is not None and Path(inner).suffix in _FILES:
        folder = inner.rpartition("/")[0]
        patterns: tuple[str, ...] = (inner, f"{folder}/adapter_config.json".strip("/"))
    elif inner is not None:
        patterns = tuple(f"{inner}/{pattern}" for pattern in _ALL)
    else:
        patterns = _ALL if weights else _ADAPTERS
    local = _snapshot(address, match["repository"], match["revision"], patterns)
    if inner is None and not weights and not any(local.rglob("adapter_config.json")):
        local = _snapshot(address, match["repository"], match["revision"], _ALL)
    path = local if inner is None else local / inner
    if not path.exists():
        raise FileNotFoundError(f"{address}: the repository, or its copy in the cache, holds no {inner}")
    return HubFolder(path, "/".join(part for part in (match["repository"], inner) if part), local.name)


def _snapshot(address: str, repository: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    try:
        import huggingface_hub as hub
        from huggingface_hub import constants, errors
    except ImportError as error:
        raise ImportError(f"{address} needs huggingface_hub: pip install 'huggingface-hub>=1.3'") from error
    try:
        local = hub.snapshot_download(repository, revision=revision, allow_patterns=list(patterns))
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(f"{address}: the hub has no such repository, or it is not yours ({reason})") from error
    except Exception as error:  # without a network every layer of the client raises its own kind
        download = f"hf download {repository}{f' --revision {revision}' if revision else ''}"
        raise FileNotFoundError(
            f"{address} is not in the cache {constants.HF_HUB_CACHE}, and the hub cannot be reached "
            f"({type(error).__name__}): run '{download}' where there is a network, or give a local folder"
        ) from error
    return Path(str(local))


def reachable_model(model: str) -> str:
    """The model's folder or name; for a name of the hub without a network, the folder of its copy in the cache.

    Raises:
        FileNotFoundError: neither a folder nor in the cache, and the hub does not have it or cannot be reached.
    """
    if Path(model).exists() or Path(model).is_absolute() or model.startswith(".") or model.count("/") > 1:
        return model  # the reader of models has a message for folders that do not exist
    try:
        import huggingface_hub as hub
        from huggingface_hub import constants, errors
    except ImportError as error:
        raise ImportError(f"model {model} needs huggingface_hub: pip install 'huggingface-hub>=1.3'") from error

    try:
        hub.HfApi().model_info(model, timeout=10)
        return model
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise FileNotFoundError(
            f"model {model} is no folder, and the hub has no such model, or it is not yours: give a folder"
        ) from None
    except Exception as error:  # without a network every layer of the client raises its own kind
        reason = type(error).__name__
    try:
        return str(hub.snapshot_download(model, local_files_only=True))
    except errors.LocalEntryNotFoundError:
        raise FileNotFoundError(
            f"model {model} is no folder and not in the cache {constants.HF_HUB_CACHE}, and the hub cannot be "
            f"reached ({reason}): run 'hf download {model}' where there is a network, or give a folder"
        ) from None
