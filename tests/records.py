"""A run's record as far as export reads it, and JSON files that a test changes by hand."""

import json
from pathlib import Path
from typing import Any

from manifold_cl.files import CHECKSUM, write_json

EXACT = (
    "accuracy",
    "losses",
    "constraints",
    "capacity",
    "metrics",
    "zero_shot",
    "primary",
    "tasks",
    "config",
    "status",
)
"""Fields of a record that are equal, bit for bit, in a run that was killed and resumed."""


def editable(path: Path) -> dict[str, Any]:
    """The object in a JSON file without its checksum, to be changed and written again."""
    content: dict[str, Any] = json.loads(path.read_text())
    content.pop(CHECKSUM, None)
    return content


def write_record(folder: Path, tasks: list[str], *, learned: int = 3, status: str = "complete") -> None:
    """The part of a run's record that says which tasks are learned."""
    content = {"format": "manifold_cl.record", "tasks": tasks, "losses": [[1.0]] * learned, "status": status}
    write_json(folder / "record.json", content)
