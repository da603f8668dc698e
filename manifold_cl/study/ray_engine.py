"""The engine of several machines: cells as tasks of Ray, the only file that imports it."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO, cast

from manifold_cl.continual.environment import library_versions
from manifold_cl.study.estimate import Costs
from manifold_cl.study.events import Event
from manifold_cl.study.node import (
    Files,
    Package,
    measure_node,
    read_files,
    run_on_node,
    shared_token,
    verify_node,
    version_differences,
    write_files,
)
from manifold_cl.study.plan import Cell, StudyPlan

ATTEMPTS = 4
"""Starts of a cell whose node or process dies."""
FATES = {
    "NodeDiedError": "{host} died or was disconnected",
    "WorkerCrashedError": "the process on {host} was killed",
    "OutOfMemoryError": "{host} ran out of memory",
}
"""Names of Ray's errors → what happened to a cell."""
PORT_SECONDS, ANSWER_SECONDS = 5.0, 30.0
"""Patience with an address: until something accepts a connection, and until Ray answers there."""
STOP_SECONDS = 5.0
"""Time for cancelled cells to remove their temporary folders."""
PERIOD, MAIL_SECONDS = 0.5, 5.0
"""Seconds between two collections of the cells' messages, and the longest wait for one."""

logger = logging.getLogger("manifold_cl")


class RayEngine:
    """Runs cells as tasks of a Ray cluster, as many at a time as its cores and GPUs allow.

    A cell takes `StudyPlan.cpus` and `StudyPlan.gpus`. If its node or process dies, it starts again on another node,
    from its last finished task.

    Args:
        address: ``host:port`` or ``auto`` on a node of the cluster, ``ray://host:port`` from elsewhere. By default the
            variable ``RAY_ADDRESS``, and without it a Ray of this machine alone, which ends with the context.
        fetch: whether nodes return results even if they see the study's folder.

    Raises:
        ImportError: when the context begins, without Ray.
        ValueError: when it begins, if nothing answers at the address.
    """

    name = "ray"

    def __init__(self, address: str | None = None, *, fetch: bool = False) -> None:
        self.address = address or os.environ.get("RAY_ADDRESS") or "local"
        self._fetch = fetch
        self._validated: StudyPlan | None = None
        self._versions: Mapping[str, str] = {}
        self._connected = False
        self._gone: set[str] = set()

    def __enter__(self) -> RayEngine:
        try:
            import ray
        except ImportError as error:
            raise ImportError("engine=ray needs Ray: pip install 'ray>=2.40'") from error
        self._ray = ray
        if not ray.is_initialized():
            _require_answer(self.address)
            options: dict[str, Any] = {"include_dashboard": False} if self.address == "local" else {}
            try:
                ray.init(self.address, log_to_driver=False, logging_level=logging.ERROR, **options)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise ValueError(f"address={self.address}: {_last_line(error)}") from None
            self._connected = True
        sys.stdout = cast(TextIO, _WithoutRay(sys.stdout))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        stdout = cast(object, sys.stdout)
        if isinstance(stdout, _WithoutRay):
            stdout.mute = True
        if self._connected:
            self._connected = False
            self._ray.shutdown()  # prints the rest of its messages
        if isinstance(stdout, _WithoutRay):
            sys.stdout = stdout.inner

    def validate(self, plan: StudyPlan) -> None:
        """Raise ValueError for cells that fit no node, nodes without the stream, and nodes of differing versions."""
        if self._validated is plan:
            return
        _validate_device(plan)
        nodes = self._able(plan)
        run = self._ray.remote(num_cpus=0, max_retries=0, max_calls=1)(verify_node)
        package = Package.of(plan)
        answers = [run.options(scheduling_strategy=self._on(node, soft=False)).remote(package) for node in nodes]
        versions, faults = {}, []
        for node, answer in zip(nodes, answers, strict=True):
            try:
                versions[_name(node)] = self._ray.get(answer)
            except self._ray.exceptions.RayTaskError as error:
                faults.append(f"the node {_name(node)}: {_reason(error)}")
            except self._ray.exceptions.RayError as error:
                self._gone.add(node["NodeID"])  # Ray lists a dead node for some seconds
                logger.warning("the node %s is left out: %s", _name(node), _reason(error))
        if faults:
            raise ValueError(f"{'; '.join(faults)}: install or copy there what is missing, or stop these nodes")
        if not versions:
            self._able(plan)
        (first, self._versions), *others = versions.items()
        for name, there in others:
            if differing := version_differences(there, self._versions):
                raise ValueError(
                    f"the node {name} has other versions than {first}, so numbers could differ: {differing}: install "
                    "equal versions, or stop one of the nodes"
                )
        if differing := version_differences(self._versions, library_versions()):
            logger.warning("the nodes have other versions than this machine, which computes no cell: %s", differing)
        self._validated = plan

    def slots(self, plan: StudyPlan) -> int:
        """The number of cells that fit on all nodes together."""
        wanted = {name: amount for name, amount in _resources(plan).items() if amount}
        return sum(int(min(node["Resources"][k] / v for k, v in wanted.items()) + 1e-9) for node in self._able(plan))

    def measure(self, plan: StudyPlan, labels: Sequence[str], on_label: Callable[[str], None]) -> Costs:
        """`measure_costs` on a node."""
        on_label("on a node")
        run = self._ray.remote(max_calls=1, **_options(plan))(measure_node)
        try:
            costs: Costs = self._ray.get(run.remote(Package.of(plan), list(labels)))
        except self._ray.exceptions.RayError as error:
            raise ValueError(f"no node could measure a cell: {_reason(error)}") from None
        return costs

    def run(self, plan: StudyPlan, folder: Path, cells: Sequence[Cell]) -> Generator[Event, None, None]:
        """Run the cells; see `Engine.run`. Without cells nothing is started."""
        if not cells:
            return
        token = "" if self._fetch else uuid.uuid4().hex
        with shared_token(folder, token):
            tasks = _Tasks(self._ray, plan, folder.resolve(), token, self._versions, self._mailbox())
            try:
                for cell in cells:
                    tasks.submit(cell)
                yield from tasks.events()
            finally:
                tasks.cancel()

    def _able(self, plan: StudyPlan) -> list[Mapping[str, Any]]:
        """The nodes on which a cell fits; ValueError if there is none."""
        wanted = _resources(plan)
        nodes = [node for node in self._ray.nodes() if node["Alive"] and node["NodeID"] not in self._gone]
        able = [node for node in nodes if all(node["Resources"].get(k, 0) >= v for k, v in wanted.items())]
        if able:
            return able
        offers = "; ".join(
            f"{_name(n)} {n['Resources'].get('CPU', 0):g} and {n['Resources'].get('GPU', 0):g}" for n in nodes
        )
        raise ValueError(
            f"a cell needs cpus={wanted['CPU']:g} and gpus={wanted['GPU']:g}, more than any node has (cpus and gpus of "
            f"{offers or 'no node'}): lower cpus, gpus or threads, or start a larger node"
        )

    def _on(self, node: Mapping[str, Any], *, soft: bool) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return NodeAffinitySchedulingStrategy(node["NodeID"], soft=soft)

    def _mailbox(self) -> Any:
        """The actor that cells send messages to: beside the caller if that is a node, and again after its node died."""
        own = [] if self.address.startswith("ray://") else [self._ray.get_runtime_context().get_node_id()]
        place = {"scheduling_strategy": self._on({"NodeID": own[0]}, soft=True)} if own else {}
        return self._ray.remote(_Mailbox).options(num_cpus=0, max_restarts=-1, **place).remote()


