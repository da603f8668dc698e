"""Files on disk: the old one or the new one at every moment, and a refusal by name of every other."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import killed_at
from safetensors import safe_open
from safetensors.torch import save_file

from analysis.formats import read_format
from manifold_cl import files
from manifold_cl.files import FileError, library_errors, read_json, write_atomically, write_json
from manifold_cl.tensor_files import TensorFile, load_tensors, read_tensors, write_tensors

VERSION_1 = Path(__file__).parent / "version_1"
TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones((), dtype=torch.float64), "c": torch.empty(4, 0)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A tensor file."""
    write_tensors(tmp_path / "notes.safetensors", TENSORS, {"task": "nouns"})
    return tmp_path / "notes.safetensors"


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "record.json"
    write_atomically(path, b"old")

    def disk_full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", disk_full)
        with pytest.raises(OSError, match=r"No space left.*record\.json"):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["record.json"]
    with path.open("rb") as reader:
        write_atomically(path, b"new")
        assert reader.read() == b"old"  # replaced, not written into
    assert path.read_bytes() == b"new"


def test_unknown_numbers_are_null_in_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not (tmp_path / "a.json").exists()
    write_json(tmp_path / "a.json", {"format": "f", "x": None})
    assert read_json(tmp_path / "a.json", expected="f") == {"format": "f", "x": None}


def test_the_library_reads_a_tensor_file_and_its_manifest(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(TENSORS)
        assert all(torch.equal(file.get_tensor(name), TENSORS[name]) for name in TENSORS)
        manifest = json.loads(file.metadata()["manifest"])
    assert (manifest["format"], manifest["version"], manifest["task"]) == ("manifold_cl.notes", 2, "nouns")
    tensors, own = read_tensors(path)
    assert own == manifest
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_views_and_shared_memory_are_written_as_they_read(dtype: torch.dtype, tmp_path: Path) -> None:
    wide = torch.arange(12.0).reshape(3, 4).to(dtype)
    given = {"whole": wide, "same": wide, "part": wide[1:], "slice": wide[:, 1:3], "transpose": wide.T}
    write_tensors(tmp_path / "t.safetensors", given, {})
    found = TensorFile(tmp_path / "t.safetensors")
    assert {name: found.shape(name) for name in found} == {name: tuple(tensor.shape) for name, tensor in given.items()}
    assert all(torch.equal(found[name], given[name]) for name in given)
    # Torch aligns its own memory to 64 bytes; MKL promises equal bits for equal alignment only.
    assert all(tensor.data_ptr() % 64 == 0 for tensor in found.values())


def test_files_of_others_are_read_without_a_manifest(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2), "odd": torch.ones(3, dtype=torch.float16)}, tmp_path / "x.safetensors")
    assert torch.equal(load_tensors(tmp_path / "x.safetensors")["x"], torch.ones(2))
    with pytest.raises(FileError, match=r"x\.safetensors has no manifest, in its header or in x\.json"):
        read_tensors(tmp_path / "x.safetensors")
    save_file({"codes": torch.ones(2, dtype=torch.int8)}, tmp_path / "x.safetensors")
    with pytest.raises(FileError, match=r"x\.safetensors: codes is I8"):
        load_tensors(tmp_path / "x.safetensors")
    with pytest.raises(TypeError, match=r"codes is torch\.int8"):
        write_tensors(tmp_path / "y.safetensors", {"codes": torch.ones(2, dtype=torch.int8)}, {})
    assert visible(tmp_path) == ["x.safetensors"]


def test_a_flipped_byte_is_found_wherever_it_is(path: Path) -> None:
    content = path.read_bytes()
    for index in range(len(content)):
        path.write_bytes(content[:index] + bytes([content[index] ^ 1]) + content[index + 1 :])
        with pytest.raises(FileError, match=r"notes\.safetensors"):
            read_tensors(path)


def test_a_truncated_file_is_found_wherever_it_ends(path: Path) -> None:
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(FileError, match=r"notes\.safetensors"):
            TensorFile(path)  # without reading a tensor
    path.write_bytes(content + b" ")
    with pytest.raises(FileError, match=rf"has {len(content) + 1} bytes instead of the {len(content)}"):
        TensorFile(path)


def test_a_file_that_is_truncated_after_it_was_opened_is_found(path: Path) -> None:
    file = TensorFile(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FileError, match=r"notes\.safetensors is truncated: a "):
        file.verify()
    path.unlink()
    with pytest.raises(FileError, match=r"notes\.safetensors cannot be read"):
        file["a"]


