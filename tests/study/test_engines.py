"""Engines refuse wrong input before anything runs; what runs on a node needs no cluster to be tested."""

import re
import socket
import tomllib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import toy

from manifold_cl import RunRecord
from manifold_cl.continual.environment import library_versions
from manifold_cl.study import Event, StudyPlan, make_engine, node, read_plan
from manifold_cl.study.node import Files, Package, run_on_node
from manifold_cl.study.ray_engine import RayEngine

Write = Callable[..., Path]
EXTRAS = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]


class FakeRay:
    """Nodes without a cluster: a task runs when it is asked for its result, on the node of its strategy."""

    def __init__(self, *resources: dict[str, float], versions: Sequence[dict[str, str]] = ()) -> None:
        self.exceptions = SimpleNamespace(RayError=RuntimeError, RayTaskError=OSError)
        self._resources, self._versions = resources, versions or [library_versions()] * len(resources)

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {
                "NodeID": f"{index:056d}", "Alive": True, "Resources": resources,
                "NodeManagerHostname": f"host{index}", "NodeManagerAddress": f"10.0.0.{index}",
            }
            for index, resources in enumerate(self._resources)
        ]  # fmt: skip

    def remote(self, **_: Any) -> Callable[[Any], Any]:
        def options(*, scheduling_strategy: Any) -> Any:
            index = int(scheduling_strategy.node_id)
            return SimpleNamespace(remote=lambda package: index)

        return lambda function: SimpleNamespace(options=options)

    def get(self, index: int) -> dict[str, str]:
        if not self._versions[index]:
            raise RuntimeError("the node is dead")
        return dict(self._versions[index])


def engine_on(*resources: dict[str, float], versions: Sequence[dict[str, str]] = ()) -> RayEngine:
    engine = RayEngine("10.0.0.0:6379")
    engine._ray = FakeRay(*resources, versions=versions)
    return engine


def test_an_unknown_engine_and_an_address_without_ray_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown engine 'rya', did you mean ray\? \(have: local, ray\)"):
        make_engine("rya")
    with pytest.raises(ValueError, match="address=auto is for engine=ray"):
        make_engine("local", address="auto")
    assert make_engine("local").name == "local"
    assert make_engine("ray").name == "ray"


def test_without_ray_the_error_has_the_command_of_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    requirement = EXTRAS["optional-dependencies"]["ray"][0]  # tables have an error of their own
    with pytest.raises(ImportError, match=re.escape(f"pip install '{requirement}'")), make_engine("ray"):
        pass


def test_an_address_that_does_not_answer_is_refused_in_seconds() -> None:
    pytest.importorskip("ray")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
        with (
            pytest.raises(ValueError, match=rf"address={address} does not answer .*ray start --head"),
            RayEngine(address),
        ):
            pass
    for address in ("127.0.0.1", "host:port"):
        with pytest.raises(ValueError, match=rf"address={address} is none: give host:port"), RayEngine(address):
            pass


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("cpus = 64\n", r"cpus=64 and gpus=0, more than any node .*host0 \(10\.0\.0\.0\) 2 and 1; host1 .* 8 and 0"),
        ("threads = 9\n", "cpus=9 and gpus=0, more than any node"),
        ("gpus = 2\n", "cpus=1 and gpus=2, more than any node"),
        ('device = "cuda:1"\n', "device is 'cuda:1', but Ray chooses the GPU"),
        ('device = "cuda"\ngpus = 0\n', "device is 'cuda', but gpus is 0"),
    ],
)
def test_a_cell_that_fits_no_node_is_refused(more: str, message: str, config: Write) -> None:
    plan = read_plan(config(("rank = 4\n", f"rank = 4\n{more}")))
    with pytest.raises(ValueError, match=message):
        engine_on({"CPU": 2, "GPU": 1}, {"CPU": 8}).validate(plan)


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ("cpus = 0", ValueError, "cpus is a number above 0"),
        ("cpus = 1.5", ValueError, r"cpus is a number above 0, a fraction up to 1 or a whole number, got 1\.5"),
        ("gpus = -1", ValueError, "gpus is a number from 0 on, .* got -1"),
        ("gpus = inf", ValueError, "gpus is a number from 0 on, .* got inf"),
        ("gpus = true", TypeError, "gpus is a number, got True"),
        ('gpus = "all"', TypeError, "gpus is a number, got 'all'"),
    ],
)
def test_resources_of_a_cell_are_validated(line: str, error: type[Exception], message: str, config: Write) -> None:
    with pytest.raises(error, match=message):
        read_plan(config(("rank = 4\n", f"rank = 4\n{line}\n")))


def test_resources_are_no_part_of_a_study_s_identity(config: Write, tmp_path: Path) -> None:
    plan = read_plan(config(("rank = 4\n", "rank = 4\ncpus = 2\ngpus = 0.25\n")))
    plan.save(tmp_path)
    loaded = StudyPlan.load(tmp_path)
    assert (loaded.cpus, loaded.gpus) == (2, 0.25)
    assert loaded.changes(read_plan(config())) == []
    assert "cpus" not in read_plan(config()).to_dict()


@pytest.mark.parametrize(
    ("more", "slots"),
    [("", 10), ("cpus = 2\n", 5), ("cpus = 0.5\n", 20), ("threads = 3\n", 2), ('device = "cuda"\n', 1),
     ('device = "cuda"\ngpus = 0.5\n', 2), ('device = "cuda"\ngpus = 0.1\ncpus = 0.1\n', 10)],
)  # fmt: skip
def test_cells_at_a_time_follow_from_the_resources(more: str, slots: int, config: Write) -> None:
    plan = read_plan(config(("rank = 4\n", f"rank = 4\n{more}")))
    assert engine_on({"CPU": 2, "GPU": 1}, {"CPU": 8}).slots(plan) == slots