@dataclass
class _Tasks:
    """The tasks of the cells of one call."""

    ray: Any
    plan: StudyPlan
    folder: Path
    token: str
    versions: Mapping[str, str]
    mailbox: Any
    running: dict[Any, Cell] = field(default_factory=dict)
    attempts: dict[Cell, int] = field(default_factory=dict)
    hosts: dict[Cell, str] = field(default_factory=dict)
    taking: Any = None

    def __post_init__(self) -> None:
        self._package = self.ray.put(Package.of(self.plan))
        self._run = self.ray.remote(max_retries=0, **_options(self.plan))(_run_task)

    def submit(self, cell: Cell) -> None:
        """Start a cell, with its files so far where nodes may not see the folder."""
        self.attempts[cell] = self.attempts.get(cell, 0) + 1
        files = read_files(self.folder, cell)
        place = (str(self.folder), self.token, files, self.versions)
        task = self._run.options(name=cell.name).remote(
            self._package, cell.name, *place, self.mailbox, self.attempts[cell]
        )
        self.running[task] = cell

    def events(self) -> Iterator[Event]:
        """The events of all cells until the last one ends."""
        while self.running:
            done, _ = self.ray.wait(list(self.running), timeout=PERIOD)
            yield from self._mail()
            for task in done:
                cell = self.running.pop(task)
                yield self._ended(task, cell)

    def cancel(self) -> None:
        """End all cells that run, and the mailbox."""
        with suppress(self.ray.exceptions.RayError, ConnectionError):
            left = list(self.running)
            for task in left:
                self.ray.cancel(task)
            if left:
                _, left = self.ray.wait(left, num_returns=len(left), timeout=STOP_SECONDS)
            for task in left:
                self.ray.cancel(task, force=True)
            self.ray.kill(self.mailbox)

    def _mail(self) -> Iterator[Event]:
        """The events in the mailbox; files are written. Messages of earlier attempts at a cell are dropped."""
        self.taking = self.taking or self.mailbox.take.remote()
        try:
            items = self.ray.get(self.taking, timeout=MAIL_SECONDS)
        except self.ray.exceptions.GetTimeoutError:
            return  # the next call gets what this one asked for
        except self.ray.exceptions.RayError:
            items = []  # its node died: progress is lost, no result is
        self.taking = None
        current = {cell.name: cell for cell in self.running.values()}
        for name, attempt, events, files in items:
            if name in current and attempt == self.attempts[current[name]]:
                write_files(self.folder, files)
                self.hosts |= {event.cell: event.message for event in events if event.kind == "started"}
                yield from events

    def _ended(self, task: Any, cell: Cell) -> Event:
        """The last event of a cell, or the note that it starts again."""
        errors = self.ray.exceptions
        try:
            event, files = self.ray.get(task)
        except errors.RayTaskError as error:
            return Event(cell, "failed", message=_reason(error))
        except errors.RayError as error:  # of Ray itself: the node or the process is gone
            fate = FATES.get(type(error).__name__, _reason(error)).format(host=self.hosts.get(cell, "its node"))
            if self.attempts[cell] >= ATTEMPTS:
                return Event(cell, "failed", message=f"started {ATTEMPTS} times in vain; the last time {fate}")
            self.submit(cell)
            return Event(cell, "note", message=f"{fate}; the cell resumes from its last finished task")
        if files is not None:
            for path in read_files(self.folder, cell).keys() - files.keys():
                (self.folder / path).unlink()
            write_files(self.folder, files)
        assert isinstance(event, Event)
        return event


