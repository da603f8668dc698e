"""Models in archives: only their files are unpacked, once, and every use verifies them."""

import hashlib
import zipfile
from pathlib import Path

import pytest

from manifold_cl.streams.archives import LOCK, Archive, FetchError
from manifold_cl.streams.packaged_models import PackagedModel

FILES = {"config.json": b"{}", "model.safetensors": b"weights"}
DIGESTS = {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("MANIFOLD_CL_CACHE", str(folder))
    return folder


@pytest.fixture(params=["model", ""])
def place(request: pytest.FixtureRequest) -> str:
    return request.param


def archive(path: Path) -> Archive:
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "0" * 64
    return Archive("tiny-model", "0.1.0", path.name, digest, source=False)


def pinned(folder: Path, place: str) -> PackagedModel:
    """A model in a wheel that lies in the cache."""
    folder.mkdir(exist_ok=True)
    path = folder / "tiny_model-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, data in FILES.items():
            wheel.writestr("/".join(part for part in ("tiny_model", place, name) if part), data)
        wheel.writestr("tiny_model/__init__.py", "raise RuntimeError('must not be imported')")
    return PackagedModel(archive(path), "tiny_model", place, DIGESTS)


def test_only_the_model_s_files_are_unpacked_once(cache: Path, place: str) -> None:
    model = pinned(cache, place)
    folder = model.folder()
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == FILES
    names = sorted(path.name for path in cache.iterdir() if path.name != LOCK)
    assert names == ["tiny_model-0.1.0", "tiny_model-0.1.0-py3-none-any.whl"]
    (cache / "tiny_model-0.1.0-py3-none-any.whl").unlink()
    assert model.folder() == folder


def test_an_altered_model_file_is_reported(cache: Path, place: str) -> None:
    model = pinned(cache, place)
    folder = model.folder()
    (folder / "model.safetensors").write_bytes(b"weightz!")
    with pytest.raises(FetchError, match=r"model\.safetensors has 8 bytes .*delete the folder"):
        model.folder()
    (folder / "model.safetensors").unlink()
    with pytest.raises(FetchError, match=r"lacks model\.safetensors: delete the folder"):
        model.folder()


def test_a_file_that_the_model_did_not_come_with_is_named(cache: Path, place: str) -> None:
    """A loader would read it: adapter_config.json brings other weights."""
    model = pinned(cache, place)
    (model.folder() / "adapter_config.json").write_text("{}")
    with pytest.raises(FetchError, match=r"has files that the model's archive lacks \(adapter_config\.json\)"):
        model.folder()


def test_an_installed_model_is_found_unimported_and_checked(
    cache: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "site" / "tiny_model" / place
    folder.mkdir(parents=True)
    (tmp_path / "site" / "tiny_model" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    model = PackagedModel(archive(tmp_path / "none.whl"), "tiny_model", place, DIGESTS)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert model.folder() == folder
    assert not cache.exists()
    (folder / "model.safetensors").write_bytes(b"other")
    with pytest.raises(FetchError, match=r"has 5 bytes .*uninstall or reinstall"):
        model.folder()
