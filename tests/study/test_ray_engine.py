"""A study on a Ray cluster of two nodes in this machine: killed nodes, Ctrl-C, folders that are not shared."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import toy
from filelock import FileLock
from kills import hear_interrupts

from manifold_cl import RunRecord
from manifold_cl.study import Event, Study, ray_engine, read_plan
from manifold_cl.study.ray_engine import RayEngine
from manifold_cl.study.worker import run_cell

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:ResourceWarning", "ignore:.*:DeprecationWarning"),
]

SLOW = f"""
import os, pathlib, sys, time
sys.path.insert(0, {str(Path(toy.__file__).parent)!r})
import toy

CLOSED = pathlib.Path("@")  # while this file exists, each process waits at its first step, and has a file beside it

def build(**options):
    stream = toy.toy_stream(**options)
    for task in stream.tasks:
        task.loss = slowed(task.loss)
    return stream

def slowed(loss):
    def slow(model, batch):
        time.sleep(0.1)
        if CLOSED.exists():
            CLOSED.with_name(str(os.getpid()) + ".waits").touch()
        while CLOSED.exists():
            time.sleep(0.05)
        return loss(model, batch)
    return slow
"""
CONFIG = """
stream = "slow.py:build"
rank = 4
[methods.sequential_merge]
lr = 0.03
[methods.sequential]
lr = 0.003
"""


class Barrier:
    """Where the processes of all cells wait at their first step, until it is opened."""

    def __init__(self, closed: Path) -> None:
        self.closed = closed
        for old in closed.parent.glob("*.waits"):
            old.unlink()
        closed.touch()

    def wait_for(self, processes: int, seconds: float = 600.0) -> None:
        """Until so many wait, on a machine that runs other tests too."""
        deadline = time.monotonic() + seconds
        while len(list(self.closed.parent.glob("*.waits"))) < processes:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def open(self) -> None:
        """Let all go on: one atomic step, so that none waits for ever at half a barrier."""
        self.closed.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study whose cells take two seconds; the folder ``straight`` beside it has the numbers of plain runs."""
    folder: Path = tmp_path_factory.mktemp("ray")
    (folder / "slow.py").write_text(SLOW.replace("@", str(folder / "closed")))
    path = folder / "study.toml"
    path.write_text(CONFIG)
    plan = read_plan(path)
    for cell in plan.cells:
        run_cell(plan, cell, folder / "straight")
    return path


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster whose first node runs no cells; tests add and remove others."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    quick = {"health_check_period_ms": 500, "health_check_failure_threshold": 6}  # dead nodes are known in 3 s, not 15
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": quick}
    )
    try:
        yield cluster
    finally:
        cluster.shutdown()


@pytest.fixture
def nodes(cluster: Any) -> Iterator[list[Any]]:
    """Two nodes with one core each, which end with the test."""
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes(timeout=60)  # also until those of the last test are known to be gone
    try:
        yield nodes
    finally:
        for node in nodes:
            if node in cluster.worker_nodes:
                cluster.remove_node(node, allow_graceful=False)


def numbers(folder: Path) -> dict[str, tuple[object, ...]]:
    records = {path.parent.name: RunRecord.load(path.parent) for path in sorted(folder.glob("cells/*/record.json"))}
    return {name: (r.status, r.losses, r.accuracy, r.zero_shot, r.metrics, r.stored) for name, r in records.items()}


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.glob("cells/**/*") if p.is_file() and p.suffix != ".lock"}