def test_what_is_no_file_is_refused_by_name(path: Path) -> None:
    for make in (Path.mkdir, os.mkfifo):
        path.unlink(missing_ok=True)
        make(path)
        with pytest.raises(FileError, match=r"notes\.safetensors is not a regular file"):
            read_tensors(path)
        with pytest.raises(OSError, match=r"notes\.safetensors is not a regular file"):
            write_tensors(path, TENSORS, {})
        if path.is_dir():
            path.rmdir()
    path.unlink()
    with pytest.raises(FileError, match=r"notes\.safetensors does not exist"):
        read_tensors(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 3}, r"notes\.safetensors has version 3 of manifold_cl\.notes, versions 1 to 2 .* update"),
        ({"version": "2"}, r"notes\.safetensors has version '2', a whole number"),
        ({"format": "manifold_cl.other"}, r"not of format 'manifold_cl\.notes' \(found 'manifold_cl\.other'\)"),
    ],
)
def test_other_versions_and_formats_are_refused_by_name(changes: dict[str, Any], message: str, path: Path) -> None:
    write_tensors(path, TENSORS, changes)
    with pytest.raises(FileError, match=message):
        TensorFile(path)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b"[" * 50_000,
        b'{"a": []}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}',
        b'{"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}',
    ],
)
def test_a_header_of_other_kinds_is_refused_by_name(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(FileError, match=r"odd\.safetensors"):
        load_tensors(path)


def test_a_write_that_is_killed_leaves_the_old_file_or_the_new_one(path: Path) -> None:
    def write(value: float) -> Callable[[], None]:
        return lambda: write_tensors(path, {"a": torch.tensor(value)}, {})

    def killed() -> None:
        os.fsync = lambda _: os.kill(os.getpid(), 9)  # type: ignore[assignment]
        write(2.0)()

    write(1.0)()
    assert killed_at(99, killed)  # before its only rename
    assert read_tensors(path)[0]["a"] == 1.0
    assert killed_at(1, write(2.0))
    assert read_tensors(path)[0]["a"] == 2.0
    assert not killed_at(2, write(3.0))
    assert read_tensors(path)[0]["a"] == 3.0
    assert visible(path.parent) == ["notes.safetensors"]


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_tensors(tmp_path / "t.safetensors", TENSORS, {})
    finally:
        os.umask(before)
    assert (tmp_path / "t.safetensors").stat().st_mode & 0o777 == 0o640


def test_the_documented_reader_accepts_what_is_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[1] / "docs" / "record-format.md").read_text(encoding="utf-8")
    (reader,) = (part for part in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "hashlib" in part)
    code = reader.replace("adapter/adapter.safetensors", path.name)
    monkeypatch.chdir(path.parent)
    found: dict[str, Any] = {}
    exec(code, found)
    assert found["manifest"]["task"] == "nouns"
    path.write_bytes(path.read_bytes()[:-1] + b"~")
    with pytest.raises(AssertionError):
        exec(code, {})


STORED = sorted(path.relative_to(VERSION_1) for path in VERSION_1.rglob("*.safetensors"))


@pytest.mark.parametrize("name", STORED, ids=str)
def test_a_file_of_version_1_is_read_and_written_again_as_version_2(name: Path, tmp_path: Path) -> None:
    shutil.copytree((VERSION_1 / name).parent, tmp_path / "task")
    path = tmp_path / "task" / name.name
    tensors, manifest = read_tensors(path)
    assert manifest["version"] in (1, 2)  # adapters with a core of several numbers had version 2 in two files
    assert manifest["sha256"]
    write_tensors(path, tensors, {key: manifest[key] for key in manifest.keys() - {"version", "sha256"}})
    assert not path.with_suffix(".json").exists()
    again, _ = read_tensors(path)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("name", STORED, ids=str)
def test_a_damaged_file_of_version_1_is_refused_by_name(name: Path, tmp_path: Path) -> None:
    shutil.copytree((VERSION_1 / name).parent, tmp_path / "task")
    path = tmp_path / "task" / name.name
    described = path.with_suffix(".json")
    content, text = path.read_bytes(), described.read_text()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(FileError, match=rf"{path.name} was changed or damaged.*{described.name}"):
        TensorFile(path)
    path.write_bytes(content[:-1])
    with pytest.raises(FileError, match=rf"{path.name} has {len(content) - 1} bytes"):
        TensorFile(path)
    path.write_bytes(content)
    write_json(described, {**json.loads(text), "version": 3})
    with pytest.raises(FileError, match=rf"{described.name} has version 3 of \w+\.{path.stem}, versions 1 to 2"):
        TensorFile(path)
    for damaged in (text[:-20], "[" * 100_000, "[1, 2]"):
        described.write_text(damaged)
        with pytest.raises(FileError, match=described.name):
            TensorFile(path)
    described.unlink()
    with pytest.raises(FileError, match=rf"{path.name} has no manifest, in its header or in {described.name}"):
        TensorFile(path)