def test_nodes_of_other_versions_are_named(config: Write, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("ray")
    plan, here = read_plan(config()), library_versions()
    other = {**here, "torch": "1.0"}
    expected = r"the node host1 \(10\.0\.0\.1\) has other versions than host0 .*: torch 1\.0 instead of "
    with pytest.raises(ValueError, match=expected):
        engine_on({"CPU": 2}, {"CPU": 2}, versions=[here, other]).validate(plan)
    engine_on({"CPU": 2}, {"CPU": 2}, versions=[here, here]).validate(plan)
    assert caplog.text == ""
    engine_on({"CPU": 2}, {"CPU": 0}, versions=[here, other]).validate(plan)  # no cell fits on the second node
    assert caplog.text == ""
    engine_on({"CPU": 2}, versions=[other]).validate(plan)
    assert f"torch 1.0 instead of {here['torch']}" in caplog.text
    with pytest.raises(ValueError, match="has other versions than the nodes before: torch"):
        run_on_node(Package.of(plan), plan.cells[0].name, "", "", {}, other, lambda *_: None)


def test_a_node_that_just_died_is_left_out(config: Write, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("ray")
    plan, engine = read_plan(config()), engine_on({"CPU": 2}, {"CPU": 2}, versions=[{}, library_versions()])
    engine.validate(plan)
    assert "the node host0 (10.0.0.0) is left out: the node is dead" in caplog.text
    assert engine.slots(plan) == 2
    with pytest.raises(ValueError, match="more than any node has"):
        engine_on({"CPU": 2}, versions=[{}]).validate(plan)


GONE = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(toy.__file__).parent)!r})
import toy

def build(**options):
    if Path(__file__).with_name("gone").exists():
        raise OSError("the archive is not here")
    return toy.toy_stream(**options)
"""


def test_a_node_without_the_stream_s_data_says_so(tmp_path: Path) -> None:
    (tmp_path / "stream.py").write_text(GONE)
    (tmp_path / "study.toml").write_text('stream = "stream.py:build"\n[methods.zero_shot]\n')
    package = Package.of(read_plan(tmp_path / "study.toml"))
    assert node.verify_node(package) == library_versions()
    (tmp_path / "gone").touch()
    with pytest.raises(ValueError, match=r"'stream\.py:build' cannot be opened there \(the archive is not here\)"):
        node.verify_node(package)
    (tmp_path / "gone").unlink()
    other = Package(package.content, package.code_folder, {"first": "another digest"})
    with pytest.raises(ValueError, match="has other data there for first"):
        node.verify_node(other)


@pytest.mark.slow
def test_a_node_that_does_not_see_the_folder_returns_the_files(config: Write, straight: Path, tmp_path: Path) -> None:
    """It starts from the files that it gets; those after each task suffice to go on elsewhere."""
    plan = read_plan(config())
    cell = plan.cell("ours-seed0")
    sent: list[tuple[list[Event], Files]] = []
    arguments = Package.of(plan), cell.name, str(tmp_path / "nowhere"), ""
    last, files = run_on_node(*arguments, {}, library_versions(), lambda *message: sent.append(message))  # type: ignore[arg-type]
    assert last == Event(cell, "done")
    assert files is not None
    assert not (tmp_path / "nowhere").exists()
    assert {name for name in files if name.startswith("logs/")} == {f"logs/{cell.name}.log"}
    assert not [name for name in files if name.endswith((".lock", ".tmp"))]
    node.write_files(tmp_path / "whole", files)
    assert same_numbers(tmp_path / "whole", straight, cell.name)
    kinds = {event.kind for events, _ in sent for event in events}
    assert kinds == {"started", "progress"}


@pytest.mark.slow
def test_files_of_a_partial_cell_are_those_to_go_on_from(config: Write, straight: Path, tmp_path: Path) -> None:
    plan = read_plan(config())
    cell = plan.cell("ours-seed0")
    copies = node._Copies(straight, cell)
    assert copies.after([Event(cell, "progress", "first", 0, 3, "train", 1, 12)]) == {}
    assert copies.after([Event(cell, "progress", "second", 1, 3, "train", 1, 12)]) == {}  # nothing was written since
    copies._sent = {}
    files = copies.after([Event(cell, "progress", "third", 2, 3, "train", 1, 12)])
    assert f"cells/{cell.name}/record.json" in files
    partial = {path: content for path, content in files.items() if "03-third" not in path}
    arguments = Package.of(plan), cell.name, str(tmp_path / "nowhere"), "token", partial, library_versions()
    last, files = run_on_node(*arguments, lambda *_: None)
    assert (last.kind, files is None) == ("done", False)
    node.write_files(tmp_path / "whole", files or {})
    assert same_numbers(tmp_path / "whole", straight, cell.name)


def same_numbers(left: Path, right: Path, cell: str) -> bool:
    one, two = (RunRecord.load(folder / "cells" / cell) for folder in (left, right))
    return (one.status, one.losses, one.accuracy, one.metrics) == (two.status, two.losses, two.accuracy, two.metrics)


def test_engines_are_contexts() -> None:
    assert all(isinstance(make_engine(name), AbstractContextManager) for name in ("local", "ray"))