class _WithoutRay:
    """Standard output without the messages of Ray's threads, such as 20 lines of a log when a node dies."""

    def __init__(self, inner: TextIO) -> None:
        self.inner, self.mute = inner, False

    def write(self, text: str) -> int:
        """Write the text of any other thread, unless all of it is muted."""
        if self.mute or threading.current_thread().name.startswith("ray_"):
            return len(text)
        return self.inner.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class _Mailbox:
    """Messages of running cells, until the caller takes them."""

    def __init__(self) -> None:
        self._items: list[tuple[str, int, Sequence[Event], Files]] = []

    def put(self, item: tuple[str, int, Sequence[Event], Files]) -> None:
        """Add a message."""
        self._items.append(item)

    def take(self) -> list[tuple[str, int, Sequence[Event], Files]]:
        """All messages so far, which are removed."""
        items, self._items = self._items, []
        return items


def _run_task(
    package: Package,
    name: str,
    folder: str,
    token: str,
    files: Files,
    versions: Mapping[str, str],
    mailbox: Any,
    attempt: int,
) -> tuple[Event, Files | None]:
    """`run_on_node`, with messages to the mailbox."""

    def send(events: Sequence[Event], copies: Files) -> None:
        mailbox.put.remote((name, attempt, events, copies))

    return run_on_node(package, name, folder, token, files, versions, send)


def _resources(plan: StudyPlan) -> dict[str, float]:
    on_gpu = plan.device.startswith("cuda")
    gpus = plan.gpus if plan.gpus is not None else float(on_gpu)
    return {"CPU": plan.cpus if plan.cpus is not None else float(plan.threads), "GPU": gpus}


def _options(plan: StudyPlan) -> dict[str, float]:
    wanted = _resources(plan)
    return {"num_cpus": wanted["CPU"], "num_gpus": wanted["GPU"]}


def _validate_device(plan: StudyPlan) -> None:
    """Raise ValueError for a device that cannot be the one that Ray gives to a cell."""
    gpus = _resources(plan)["GPU"]
    if plan.device.startswith("cuda") and (":" in plan.device or not gpus):
        reason = "Ray chooses the GPU of a cell" if gpus else "gpus is 0"
        raise ValueError(f'device is {plan.device!r}, but {reason}: set device = "cuda", and gpus above 0')


def _require_answer(address: str) -> None:
    """Raise ValueError unless a Ray of the same version answers at the address.

    In a process of its own, since a client of Ray ends its process when it waited in vain, after two minutes.
    """
    if address == "local":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    remedy = "start Ray there (ray start --head), or correct the address"
    if address != "auto":
        if not host or not port.isdecimal():
            raise ValueError(f"address={address} is none: give host:port, ray://host:port, auto or local")
        try:
            socket.create_connection((host, int(port)), timeout=PORT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise ValueError(f"address={address} does not answer ({error}): {remedy}") from None
    code = "import sys, ray; ray.init(sys.argv[1], log_to_driver=False, logging_level='ERROR')"
    command = [sys.executable, "-c", code, address]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise ValueError(f"address={address} answers, but not as Ray within {ANSWER_SECONDS:.0f} s: {remedy}") from None
    if ended.returncode:
        raise ValueError(f"address={address}: {_last_line(ended.stderr)}: {remedy}")


def _reason(error: Exception) -> str:
    """The message of an error in a task, without Ray's own lines around it."""
    return _last_line(getattr(error, "cause", None) or error)


def _last_line(error: object) -> str:
    """The last line of a message, or the first sentence of a long one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if len(lines) > 1 else ". ".join(str(error).split(". ")[:1])).rstrip(".: ")


def _name(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
