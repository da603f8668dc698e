"""A memory on disk: whole at every moment, read layer by layer, refused when it was touched."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import killed_at

import manifold_cl
from manifold_cl import SubspaceMemory
from manifold_cl.continual.subspaces import memory_files
from manifold_cl.files import FileError, write_json, write_tensors

ROOT = Path(manifold_cl.__file__).parents[1]


def memory_of(*tasks: str, seed: int = 0, n: int = 12) -> SubspaceMemory:
    draw = torch.Generator().manual_seed(seed)
    memory = SubspaceMemory.empty({"a.q": n, "b.q": n + 1})
    for task in tasks:
        moments = {}
        for name, subspace in memory.items():
            a = torch.randn(subspace.n, 3, generator=draw)
            moments[name] = a @ a.T
        memory = memory.extended(moments, energy=0.95, rank=2, task=task)
    return memory


def same(a: SubspaceMemory, b: SubspaceMemory) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name].basis, b[name].basis) for name in a)


def test_everything_comes_back(tmp_path: Path) -> None:
    memory = memory_of("nouns", "verbs")
    memory.save(tmp_path, energy=0.95, source="activation")
    loaded = SubspaceMemory.load(tmp_path)
    assert same(loaded, memory)
    assert loaded.tasks == ("nouns", "verbs")
    assert loaded.growth == memory.growth
    for name, columns in memory.columns.items():
        assert torch.equal(loaded.columns[name].energies, columns.energies)  # JSON keeps float64 exactly
        assert torch.equal(loaded.columns[name].origins, columns.origins)
    manifest = json.loads((tmp_path / "memory.json").read_text())
    assert (manifest["tasks"], manifest["dtype"], manifest["model"]) == (["nouns", "verbs"], ["float32"], None)
    assert manifest["columns"]["a.q"]["tasks"] == memory.columns["a.q"].origins.tolist()
    assert manifest["growth"]["a.q"]["threshold"] == 0.95
    assert set(manifest["digests"]) == {"a.q", "b.q"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["memory.json", "memory.safetensors"]
    grown = loaded.extended({"a.q": torch.eye(12)}, energy=0.9, rank=2, task="third")
    assert grown.tasks == ("nouns", "verbs", "third")


@pytest.mark.parametrize("lazy", [False, True])
def test_a_basis_lies_where_a_fresh_one_does(lazy: bool, tmp_path: Path) -> None:
    memory_of("nouns", "verbs").save(tmp_path, energy=0.95, source="activation")
    loaded = SubspaceMemory.load(tmp_path, lazy=lazy)
    # 64 bytes are what torch aligns its memory to; products of other memory round differently, and a resumed run parts.
    assert [subspace.basis.data_ptr() % 64 for subspace in loaded.values()] == [0, 0]


def test_a_lazy_memory_reads_what_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = memory_of("nouns")
    memory.save(tmp_path)
    opened: list[str] = []
    original = Path.open

    def counting(path: Path, *arguments: Any, **options: Any) -> Any:
        opened.append(path.name)
        return original(path, *arguments, **options)

    loaded = SubspaceMemory.load(tmp_path, lazy=True)
    monkeypatch.setattr(Path, "open", counting)
    assert (list(loaded), len(loaded), loaded.tasks) == (["a.q", "b.q"], 2, ("nouns",))
    assert loaded.differences(torch.nn.Sequential())  # widths come from the manifest
    assert opened == []
    assert torch.equal(loaded["a.q"].basis, memory["a.q"].basis)
    assert opened == ["memory.safetensors"] * 2  # the header, once for all layers, and the layer
    assert torch.equal(loaded["b.q"].basis, memory["b.q"].basis)
    assert len(opened) == 3
    assert loaded["a.q"].basis.data_ptr() % 64 == 0  # a copy, where torch puts fresh tensors


def test_the_header_of_a_lazy_memory_is_read_once_however_many_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SubspaceMemory.empty({f"layer.{i}": 4 for i in range(50)}).save(tmp_path)
    headers: list[Path] = []
    original = memory_files._places
    monkeypatch.setattr(memory_files, "_places", lambda path: headers.append(path) or original(path))
    loaded = SubspaceMemory.load(tmp_path, lazy=True)
    assert [subspace.k for subspace in loaded.values()] == [0] * 50
    assert len(headers) == 1


def test_a_subspace_of_several_layers_is_saved_for_each(tmp_path: Path) -> None:
    shared = memory_of("nouns")["a.q"]
    SubspaceMemory({"q": shared, "k": shared, "v": shared}).save(tmp_path)
    for lazy in (False, True):
        loaded = SubspaceMemory.load(tmp_path, lazy=lazy)
        assert [torch.equal(subspace.basis, shared.basis) for subspace in loaded.values()] == [True] * 3


def test_a_lazy_memory_notices_a_touched_layer_and_still_reads_the_others(tmp_path: Path) -> None:
    memory = memory_of("nouns")
    memory.save(tmp_path)
    path = tmp_path / "memory.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # in the last layer
    path.write_bytes(bytes(content))
    with pytest.raises(FileError, match=r"memory\.safetensors does not match its manifest \(sha256"):
        SubspaceMemory.load(tmp_path)
    loaded = SubspaceMemory.load(tmp_path, lazy=True)
    broken = "b.q" if torch.equal(loaded["a.q"].basis, memory["a.q"].basis) else "a.q"
    with pytest.raises(FileError, match=rf"{broken}\.basis is not what its manifest promises: the file was changed"):
        loaded[broken]
    path.write_bytes(content[:40])
    with pytest.raises(FileError, match=r"has no a\.q\.basis of 12 by 3 or is truncated"):
        loaded["a.q"]
    path.unlink()
    with pytest.raises(FileError, match=r"memory\.safetensors does not exist, though its manifest does"):
        loaded["a.q"]
    with pytest.raises(FileError, match=r"memory\.safetensors does not exist, though its manifest does"):
        SubspaceMemory.load(tmp_path)


def test_files_of_older_versions_are_still_read(tmp_path: Path) -> None:
    memory = memory_of("nouns")
    manifest = {
        "format": "manifold_cl.memory",
        "version": 1,
        "task": "nouns",
        "energy": 0.95,
        "source": "sensitivity",
        "full": ["a.q"],
        "layers": {name: {"basis": list(s.basis.shape)} for name, s in memory.items()},
    }
    write_tensors(tmp_path / "memory", {f"{name}.basis": s.basis for name, s in memory.items()}, manifest)
    for lazy in (False, True):
        loaded = SubspaceMemory.load(tmp_path, lazy=lazy)
        assert same(loaded, memory)
        assert (loaded.full, loaded.tasks, loaded.columns, loaded.growth) == (("a.q",), (), {}, {})
        assert loaded.signature is None
    (tmp_path / "memory.safetensors").write_bytes(b"x")
    with pytest.raises(FileError, match="does not match its manifest"):
        SubspaceMemory.load(tmp_path, lazy=True)  # such a file vouches for itself as a whole only


def test_a_file_of_another_kind_or_a_later_version_is_refused(tmp_path: Path) -> None:
    memory_of("nouns").save(tmp_path)
    manifest = json.loads((tmp_path / "memory.json").read_text())
    write_json(tmp_path / "memory.json", {**manifest, "version": 99})
    with pytest.raises(FileError, match=r"memory\.json has version 99, this library reads up to 1: update it"):
        SubspaceMemory.load(tmp_path)
    (tmp_path / "memory.json").write_text("{")
    with pytest.raises(FileError, match=r"memory\.json is damaged or truncated"):
        SubspaceMemory.load(tmp_path)


@pytest.mark.parametrize("number", range(1, 7))
def test_a_write_that_is_killed_at_any_rename_leaves_a_whole_memory(number: int, tmp_path: Path) -> None:
    old, new = memory_of("nouns"), memory_of("nouns", "verbs", seed=1)
    old.save(tmp_path)
    killed_at(number, lambda: new.save(tmp_path))
    for lazy in (False, True):
        assert same(SubspaceMemory.load(tmp_path, lazy=lazy), old if number < 3 else new)
    third = memory_of("other", seed=2)
    third.save(tmp_path)
    assert same(SubspaceMemory.load(tmp_path), third)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["memory.json", "memory.safetensors"]


def test_a_write_that_an_older_version_left_half_done_is_read_and_replaced(tmp_path: Path) -> None:
    """It renamed the tensors first; ``memory.next.json`` is then their manifest."""
    old, new, third = memory_of("nouns"), memory_of("verbs", seed=1), memory_of("other", seed=2)
    new.save(tmp_path)
    (tmp_path / "memory.json").rename(tmp_path / "memory.next.json")
    old.save(tmp_path / "old")
    (tmp_path / "old" / "memory.json").rename(tmp_path / "memory.json")
    for lazy in (False, True):
        assert same(SubspaceMemory.load(tmp_path, lazy=lazy), new)
    killed_at(3, lambda: third.save(tmp_path))
    assert SubspaceMemory.load(tmp_path).tasks in (("verbs",), ("other",))
    third.save(tmp_path)
    assert same(SubspaceMemory.load(tmp_path), third)
    assert not (tmp_path / "memory.next.json").exists()


def put(*keys: str, value: object) -> Callable[[dict[str, Any]], None]:
    """Changes one entry of a manifest."""

    def change(manifest: dict[str, Any]) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("layers", value=["a.q", "b.q"]), "does not follow its format"),
        (put("layers", "a.q", value={}), "lacks the key 'basis'"),
        (put("layers", "a.q", "basis", value=["12", 3]), r"a\.q has a basis of '12' by 3, whole numbers"),
        (put("layers", "a.q", "basis", value=[3, 12]), r"a\.q has a basis of 3 by 12"),
        (put("layers", "a.q", "basis", value=[18, 2]), r"a\.q\.basis is not what its manifest promises|described"),
        (put("digests", value={}), "layers and digests are of different layers"),
        (put("tasks", value="nouns"), "tasks is a list of words, got 'nouns'"),
        (put("full", value=[1]), r"full is a list of words, got \[1\]"),
        (put("columns", "a.q", "tasks", value=[0, 0, 5]), r"columns of a\.q come from tasks that are not among the 1"),
        (put("columns", "a.q", "energies", value=["1", "2", "3"]), r"the columns of a\.q"),
        (put("columns", "a.q", value={"tasks": [0], "energies": [1.0]}), r"a\.q protects 3 columns, 1 are described"),
        (put("growth", "a.q", "threshold", value="high"), "threshold is 'high', a number is needed"),
        (put("growth", "a.q", value={}), "lacks the key"),
        (put("model", value=[1]), "does not follow its format"),
    ],
)
@pytest.mark.parametrize("lazy", [False, True])
def test_a_manifest_of_other_kinds_is_refused_by_name(
    change: Callable[[dict[str, Any]], None], message: str, lazy: bool, tmp_path: Path
) -> None:
    memory_of("nouns").save(tmp_path)
    manifest = json.loads((tmp_path / "memory.json").read_text())
    change(manifest)
    write_json(tmp_path / "memory.json", manifest)
    with pytest.raises(FileError, match=message):
        SubspaceMemory.load(tmp_path, lazy=lazy)["a.q"]


@pytest.mark.parametrize(
    ("basis", "message"),
    [
        (torch.full((12, 3), torch.nan), r"a\.q\.basis has NaN"),
        (torch.ones(12, 3), "not orthonormal"),
        (torch.eye(12)[:, :3].half(), r"a\.q\.basis is"),
        (torch.eye(12)[:, :3].int(), r"a\.q\.basis is"),
    ],
)
@pytest.mark.parametrize("lazy", [False, True])
def test_bases_that_are_none_are_refused_though_their_checksum_fits(
    basis: torch.Tensor, message: str, lazy: bool, tmp_path: Path
) -> None:
    memory_files.write(tmp_path, {"a.q": basis}, {})
    with pytest.raises(FileError, match=message):
        SubspaceMemory.load(tmp_path, lazy=lazy)["a.q"]


WRITER = """
import sys, torch
from manifold_cl import SubspaceMemory
memories = [SubspaceMemory.load(folder) for folder in sys.argv[2:4]]  # read: other processes round differently
print("ready", flush=True)
while True:
    for memory in memories:
        memory.save(sys.argv[1])
