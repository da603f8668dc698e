"""Result files of one run each: their format, and the replicate that a run belongs to."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

NEWEST = 1
"""Latest version of the files that is read."""


def result_files(paths: Iterable[str | Path], kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and content of each file; ValueError for one that is damaged or of another format or version."""
    for path in map(Path, paths):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read ({error}): write it again") from None
        known = isinstance(content, dict) and content.get("format") == kind and content.get("version", 0) <= NEWEST
        if not known:
            found = content.get("format") if isinstance(content, dict) else None
            raise ValueError(f"{path} is not of format {kind!r}, version up to {NEWEST} (found {found!r})")
        yield path.stem, content


def replicate(content: dict[str, Any]) -> str:
    """The pair of order and seed that a run belongs to: runs of one replicate have the same tasks in the same order."""
    return f"{'>'.join(content['tasks'])} seed {content['seed']}"
