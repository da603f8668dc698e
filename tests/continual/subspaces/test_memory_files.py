"""A memory on disk: intact at every moment, read layer by layer, refused when it was changed."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import manifold_cl
from manifold_cl import SubspaceMemory
from manifold_cl.files import FileError
from manifold_cl.tensor_files import read_tensors, write_tensors

ROOT = Path(manifold_cl.__file__).parents[1]
VERSION_1 = ROOT / "tests" / "version_1"


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
    _, manifest = read_tensors(tmp_path / "memory.safetensors")
    assert (manifest["tasks"], manifest["model"]) == (["nouns", "verbs"], None)
    assert manifest["columns"]["a.q"]["tasks"] == memory.columns["a.q"].origins.tolist()
    assert manifest["growth"]["a.q"]["threshold"] == 0.95
    assert set(manifest["digests"]) == {"a.q.basis", "b.q.basis"}
    assert [p.name for p in tmp_path.iterdir()] == ["memory.safetensors"]
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

    monkeypatch.setattr(Path, "open", counting)
    loaded = SubspaceMemory.load(tmp_path, lazy=True)
    assert (list(loaded), len(loaded), loaded.tasks) == (["a.q", "b.q"], 2, ("nouns",))
    assert loaded.differences(torch.nn.Sequential())  # widths come from the header
    assert len(opened) == 1  # the header, once for all layers
    assert torch.equal(loaded["a.q"].basis, memory["a.q"].basis)
    assert torch.equal(loaded["b.q"].basis, memory["b.q"].basis)
    assert opened == ["memory.safetensors"] * 3
    assert loaded["a.q"].basis.data_ptr() % 64 == 0  # as fresh tensors lie


def test_a_subspace_of_several_layers_is_saved_for_each(tmp_path: Path) -> None:
    shared = memory_of("nouns")["a.q"]
    SubspaceMemory({"q": shared, "k": shared, "v": shared}).save(tmp_path)
    for lazy in (False, True):
        loaded = SubspaceMemory.load(tmp_path, lazy=lazy)
        assert [torch.equal(subspace.basis, shared.basis) for subspace in loaded.values()] == [True] * 3


def test_a_lazy_memory_notices_a_changed_layer_and_still_reads_the_others(tmp_path: Path) -> None:
    memory = memory_of("nouns")
    memory.save(tmp_path)
    path = tmp_path / "memory.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # in the last layer
    path.write_bytes(bytes(content))
    message = r"memory\.safetensors was changed or damaged, b\.q\.basis does not match its checksum"
    with pytest.raises(FileError, match=message):
        SubspaceMemory.load(tmp_path)
    loaded = SubspaceMemory.load(tmp_path, lazy=True)
    assert torch.equal(loaded["a.q"].basis, memory["a.q"].basis)
    with pytest.raises(FileError, match=message):
        loaded["b.q"]
    path.unlink()
    with pytest.raises(FileError, match=r"memory\.safetensors cannot be read"):
        loaded["a.q"]


@pytest.mark.parametrize("lazy", [False, True])
def test_memories_of_version_1_are_read(lazy: bool, tmp_path: Path) -> None:
    folder = VERSION_1 / "eblora" / "tasks" / "02-second"
    loaded = SubspaceMemory.load(folder, lazy=lazy)
    assert {name: subspace.k for name, subspace in loaded.items()} == {"inner": 10, "outer": 9}
    assert loaded.tasks == ("first", "second")
    assert loaded.growth["inner"].task == "second"
    assert loaded.columns["inner"].origins.tolist() == [0] * 5 + [1] * 5
    assert loaded.model is not None
    assert (loaded.model.name, loaded.model.weights) == ("ToyModel", {})
    loaded.save(tmp_path)
    assert same(SubspaceMemory.load(tmp_path), loaded)


def test_memories_of_the_first_version_1_have_bases_alone(tmp_path: Path) -> None:
    shutil.copytree(VERSION_1 / "eblora" / "tasks" / "01-first", tmp_path / "task")
    path = tmp_path / "task" / "memory.json"
    manifest = json.loads(path.read_text())
    later = {"tasks", "columns", "growth", "model", "dtype", "digests"}
    path.write_text(json.dumps({key: manifest[key] for key in manifest.keys() - later}))
    loaded = SubspaceMemory.load(tmp_path / "task")
    assert (list(loaded), loaded.tasks, loaded.columns, loaded.growth) == (["inner", "outer"], (), {}, {})
    assert loaded.model is None


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
        (put("tasks", value="nouns"), "tasks is a list of words, got 'nouns'"),
        (put("full", value=[1]), r"full is a list of words, got \[1\]"),
        (put("columns", "a.q", "tasks", value=[0, 0, 5]), "not among the 1 of the memory"),
        (put("columns", "a.q", "energies", value=["1", "2", "3"]), "3 tasks and 3 energies"),
        (put("columns", "a.q", value={"tasks": [0], "energies": [1.0]}), "describe 3 columns"),
        (put("columns", "z", value={"tasks": [0], "energies": [1.0]}), "lacks the key 'z'"),
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
    tensors, manifest = read_tensors(tmp_path / "memory.safetensors")
    change(manifest)
    write_tensors(tmp_path / "memory.safetensors", tensors, manifest)
    with pytest.raises(FileError, match=rf"memory\.safetensors.*{message}"):
        SubspaceMemory.load(tmp_path, lazy=lazy)


@pytest.mark.parametrize(
    ("basis", "message"),
    [
        (torch.full((12, 3), torch.nan), r"a\.q\.basis has NaN"),
        (torch.ones(12, 3), "not orthonormal"),
        (torch.eye(12)[:, :3].half(), r"a\.q\.basis is"),
        (torch.ones(3, 12), r"a\.q\.basis has shape \(3, 12\)"),
        (torch.ones(12), r"a\.q\.basis has shape \(12,\)"),
    ],
)
@pytest.mark.parametrize("lazy", [False, True])
def test_bases_that_are_none_are_refused_though_their_checksums_fit(
    basis: torch.Tensor, message: str, lazy: bool, tmp_path: Path
) -> None:
    write_tensors(tmp_path / "memory.safetensors", {"a.q.basis": basis}, {})
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


@pytest.mark.slow
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
    assert "memory.safetensors" in ended.stdout
    assert same(SubspaceMemory.load(tmp_path), old)
    assert [p.name for p in tmp_path.iterdir()] == ["memory.safetensors"]


def test_a_memory_that_does_not_fit_names_its_file(tmp_path: Path) -> None:
    memory_of("nouns").save(tmp_path)
    with pytest.raises(FileError, match=rf"{tmp_path}/memory\.safetensors: the memory does not fit the model"):
        SubspaceMemory.load(tmp_path, model=torch.nn.Linear(2, 2))