def test_links_that_a_killed_write_of_version_1_left_are_followed_and_replaced(tmp_path: Path) -> None:
    stage = tmp_path / ".adapter.safetensors.0.staged"
    shutil.copytree(VERSION_1 / "full_core", stage / "new")
    (stage / "now").symlink_to("new")
    for name in ("adapter.safetensors", "adapter.json"):
        (tmp_path / name).symlink_to(f"{stage.name}/now/{name}")
    tensors, _ = read_tensors(tmp_path / "adapter.safetensors")
    write_tensors(tmp_path / "adapter.safetensors", tensors, {})
    assert os.listdir(tmp_path) == ["adapter.safetensors"]
    assert read_tensors(tmp_path / "adapter.safetensors")[0].keys() == tensors.keys()


def test_a_changed_digit_of_a_json_file_is_named_and_spaces_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    content = {"format": "notes", "version": 1, "score": 74.25, "rows": [(1, None), ["é", 1e-17, True]], "empty": {}}
    write_json(path, content)
    read = read_json(path, expected="notes")
    assert read == {**content, "rows": [[1, None], ["é", 1e-17, True]]}
    text = path.read_text()
    path.write_text(json.dumps(json.loads(text)))
    assert read_json(path, expected="notes") == read
    path.write_text(text.replace("74.25", "74.75"))
    with pytest.raises(FileError, match=r"notes\.json was changed or damaged, it does not match its 'checksum'"):
        read_json(path, expected="notes")
    changed = json.loads(path.read_text())
    del changed["checksum"]
    path.write_text(json.dumps(changed))
    assert read_json(path, expected="notes")["score"] == 74.75


@pytest.mark.parametrize("checksum", ["0" * 64, None, 3])
def test_the_library_and_analysis_refuse_the_same_checksums(checksum: object, tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    write_json(path, {"format": "notes", "version": 1, "score": 74.25})
    assert read_format(path, "", "notes")[1] == read_json(path, expected="notes")
    path.write_text(json.dumps({**json.loads(path.read_text()), "checksum": checksum}))
    message = r"notes\.json was changed or damaged, it does not match its 'checksum': restore it"
    with pytest.raises(FileError, match=message):
        read_json(path, expected="notes")
    with pytest.raises(ValueError, match=message):
        read_format(path, "", "notes")


@pytest.mark.parametrize("digests", [[], {}, 1.5, None, {"other": "0" * 64}])
def test_a_manifest_with_other_checksums_than_one_per_tensor_is_refused(digests: object, tmp_path: Path) -> None:
    path = tmp_path / "notes.safetensors"
    write_tensors(path, {"w": torch.ones(3)}, {})
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    metadata = header["__metadata__"]
    metadata["manifest"] = json.dumps({**json.loads(metadata["manifest"]), "digests": digests})
    text = json.dumps({**header, "__metadata__": {**metadata, "sha256": "0" * 64}})
    text = text.replace("0" * 64 + '"}}', hashlib.sha256(text.encode()).hexdigest() + '"}}')
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + content[8 + size :])
    with pytest.raises(FileError, match=r"notes\.safetensors (has checksums of other tensors|does not follow)"):
        read_tensors(path)


@pytest.mark.parametrize("kind", [KeyError, RuntimeError, OSError, ZeroDivisionError])
def test_errors_of_libraries_about_local_files_name_the_file(kind: type[Exception], tmp_path: Path) -> None:
    message = rf"{tmp_path} cannot be read by transformers \(.*odd"
    with pytest.raises(FileError, match=message), library_errors(tmp_path, "transformers"):
        raise kind("odd")
    with pytest.raises(kind, match="odd"), library_errors("some/model", "transformers"):
        raise kind("odd")


def test_a_key_that_comes_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.json").write_text('{"format": "notes", "version": 1, "deep": [{"score": 1, "score": 2}]}')
    with pytest.raises(FileError, match=r"notes\.json is damaged or truncated \(the key 'score' comes twice\)"):
        read_json(tmp_path / "notes.json", expected="notes")


def test_what_has_no_format_has_no_checksum(tmp_path: Path) -> None:
    write_json(tmp_path / "plain.json", {"a": 1})
    assert json.loads((tmp_path / "plain.json").read_text()) == {"a": 1}
