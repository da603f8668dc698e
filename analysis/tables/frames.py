"""The rows of tables in order, and tables as CSV, JSON and Parquet files."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.files import replacing

SCHEMA = "analysis.table/1"
"""Version of the columns, kept in Parquet's metadata and JSON's head."""


def in_order(table: pd.DataFrame, orders: Mapping[str, Iterable[str]]) -> pd.DataFrame:
    """The rows sorted by some columns, the most significant first, each in the order of the values given for it."""
    keys = [pd.Index(list(values)).get_indexer(pd.Index(table[column])) for column, values in orders.items()]
    return table.iloc[np.lexsort(keys[::-1])].reset_index(drop=True)


def write_table(table: pd.DataFrame, path: str | Path) -> Path:
    """The path of the table written as ``.csv``, ``.json`` or ``.parquet``, by its suffix.

    JSON is an object with the schema and a list of rows, unknown numbers null. Parquet needs pyarrow. An
    existing file is replaced completely or, where writing fails, not at all.

    Raises:
        ValueError: another suffix.
        OSError: the file cannot be written.
        ImportError: Parquet without pyarrow.
    """
    path = Path(path)
    if path.suffix not in (".csv", ".json", ".parquet"):
        raise ValueError(f"{path.name}: tables are written as .csv, .json or .parquet")
    if path.suffix == ".parquet":
        need_parquet()
    with replacing(path) as new:
        match path.suffix:
            case ".csv":
                table.to_csv(new, index=False)
            case ".json":
                rows = table.to_json(orient="records", double_precision=15)
                new.write_text(f'{{"schema": "{SCHEMA}", "rows": {rows}}}\n', encoding="utf-8")
            case _:
                tagged = table.copy()
                tagged.attrs = {"schema": SCHEMA}
                tagged.to_parquet(new, index=False, engine="pyarrow")
    return path


def need_parquet() -> None:
    """Raise ImportError, with what to install, where pyarrow is missing."""
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise ImportError("Parquet needs pyarrow: pip install 'pyarrow>=18', or write CSV or JSON") from error
