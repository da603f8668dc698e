"""The subjects of a report: runs and sets of adapters, each under a label."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.adapters.adapter_set import AdapterSet
from analysis.formats import Record, label_records
from analysis.names import matched_names
from analysis.tables.adapter_tables import AdapterTables
from analysis.tables.training_log import only_log, read_training_log, training_logs

PathLike = str | Path
Given = AdapterSet | PathLike | Sequence[PathLike]
Runs = PathLike | Sequence[PathLike] | Mapping[str, Given]
Measure = Callable[[AdapterSet], AdapterTables]


@dataclass(frozen=True, eq=False)
class Subject:
    """A run, a set of adapters, or a run with its adapters."""

    label: str
    record: Record | None
    tables: AdapterTables | None
    answers: pd.DataFrame | None = None
    """The table of `answer_intervals` on examples."""
    drift: pd.DataFrame | None = None
    """The table of `input_drift` on examples."""
    training: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    """Name to log of a training, of `read_training_log`."""

    @property
    def adapters(self) -> AdapterSet | None:
        """The adapters that `tables` describes."""
        return self.tables.adapters if self.tables is not None else None

    @property
    def notices(self) -> list[str]:
        """What was read beside the updates, and logs of trainings that have no layer of the adapters."""
        if self.adapters is None:
            return []
        foreign = []
        for name, log in self.training.items():
            layers = [layer for layer in dict.fromkeys(log["layer"]) if layer != "total"]
            if layers and not matched_names(self.adapters.layers, layers):
                foreign.append(
                    f"the log of the training {name!r} has no layer of these adapters: {layers[0]!r} and not "
                    f"{self.adapters.layers[0]!r}; it may be about another model"
                )
        return [*self.adapters.notices, *foreign]


def read_subjects(
    runs: Runs,
    *,
    tasks: Sequence[str] | None = None,
    measure: Measure = AdapterTables,
    **options: Any,
) -> list[Subject]:
    """The subjects among paths: every run folder is one, all other paths together are another, ``"adapters"``.

    Logs of trainings (`TrainingWatch`) in the folders of runs and adapters are read with them. Paths of logs alone
    belong to the adapters; without any, they are a subject ``"training"``.

    A mapping names every run, list of adapter folders, or set of adapters itself. `tasks` names the tasks of adapter
    folders. `measure` makes the tables of a set of adapters; give it a device or a memory budget with
    `functools.partial`. `options` go to `AdapterSet.load`. ValueError without a run, or if `tasks` is given and there
    are only runs.
    """
    if isinstance(runs, Mapping):
        named: dict[str, Given] = dict(runs)
    else:
        paths = _paths(runs)
        found = [path for path in paths if _is_run(path)]
        labels = label_records([Record.load(path) for path in found])
        named = {label: record.folder for label, record in labels.items()}
        if others := [path for path in paths if path not in found]:
            named["training" if all(map(only_log, others)) else "adapters"] = others
    subjects = [_subject(label, given, tasks, measure, options) for label, given in named.items()]
    if tasks is not None and subjects and all(subject.record is not None for subject in subjects):
        raise ValueError("tasks= names the tasks of adapter folders, but all paths are runs: leave it out")
    if not subjects:
        raise ValueError("nothing to describe: give at least one run folder or adapter folder")
    return subjects


def _subject(
    label: str, given: Given, tasks: Sequence[str] | None, measure: Measure, options: Mapping[str, Any]
) -> Subject:
    if isinstance(given, AdapterSet):
        return Subject(label, None, measure(given))
    paths = _paths(given)
    if not paths:
        raise ValueError(f"{label!r} is empty: give at least one run folder or adapter folder")
    logs = _logs(paths)
    if len(paths) > 1 or not _is_run(paths[0]):
        others = [path for path in paths if not only_log(path)]
        tables = measure(AdapterSet.load(*others, tasks=tasks, **options)) if others else None
        return Subject(label, None, tables, training=logs)
    has_adapters = any(paths[0].glob("tasks/*/adapter.*"))
    tables = measure(AdapterSet.load(*paths, **options)) if has_adapters else None
    return Subject(label, Record.load(paths[0]), tables, training=logs)


def _logs(paths: Sequence[Path]) -> dict[str, pd.DataFrame]:
    """Name to log of the trainings at the paths; logs of one name are called by their whole path."""
    found = {folder: name for path in paths for name, folder in training_logs(path).items()}
    names = list(found.values())
    return {
        folder.as_posix() if names.count(name) > 1 else name: read_training_log(folder)
        for folder, name in found.items()
    }


def _paths(paths: PathLike | Sequence[PathLike]) -> list[Path]:
    return [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]


def _is_run(path: Path) -> bool:
    return (path / "record.json").exists()