"""


def test_killing_the_writer_again_and_again_loses_nothing(tmp_path: Path) -> None:
    even, odd = memory_of("even", n=400), memory_of("odd", seed=1, n=400)
    sources = [tmp_path / "even", tmp_path / "odd"]
    even.save(sources[0])
    odd.save(sources[1])
    folder = tmp_path / "written"
    even.save(folder)
    command = [sys.executable, "-c", WRITER, *map(str, [folder, *sources])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for moment in (0.05, 0.013, 0.031, 0.007, 0.023):  # stopped in the midst of writes, as a kill finds them
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(moment)
        os.kill(process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        loaded = SubspaceMemory.load(folder)
        assert same(loaded, even) or same(loaded, odd)
    process.kill()
    process.wait()
    process.stdout.close()
    loaded = SubspaceMemory.load(folder)
    assert same(loaded, even if loaded.tasks == ("even",) else odd)
    third = memory_of("third", seed=3)
    third.save(folder)
    assert same(SubspaceMemory.load(folder), third)


LIMITED = """
import resource, signal, sys
sys.path[:0] = sys.argv[2:]
from test_memory_files import memory_of
memory = memory_of("odd", seed=1, n=400)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    memory.save(sys.argv[1])
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs a limit on file sizes")
def test_a_disk_without_room_is_an_error_that_leaves_the_old_memory(tmp_path: Path) -> None:
    old = memory_of("even", n=400)
    old.save(tmp_path)
    paths = [str(Path(__file__).parent), str(ROOT / "tests"), str(ROOT)]
    ended = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path), *paths], capture_output=True, text=True, check=True
    )
    assert "memory.safetensors could not be written" in ended.stdout
    assert "what was there before is untouched" in ended.stdout
    assert same(SubspaceMemory.load(tmp_path), old)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["memory.json", "memory.safetensors"]


@pytest.mark.parametrize("content", [b"half", b"", b"{}", b"[]", b"\xff"])
def test_a_waiting_manifest_that_was_written_halfway_is_left_aside(content: bytes, tmp_path: Path) -> None:
    memory = memory_of("nouns")
    memory.save(tmp_path)
    (tmp_path / "memory.next.json").write_bytes(content)
    for lazy in (False, True):
        assert same(SubspaceMemory.load(tmp_path, lazy=lazy), memory)
    memory.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["memory.json", "memory.safetensors"]


def test_a_memory_that_does_not_fit_names_its_file(tmp_path: Path) -> None:
    memory_of("nouns").save(tmp_path)
    with pytest.raises(FileError, match=rf"{tmp_path}/memory\.json: the memory does not fit the model"):
        SubspaceMemory.load(tmp_path, model=torch.nn.Linear(2, 2))
