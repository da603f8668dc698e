"""Result files of one run each: their format, and the replicate that a run belongs to."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from analysis.formats import read_format


def result_files(paths: Iterable[str | Path], kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and content of each file; ValueError for one that is damaged or of another format or version."""
    for path in paths:
        file, content = read_format(path, "", kind)
        yield file.stem, content


def replicate(content: dict[str, Any]) -> str:
    """The pair of order and seed that a run belongs to: runs of one replicate have the same tasks in the same order."""
    return f"{'>'.join(content['tasks'])} seed {content['seed']}"
