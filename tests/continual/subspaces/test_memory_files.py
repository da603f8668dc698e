"""A memory on disk: whole at every moment, read layer by layer, refused when it was touched."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import manifold_cl
from manifold_cl import SubspaceMemory
from manifold_cl.adapters.files import FileError, write_json, write_tensors
from manifold_cl.continual.subspaces import memory_files

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
    read: list[str] = []
    original = memory_files.safe_open

    def counting(*arguments: Any, **options: Any) -> Any:
        read.append(str(arguments[0]))
        return original(*arguments, **options)

    monkeypatch.setattr(memory_files, "safe_open", counting)
    loaded = SubspaceMemory.load(tmp_path, lazy=True)
    assert (list(loaded), len(loaded), loaded.tasks) == (["a.q", "b.q"], 2, ("nouns",))
    assert loaded.differences(torch.nn.Sequential())  # widths come from the manifest
    assert read == []
    assert torch.equal(loaded["a.q"].basis, memory["a.q"].basis)
    assert len(read) == 1
    assert loaded["a.q"].basis.data_ptr() % 64 == 0  # a copy, where torch puts fresh tensors


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
    with pytest.raises(FileError, match=r"has no a\.q\.basis or is truncated"):
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


@pytest.mark.parametrize("call", ["save_file", "write_json", "between", "_sync_folder"])
def test_a_write_that_is_cut_at_any_stage_leaves_a_whole_memory(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = memory_of("nouns"), memory_of("nouns", "verbs", seed=1)
    old.save(tmp_path)

    class Killed(BaseException):
        pass

    with monkeypatch.context() as patch:
        if call == "between":  # after the tensors were renamed, before the manifest
            original = Path.replace

            def replace(path: Path, target: Path) -> Path:
                if path.name == memory_files.WAITING:
                    raise Killed
                return original(path, target)

            patch.setattr(Path, "replace", replace)
        else:

            def killed(*_: Any) -> None:
                raise Killed

            patch.setattr(memory_files, call, killed)
        with pytest.raises(Killed):
            new.save(tmp_path)
    expected = old if call in ("save_file", "write_json") else new
    for lazy in (False, True):
        assert same(SubspaceMemory.load(tmp_path, lazy=lazy), expected)
    third = memory_of("other", seed=2)
    with monkeypatch.context() as patch:  # the next write is cut as well, at its first stage
        patch.setattr(memory_files, "save_file", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            third.save(tmp_path)
    assert same(SubspaceMemory.load(tmp_path), expected)
    third.save(tmp_path)
    assert same(SubspaceMemory.load(tmp_path), third)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["memory.json", "memory.safetensors"]


WRITER = """
import sys, torch
sys.path[:0] = sys.argv[2:]
from test_memory_files import memory_of
torch.set_num_threads(1)
memories = [memory_of("even", n=400), memory_of("odd", seed=1, n=400)]
print("ready", flush=True)
while True:
    for memory in memories:
        memory.save(sys.argv[1])
"""


def test_killing_the_writer_again_and_again_loses_nothing(tmp_path: Path) -> None:
    even, odd = memory_of("even", n=400), memory_of("odd", seed=1, n=400)
    even.save(tmp_path)
    paths = [str(Path(__file__).parent), str(ROOT)]
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), *paths], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for moment in (0.05, 0.013, 0.031, 0.007, 0.023):  # stopped in the midst of writes, as a kill finds them
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(moment)
        os.kill(process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        loaded = SubspaceMemory.load(tmp_path)
        assert same(loaded, even) or same(loaded, odd)
    process.kill()
    process.wait()
    process.stdout.close()
    loaded = SubspaceMemory.load(tmp_path)
    assert same(loaded, even if loaded.tasks == ("even",) else odd)
    third = memory_of("third", seed=3)
    third.save(tmp_path)
    assert same(SubspaceMemory.load(tmp_path), third)


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
    paths = [str(Path(__file__).parent), str(ROOT)]
    ended = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path), *paths], capture_output=True, text=True, check=True
    )
    assert "memory.safetensors could not be written" in ended.stdout
    assert "the old memory is untouched" in ended.stdout
    assert same(SubspaceMemory.load(tmp_path), old)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["memory.json", "memory.safetensors"]
