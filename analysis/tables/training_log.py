"""The log of a training: one file per measurement."""

from pathlib import Path

import pandas as pd

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
        return pd.read_parquet(path)
    text = {"metric": "str", "task": "str", "layer": "str"}
    empty = {name: [""] for name in ("value", "chance", "p")}
    return pd.read_csv(path, dtype=text, keep_default_na=False, na_values=empty)


def log_files(folder: Path) -> list[Path]:
    """The files of the log of a folder in the order of their steps."""
    found = [path for path in (folder / "log").glob("step-*") if path.suffix in ENDINGS and path.stem[5:].isdigit()]
    return sorted(found, key=log_step)


def log_step(path: Path) -> int:
    """The step that a file of the log is about."""
    return int(path.stem[5:])
