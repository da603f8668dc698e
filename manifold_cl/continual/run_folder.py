"""The folder of a run: its paths, its lock, and the verification of its files before a resume."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from manifold_cl.continual.record import RunRecord, config_differences, validate_numbers
from manifold_cl.files import VERSION, FileError, file_errors, read_json, write_json
from manifold_cl.tensor_files import TensorFile

logger = logging.getLogger("manifold_cl")

LEARNED_FORMAT = "manifold_cl.learned"
LEARNED = "learned.json"
LOCK = "run.lock"


@dataclass
class RunFolder:
    """The folder of one run, which need not exist, and its tasks by name (docs/record-format.md, "Record format")."""

    path: Path
    tasks: Sequence[str]
    _locked: tuple[int, int] | None = field(default=None, init=False)
    """Device and number of the lock's file while this process holds it."""

    def task(self, index: int) -> Path:
        """The folder of task number ``index``."""
        return self.path / "tasks" / f"{index + 1:02d}-{self.tasks[index]}"

    def results(self, done: int, task: str) -> Path:
        """The folder for a task's answers once ``done`` tasks are learned."""
        return self.path / "results" / f"{done:02d}" / task

    @contextmanager
    def locked(self) -> Iterator[None]:
        """A context in which no other process runs in this folder. The lock ends with the process.

        Raises:
            FileError: when another process runs here.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        path = self.path / LOCK
        try:
            lock = FileLock(path, timeout=0).acquire()
        except Timeout:
            raise FileError(f"another process is at work on {self.path}: wait for it, or stop it") from None
        with lock:
            self._locked = _file_id(path)
            try:
                for pattern in (".record.json.*.tmp", "tasks/*/.*.tmp"):
                    for temporary in self.path.glob(pattern):  # of killed processes, since no other one writes here
                        temporary.unlink(missing_ok=True)
                yield
            finally:
                self._locked = None

    def require_lock(self) -> None:
        """Raise FileError for a folder that was moved, deleted or replaced by another one during the run."""
        path = self.path / LOCK
        if self._locked is not None and _file_id(path) != self._locked:
            raise FileError(
                f"{path} is not the file that this run locked: the folder was moved or deleted meanwhile; move it "
                "back, or resume the run where the folder is now"
            )

    def record(self, config: Mapping[str, Any], *, resume: bool) -> RunRecord | None:
        """The record to resume; None where there is none.

        Raises:
            FileError: when there is a record and ``resume`` is off, when it is damaged, or when its configuration is
                another one; the differences are listed.
        """
        if not os.path.lexists(self.path / "record.json"):
            return None
        record = RunRecord.load(self.path)
        if differing := config_differences(record.config, config):
            raise FileError(f"{self.path} holds a run of another configuration: {'; '.join(differing)}")
        if record.tasks != list(self.tasks):
            raise FileError(f"{self.path} holds a run of other tasks: {', '.join(record.tasks)}")
        if not resume:
            raise FileError(f"{self.path} holds a run already ({record.status}): resume it, or choose another folder")
        return record

    def drop_damaged(self, record: RunRecord, trained: Iterable[int]) -> None:
        """Take the record back to before the first of the ``trained`` tasks that has missing or damaged files."""
        for index in trained:
            try:
                self._verify_learned(index, record)
            except FileError as error:
                logger.warning("%s; going back to task %d, the last intact one", error, index)
                record.truncate(index)
                return

    @contextmanager
    def all_or_nothing(self, index: int) -> Iterator[None]:
        """A context whose error leaves no tensor file of this task, unless the folder was moved or replaced."""
        try:
            yield
        except Exception:
            with suppress(FileError, OSError):
                self.require_lock()
                self._discard(index)
            raise

    def _discard(self, index: int) -> None:
        """Delete the files that a task has written, and its folder if nothing else is in it."""
        folder = self.task(index)
        for path in (folder / LEARNED, *folder.glob("[!.]*.safetensors")):
            path.unlink(missing_ok=True)
        with suppress(OSError):
            folder.rmdir()

    def save_learned(self, index: int, record: RunRecord, learned: Mapping[str, Any]) -> None:
        """Write the training result of a task, so that a run killed while it evaluates does not train it again."""
        folder = self.task(index)
        files = sorted(path.name for path in folder.glob("[!.]*.safetensors"))
        origin = {
            "run": record.identity,
            "task": self.tasks[index],
            "files": files,
            "checksums": {name: TensorFile(folder / name).checksum for name in files},
        }
        content = {"format": LEARNED_FORMAT, "version": VERSION, **origin, **learned}
        write_json(folder / LEARNED, content)

    def learned(self, record: RunRecord) -> dict[str, Any] | None:
        """The training result of the next task, if an interrupted run of this record had finished training it."""
        if not (self.task(record.done) / LEARNED).exists():
            return None
        try:
            return self._verify_learned(record.done, record)
        except FileError as error:
            logger.warning("%s; learning the task again", error)
            return None

    def _verify_learned(self, index: int, record: RunRecord) -> dict[str, Any]:
        """The training result of a task; FileError unless its files are of this run and intact."""
        path = self.task(index) / LEARNED
        content = read_json(path, expected=LEARNED_FORMAT)
        with file_errors(path):
            for key, kind in (("losses", list), ("constraints", dict), ("timings", dict)):
                validate_numbers(key, content[key], kind)
            words = [content["run"], *content.get("files", [])]
            if not all(isinstance(word, str) and Path(word).name == word for word in words):
                raise TypeError(f"run and files are words, got {words}")
            checksums = dict(content.get("checksums", {}))  # older ones have none
        if content["run"] != record.identity:
            raise FileError(f"{path} is of another run ({content['run']}), not of {record.identity}")
        if (task := content.get("task", self.tasks[index])) != self.tasks[index]:
            raise FileError(f"{path} is of the task {task!r}, not of {self.tasks[index]!r}")
        present = [file.name for file in path.parent.glob("[!.]*.safetensors")]
        for name in sorted({*present, *content.get("files", [])}):  # older ones list no files
            file = TensorFile(path.parent / name)
            if checksums.get(name, file.checksum) != file.checksum:
                raise FileError(f"{file.path} is of another run or task: its checksum is not the one in {LEARNED}")
            file.verify()
        return content

    def update_bytes(self) -> int:
        """Bytes of all updates on disk, memories left out."""
        files = [path for path in (self.path / "tasks").glob("*/[!.]*.safetensors") if path.stem != "memory"]
        return sum(path.stat().st_size for path in files)


def _file_id(path: Path) -> tuple[int, int] | None:
    with suppress(OSError):
        return (status := path.stat()).st_dev, status.st_ino
    return None
