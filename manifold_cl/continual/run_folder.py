"""A run on disk: what is there to go on from, what of it can be trusted, and where everything goes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manifold_cl.adapters.files import VERSION, FileError, damage, read_json, write_json
from manifold_cl.continual.record import RunRecord, differences

logger = logging.getLogger("manifold_cl")

LEARNED_FORMAT = "manifold_cl.learned"
LEARNED = "learned.json"


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run (docs/record-format.md).

    Args:
        path: of the folder, which need not exist.
        tasks: names of the tasks, in order.
    """

    path: Path
    tasks: Sequence[str]

    def task(self, index: int) -> Path:
        """Where the files of task number ``index`` go."""
        return self.path / "tasks" / f"{index + 1:02d}-{self.tasks[index]}"

    def results(self, done: int, task: str) -> Path:
        """Where a task may keep its answers once ``done`` tasks are learned."""
        return self.path / "results" / f"{done:02d}" / task

    def record(self, config: Mapping[str, Any], *, resume: bool) -> RunRecord | None:
        """The record to go on with; None where there is none yet.

        Raises:
            FileError: when there is one and ``resume`` is off, or one of another configuration (the differences are
                listed), or a damaged one.
        """
        if not (self.path / "record.json").exists():
            return None
        found = RunRecord.load(self.path)
        if differing := differences(found.config, config):
            raise FileError(f"{self.path} holds a run of another configuration: {'; '.join(differing)}")
        if not resume:
            raise FileError(f"{self.path} holds a run already ({found.status}): resume it, or choose another folder")
        return found

    def drop_damaged(self, record: RunRecord, trained: Iterable[int]) -> None:
        """Take the record back to before the first of the ``trained`` tasks whose files are damaged or gone."""
        for index in trained:
            if said := self._damage(index):
                logger.warning("%s: going back to task %d, the last one that is whole", said, index)
                record.cut(index)
                return

    def save_learned(self, index: int, record: RunRecord, learned: Mapping[str, Any]) -> None:
        """Note that a task is learned, so that a run killed while it evaluates does not learn it again."""
        folder = self.task(index)
        files = sorted(path.name for path in folder.glob("[!.]*.safetensors"))
        content = {"format": LEARNED_FORMAT, "version": VERSION, "run": record.started, "files": files, **learned}
        write_json(folder / LEARNED, content)

    def learned(self, record: RunRecord) -> dict[str, Any] | None:
        """What an interrupted run of this record learned of the next task, if it came to the end of learning it."""
        path = self.task(record.done) / LEARNED
        if not path.exists():
            return None
        if said := self._damage(record.done):
            logger.warning("%s: learning the task again", said)
            return None
        try:
            found = read_json(path, expected=LEARNED_FORMAT)
        except FileError as error:
            logger.warning("%s: learning the task again", error)
            return None
        return found if found["run"] == record.started else None  # else of a run whose record was deleted

    def _damage(self, index: int) -> str | None:
        """What is wrong with the files of a task that was learned, by what it noted in the end."""
        path = self.task(index) / LEARNED
        try:
            noted = read_json(path, expected=LEARNED_FORMAT).get("files", [])  # older ones do not list any
        except FileError:
            noted = []
        return damage(path.parent, [LEARNED, *noted])

    def update_bytes(self) -> int:
        """Bytes of all updates on disk, memories left out."""
        files = [path for path in (self.path / "tasks").rglob("*.safetensors") if path.stem != "memory"]
        return sum(path.stat().st_size for path in files)
