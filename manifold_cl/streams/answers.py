"""Answer files, one answer per line, from which an interrupted evaluation continues."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from manifold_cl.files import VERSION

ANSWERS_FORMAT = "manifold_cl.answers"

logger = logging.getLogger("manifold_cl")


class AnswerBook:
    """The answers of one model to one split of one task, in a folder that all ranks may share.

    The header holds everything that the answers depend on; files with another header are removed. A question whose line
    is incomplete after an interruption is asked again.

    Args:
        folder: holds ``answers-<rank>.jsonl``.
        header: plain values; a file counts if its own are equal.
        rank: of the process that writes.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any], *, rank: int = 0) -> None:
        self.folder = folder
        self.path = folder / f"answers-{rank}.jsonl"
        self.header = {"format": ANSWERS_FORMAT, "version": VERSION, **json.loads(json.dumps(dict(header)))}

    def read(self) -> dict[int, dict[str, Any]]:
        """All complete answers with this header, of all ranks, by index."""
        found: dict[int, dict[str, Any]] = {}
        for path in sorted(self.folder.glob("answers-*.jsonl")):
            head, entries, _ = _content(path)
            if head == self.header:
                found.update({entry["index"]: entry for entry in entries})
        return found

    def clear_others(self) -> None:
        """Remove files whose header differs, and cut an incomplete last line off the others. One rank only."""
        for path in sorted(self.folder.glob("answers-*.jsonl")):
            head, _, whole = _content(path)
            if head != self.header:
                logger.info("%s holds answers of another model or other settings: asking again", path)
                path.unlink()
            elif whole < path.stat().st_size:
                with path.open("r+b") as file:
                    file.truncate(whole)

    def open(self) -> IO[str]:
        """The file of this rank, at its end, with its header written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        new = not self.path.exists()
        file = self.path.open("a", encoding="utf-8")
        if new:
            self.add(file, self.header)
        return file

    @staticmethod
    def add(file: IO[str], entry: Mapping[str, Any]) -> None:
        """Write and flush one line."""
        file.write(json.dumps(dict(entry), ensure_ascii=False) + "\n")
        file.flush()


def _content(path: Path) -> tuple[dict[str, Any] | None, list[dict[str, Any]], int]:
    """Header, entries, and the number of bytes up to the end of the last whole line."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    lines = []
    for line in content[:whole].split(b"\n")[:-1]:
        try:
            lines.append(json.loads(line))
        except (ValueError, RecursionError):
            return None, [], whole  # not of our making, or damaged in the middle: nothing in it is trusted
    if not lines or not all(isinstance(line, dict) for line in lines):
        return None, [], whole
    if not all(type(entry.get("index")) is int and isinstance(entry.get("answer"), str) for entry in lines[1:]):
        return None, [], whole
    return lines[0], lines[1:], whole