@pytest.mark.parametrize("fetch", [False, True], ids=["shared", "fetched"])
def test_a_study_survives_the_death_of_a_node(
    fetch: bool, config: Path, cluster: Any, nodes: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events: list[Event] = []
    barrier = Barrier(config.with_name("closed"))

    def kill_one(own: str) -> None:
        """When each node runs a cell, kill the one that is not this process's, and let the cells go on."""
        try:
            barrier.wait_for(2)
            cluster.remove_node(next(node for node in nodes if node.node_id != own), allow_graceful=False)
        finally:
            barrier.open()

    study = Study(read_plan(config), tmp_path / "out")
    with RayEngine(cluster.address, fetch=fetch) as engine, ThreadPoolExecutor() as threads:
        import ray

        engine.validate(study.plan)
        assert engine.slots(study.plan) == 2
        killed = threads.submit(kill_one, ray.get_runtime_context().get_node_id())
        assert study.run(engine=engine, on_event=events.append) == []
        killed.result()
    notes = [event.message for event in events if event.kind == "note"]
    assert [note for note in notes if note.endswith("the cell resumes from its last finished task")]
    assert numbers(tmp_path / "out") == numbers(config.parent / "straight")
    assert files(tmp_path / "out") == files(config.parent / "straight")
    assert not (tmp_path / "out" / ".engine-token").exists()
    assert [event.kind for event in events].count("done") == 2
    record = study.records()[study.plan.cells[0]]
    assert record.config["threads"] == record.machine["threads"] == 1
    assert capsys.readouterr().out == ""  # not even Ray's words about the raylets


@pytest.mark.usefixtures("nodes")
def test_messages_that_come_late_are_not_lost(
    config: Path, cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(ray_engine._Mailbox):
        def take(self) -> list[tuple[str, int, Sequence[Event], ray_engine.Files]]:
            items = super().take()
            time.sleep(1.0)  # with the messages in hand
            return items

    monkeypatch.setattr(ray_engine, "_Mailbox", Late)
    monkeypatch.setattr(ray_engine, "MAIL_SECONDS", 0.3)
    events: list[Event] = []
    study = Study(read_plan(config), tmp_path / "out")
    with RayEngine(cluster.address) as engine:
        assert study.run(engine=engine, on_event=events.append) == []
    kinds = {cell: [event.kind for event in events if event.cell == cell] for cell in study.plan.cells}
    assert all(kinds[cell][0] == "started" and kinds[cell][-1] == "done" for cell in study.plan.cells), kinds


@pytest.mark.usefixtures("nodes")
def test_ctrl_c_ends_every_cell_and_the_local_engine_goes_on(config: Path, cluster: Any, tmp_path: Path) -> None:
    out, barrier = tmp_path / "out", Barrier(config.with_name("closed"))
    command = [sys.executable, "-m", "manifold_cl.cli", "study", str(config), "--out", str(out)]
    process = subprocess.Popen(
        [*command, "--engine", "ray", "--address", cluster.address],
        stderr=subprocess.PIPE, text=True, preexec_fn=hear_interrupts,
    )  # fmt: skip
    try:
        barrier.wait_for(2)  # each node trains a cell
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
        barrier.open()
    assert process.returncode == 130, errors
    assert "the same command resumes from there" in errors
    for cell in out.glob("cells/*"):
        if cell.is_dir():
            with FileLock(cell.with_suffix(".lock"), timeout=20):  # its process is gone
                pass
    left = subprocess.run(["pgrep", "-f", f"manifold_cl.study.worker {out}"], capture_output=True, check=False)
    assert left.stdout == b""
    assert Study(read_plan(config), out).pending()
    assert Study(read_plan(config), out).run() == []
    assert numbers(out) == numbers(config.parent / "straight")


@pytest.mark.usefixtures("nodes")
def test_what_the_cluster_cannot_run_is_refused_before_anything_runs(
    config: Path, cluster: Any, tmp_path: Path
) -> None:
    only_here = "if 'RAY_JOB_ID' in os.environ: raise OSError('no archive')"
    gone = SLOW.replace("    stream =", f"    {only_here}\n    stream =")
    (tmp_path / "gone.py").write_text(gone)
    for text, message in (
        (CONFIG.replace("rank", "cpus = 2\nrank"), "a cell needs cpus=2 and gpus=0, more than any node has"),
        (CONFIG.replace("slow.py", "gone.py"), "cannot be opened there (no archive)"),
    ):
        (tmp_path / "study.toml").write_text(text)
        (tmp_path / "slow.py").write_text(config.with_name("slow.py").read_text())
        command = [sys.executable, "-m", "manifold_cl.cli", "study", str(tmp_path / "study.toml")]
        ended = subprocess.run(
            [*command, "--out", str(tmp_path / "out"), "--engine", "ray", "--address", cluster.address],
            capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "500"},
        )  # fmt: skip
        assert ended.returncode == 2, ended.stderr
        assert message in ended.stderr
        assert not (tmp_path / "out").exists()
