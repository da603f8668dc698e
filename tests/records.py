"""A run's record as far as export reads it."""

from pathlib import Path

from manifold_cl.files import write_json


def write_record(folder: Path, tasks: list[str], *, learned: int = 3, status: str = "complete") -> None:
    """The part of a run's record that says which tasks are learned."""
    content = {"format": "manifold_cl.record", "tasks": tasks, "losses": [[1.0]] * learned, "status": status}
    write_json(folder / "record.json", content)
