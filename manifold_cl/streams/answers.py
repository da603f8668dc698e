"""Answer files with one answer per line, from which an interrupted evaluation continues."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from manifold_cl.files import CHECKSUM, VERSION, checksum_of
from manifold_cl.kinds import is_whole

ANSWERS_FORMAT = "manifold_cl.answers"

logger = logging.getLogger("manifold_cl")


class AnswerBook:
    """The answers of one model to one split of one task, in a folder that all ranks may share.

    The header holds everything that determines the answers; files with another header are removed. A question whose
    line is incomplete after an interruption is asked again.

    Args:
        folder: of the files ``answers-<rank>.jsonl``.
        header: plain values.
        rank: of the process that writes.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any], *, rank: int = 0) -> None:
        self.folder = folder
        self.path = folder / f"answers-{rank}.jsonl"
        self.header = {"format": ANSWERS_FORMAT, "version": VERSION, **json.loads(json.dumps(dict(header)))}

    def read(self) -> dict[int, dict[str, Any]]:
        """All complete answers with this header, of all ranks, by index."""
        contents = [_content(path) for path in sorted(self.folder.glob("answers-*.jsonl"))]
        return {entry["index"]: entry for head, entries, _ in contents if head == self.header for entry in entries}

    def clear_others(self) -> None:
        """Remove files with another header, and incomplete last lines of the others. For one rank only."""
        for path in sorted(self.folder.glob("answers-*.jsonl")):
            head, _, complete = _content(path)
            if head != self.header:
                logger.info("%s is damaged, or holds answers of another model or other settings: asking again", path)
                path.unlink()
            elif complete < path.stat().st_size:
                os.truncate(path, complete)

    def open(self) -> IO[str]:
        """The file of this rank, at its end, with its header written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.path.open("a", encoding="utf-8")
        if not file.tell():
            self.add(file, self.header)
        return file

    @staticmethod
    def add(file: IO[str], entry: Mapping[str, Any]) -> None:
        """Write and flush one line, with its checksum."""
        file.write(json.dumps({**entry, CHECKSUM: checksum_of(entry)}, ensure_ascii=False) + "\n")
        file.flush()


def _content(path: Path) -> tuple[dict[str, Any] | None, list[dict[str, Any]], int]:
    """Header, entries, and the length of the complete lines in bytes; no header for a file with a damaged line."""
    content = path.read_bytes()
    complete = content.rfind(b"\n") + 1
    try:
        lines = [json.loads(line) for line in content[:complete].split(b"\n")[:-1]]
    except (ValueError, RecursionError):
        return None, [], complete
    valid = all(isinstance(line, dict) and line.pop(CHECKSUM, digest := checksum_of(line)) == digest for line in lines)
    valid = valid and all(is_whole(entry.get("index")) and isinstance(entry.get("answer"), str) for entry in lines[1:])
    return (lines[0], lines[1:], complete) if lines and valid else (None, [], complete)
