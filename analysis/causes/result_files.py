"""Result files of one run each: their format, and the replicate that a run belongs to."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from analysis.formats import read_format


def result_files(paths: Iterable[str | Path], kind: str, rows: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and content of each file, which has the entry ``rows``.

    Raises:
        ValueError: a file is damaged, of another format or version, or of the same method and replicate as another one,
            which would count as two.
    """
    seen: dict[tuple[str, str], Path] = {}
    for path in paths:
        file, content = read_format(path, "", kind)
        if missing := [key for key in ("method", "tasks", "seed", rows) if key not in content]:
            raise ValueError(f"{file} lacks {', '.join(missing)}: write it again")
        other = seen.setdefault((content["method"], replicate(content)), file)
        if other is not file:
            raise ValueError(
                f"{file} and {other} are both of {content['method']}, {replicate(content)}: leave one of them out"
            )
        yield file.stem, content


def replicate(content: dict[str, Any]) -> str:
    """The pair of order and seed that a run belongs to: runs of one replicate have the same tasks in the same order."""
    return f"{'>'.join(content['tasks'])} seed {content['seed']}"
