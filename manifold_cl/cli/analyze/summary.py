"""The JSON of `analyze` commands: the same quantity has the same key in each of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

SHARED = ("out", "paths", "findings", "notices", "left_out")
"""Keys of every command; docs/analysis.md, "For programs", lists the others too."""


def print_summary(
    out: Path,
    paths: Mapping[str, Path],
    findings: Iterable[str | Mapping[str, Any]],
    *,
    notices: Iterable[str],
    left_out: Iterable[Mapping[str, Any]],
    further: Mapping[str, Any],
) -> None:
    """Print the summary of a command as one JSON object.

    A finding has at least a ``headline``; an entry of `left_out` has ``task``, ``file``, ``tensor`` and ``reason``.
    A number that is NaN or infinite is null, since JSON has neither.
    """
    sentences = [{"headline": each} if isinstance(each, str) else dict(each) for each in findings]
    shared = {"out": str(out), "paths": {name: str(path) for name, path in paths.items()}, "findings": sentences}
    shared |= {"notices": list(notices), "left_out": [dict(each) for each in left_out]}
    assert not set(shared) & set(further)
    print(json.dumps(_finite(shared | dict(further)), allow_nan=False))


def _finite(value: Any) -> Any:
    """The value with null in place of numbers that are not finite."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def entries(left_out: Sequence[Any]) -> list[dict[str, str]]:
    """Entries of what was not read, from those of a set of adapters."""
    return [{name: getattr(each, name) for name in ("task", "file", "tensor", "reason")} for each in left_out]
