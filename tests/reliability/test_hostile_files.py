"""Files made to do harm: pickles that run code, paths that leave their folder, archives that unpack without end."""

import io
import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from file_kinds import FILE_KINDS, lora_folder, several_tasks, study_folder, toy_run
from killed_jobs import adapted_model
from mutations import outcome
from toy import toy_stream

import analysis
from manifold_cl import ContinualRunner, export_lora, save_adapters
from manifold_cl.continual import make_method
from manifold_cl.files import CHECKSUM
from manifold_cl.streams import read_layout
from manifold_cl.streams.archives import Archive, FetchError, fetch
from manifold_cl.streams.layout import published_text

Tally = Callable[..., None]
OUTSIDE = ("../outside", "/etc", "a/../../outside", "..", "a\0b")
"""Paths that lead out of a folder, or cannot be in one."""
ODD = ("..\\outside", "C:\\outside", "\n", ".", "")
"""Names that no folder of a task can have; as paths they lead nowhere else on this system."""


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def pickles(mark: Path) -> dict[str, bytes]:
    """The same bomb in every form in which torch and pickle read one."""
    forms = {f"pickle {protocol}": pickle.dumps(Bomb(mark), protocol) for protocol in (0, 2, 4)}
    for name, options in (("zip", {}), ("legacy", {"_use_new_zipfile_serialization": False})):
        buffer = io.BytesIO()
        torch.save({"q.weight": torch.ones(2), "bomb": Bomb(mark)}, buffer, **options)
        forms[f"torch {name}"] = buffer.getvalue()
    return forms


@pytest.mark.reliability
@pytest.mark.parametrize("name", FILE_KINDS)
def test_no_reader_unpickles(name: str, tmp_path: Path, tally: Tally) -> None:
    kind = FILE_KINDS[name]
    folder, mark = tmp_path / "folder", tmp_path / "mark"
    folder.mkdir()
    kind.write(folder)
    path = folder / kind.file
    value = outcome(lambda: kind.read(folder), path)
    for content in pickles(mark).values():
        new = path.with_name("replacement")
        new.write_bytes(content)
        os.replace(new, path)
        found = outcome(lambda: kind.read(folder), path)
        allowed = found in ("refused", value) or (kind.subset and found == "{}")
        assert allowed
        assert not mark.exists()
        tally("hostile files", "pickles")
    pickle.loads(next(iter(pickles(mark).values())))
    assert mark.exists()  # the bomb works


@pytest.mark.reliability
@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
def test_torch_files_are_never_unpickled(suffix: str, tmp_path: Path, tally: Tally) -> None:
    for name, content in pickles(tmp_path / "mark").items():
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(content)
        for load in (analysis.Checkpoint.load, analysis.AdapterSet.load):
            assert outcome(lambda load=load, path=path: load(path), path) == "refused"
        assert not (tmp_path / "mark").exists()
        tally("hostile files", "pickles")


def rewrite(path: Path, change: Callable[[Any], None]) -> None:
    """Change a JSON file by hand: without its checksum."""
    content = json.loads(path.read_text())
    content.pop(CHECKSUM, None)
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.reliability
@pytest.mark.parametrize("name", OUTSIDE)
def test_names_and_paths_do_not_lead_out_of_their_folder(name: str, tmp_path: Path, tally: Tally) -> None:
    """An adapter waits wherever the path leads, so that following it would succeed."""
    inside = tmp_path / "inside"
    inside.mkdir()
    save_adapters(adapted_model(0), tmp_path / "outside", task="x")
    for waiting in (tmp_path, inside):
        save_adapters(adapted_model(0), waiting, task="x")
    several_tasks(inside / "several")
    rewrite(inside / "several" / "tasks.json", lambda c: c["tasks"][0].update(path=name))
    toy_run(inside / "run")
    rewrite(inside / "run" / "record.json", lambda c: c["tasks"].__setitem__(0, name))
    (inside / "study").mkdir()
    study_folder(inside / "study")
    rewrite(inside / "study" / "study.json", lambda c: c["cells"][0].update(folder=name))
    for path, read in (
        (inside / "several" / "tasks.json", lambda: analysis.AdapterSet.load(inside / "several")),
        (inside / "run" / "record.json", lambda: analysis.AdapterSet.load(inside / "run")),
        (inside / "run" / "record.json", lambda: export_lora(inside / "run", tmp_path / "exported")),
        (inside / "study" / "study.json", lambda: analysis.StudyResults.load(inside / "study")),
    ):
        assert outcome(read, path) == "refused", path
        tally("hostile files", "paths")


@pytest.mark.reliability
@pytest.mark.parametrize("name", [*OUTSIDE, *ODD])
def test_tasks_of_streams_do_not_lead_out_of_the_folder(name: str, tmp_path: Path, tally: Tally) -> None:
    stream = toy_stream()
    stream.tasks[0].name = name  # type: ignore[misc]
    before = sorted(tmp_path.parent.iterdir())
    with pytest.raises(ValueError, match="name of a task"):
        ContinualRunner(stream, make_method("sequential_merge"), tmp_path / "run").run()
    text, count = re.subn(
        r"(?m)^train = .*$", lambda _: f"train = [{json.dumps(name)}]", published_text("ucit"), count=1
    )
    assert count == 1
    (tmp_path / "layout.toml").write_text(text)
    if name in OUTSIDE:
        with pytest.raises(ValueError, match=r"layout\.toml: .*leaves the folder"):
            read_layout(tmp_path / "layout.toml")
    assert sorted(tmp_path.parent.iterdir()) == before
    tally("hostile files", "paths", 2)


@pytest.mark.reliability
def test_an_archive_that_unpacks_without_end_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    """Archives are pinned by their digests, which are verified before a byte is unpacked."""
    monkeypatch.setenv("MANIFOLD_CL_CACHE", str(tmp_path))
    monkeypatch.setattr(zipfile.ZipFile, "__init__", lambda *_: pytest.fail("the archive was opened"))
    path = tmp_path / "tiny-1.0-py3-none-any.whl"
    with open(path, "wb") as file, open(os.devnull, "rb"):
        file.truncate(1 << 20)
    with pytest.raises(FetchError, match=r"tiny-1\.0.*expected 0{64}"):
        fetch(Archive("tiny", "1.0", path.name, "0" * 64, source=False))
    tally("hostile files", "archives")


@pytest.mark.reliability
@pytest.mark.parametrize("size", [0, 2, 100, 1 << 31, (1 << 63) - 1, (1 << 64) - 1])
def test_a_header_that_announces_too_much_is_refused_at_once(size: int, tmp_path: Path, tally: Tally) -> None:
    lora_folder(tmp_path / "lora")
    names = ("adapter.safetensors", "memory.safetensors", "model.safetensors")
    for name in names:
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_bytes(size.to_bytes(8, "little") + b'{"a": {"dtype": "F32", "shape": [1], ')
    shutil.copy(tmp_path / "adapter" / names[0], tmp_path / "lora" / "adapter_model.safetensors")
    for folder, load in (
        ("adapter", analysis.AdapterSet.load),
        ("lora", analysis.AdapterSet.load),
        ("memory", analysis.read_protected),
        ("model", analysis.Checkpoint.load),
    ):
        path = next((tmp_path / folder).glob("*.safetensors"))
        assert outcome(lambda load=load, path=path: load(path.parent), path) == "refused"
        tally("hostile files", "headers")
