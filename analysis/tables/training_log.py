"""The log of a training: one file per measurement."""

from pathlib import Path

import pandas as pd

from analysis.tables.frames import need_parquet

COLUMNS = ("step", "metric", "task", "layer", "value", "chance", "p")
"""Columns of a log. `task` is the earlier task, or ``"protected"``; empty for spectra and other numbers."""
LOG = "log/step-{:010d}"
"""Name of the file of one measurement, without its ending."""
ENDINGS = (".parquet", ".csv")


def read_training_log(folder: str | Path) -> pd.DataFrame:
    """The log of a `TrainingWatch`: step, metric, task, layer, value, chance, p.

    `layer` is ``"total"`` for numbers over all layers, `task` the earlier task of an interference, else empty.

    Raises:
        FileNotFoundError: the folder holds no log.
    """
    paths = log_files(Path(folder))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no log of a training: looked for {LOG.format(0)}.parquet and .csv")
    return pd.concat([_read(path) for path in paths], ignore_index=True)


def _read(path: Path) -> pd.DataFrame:
    """One measurement; the text of a CSV file stays text, such as the name ``nan``."""
    if path.suffix == ".parquet":
        need_parquet()
    text = {"metric": "str", "task": "str", "layer": "str"}
    empty = {name: [""] for name in ("value", "chance", "p")}
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
        else:
            if not path.read_bytes().endswith(b"\n"):
                raise ValueError("its last line has no end")
            table = pd.read_csv(path, dtype=text, keep_default_na=False, na_values=empty)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is no intact measurement of a training: {error}") from error
    if missing := [column for column in COLUMNS if column not in table]:
        raise ValueError(f"{path} is no measurement of a training: it has no column {missing[0]!r}")
    if table.empty or table["layer"].iloc[-1] != "total":
        raise ValueError(f"{path} is no intact measurement of a training: it ends before the row of all layers")
    return table


def training_logs(path: Path) -> dict[str, Path]:
    """Name to folder of the logs at a path: the folder itself, a file of its log, or folders inside.

    Inside, ``*/`` and ``tasks/*/*/`` are searched: a watch in the folder of a run, of an adapter, or of a task.
    """
    if path.suffix in ENDINGS and path.parent.name == "log" and log_files(path.parent.parent):
        return {path.parent.parent.name: path.parent.parent}
    if not path.is_dir():
        return {}
    folders = [path, *sorted(path.glob("*/")), *sorted(path.glob("tasks/*/*/"))]
    found = [folder for folder in folders if log_files(folder)]
    return {folder.relative_to(path).as_posix() if folder != path else path.name: folder for folder in found}


def only_log(path: Path) -> bool:
    """Whether a path is the log of a training, or a folder of one without adapters: nothing else can be read there."""
    if path.suffix in ENDINGS:
        return bool(training_logs(path))
    return bool(log_files(path)) and {each.name for each in path.iterdir()} <= {"log", "training.html"}


def log_files(folder: Path) -> list[Path]:
    """The files of the log of a folder in the order of their steps."""
    found = [path for path in (folder / "log").glob("step-*") if path.suffix in ENDINGS and path.stem[5:].isdigit()]
    return sorted(found, key=log_step)


def log_step(path: Path) -> int:
    """The step that a file of the log is about."""
    return int(path.stem[5:])
