"""Tables as CSV, JSON and Parquet files."""

from pathlib import Path

import pandas as pd

from analysis.files import replacing

SCHEMA = "analysis.table/1"
"""Version of the columns, kept in Parquet's metadata and JSON's head."""
SUFFIXES = (".csv", ".json", ".parquet")


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
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path.name}: tables are written as .csv, .json or .parquet")
    if path.suffix == ".parquet":
        need_parquet()
    with replacing(path) as new:
        if path.suffix == ".csv":
            table.to_csv(new, index=False)
        elif path.suffix == ".json":
            rows = table.to_json(orient="records", double_precision=15)
            new.write_text(f'{{"schema": "{SCHEMA}", "rows": {rows}}}\n', encoding="utf-8")
        else:
            tagged = table.copy()
            tagged.attrs = {"schema": SCHEMA}
            tagged.to_parquet(new, index=False, engine="pyarrow")
    return path


def need_parquet() -> None:
    """Raise an error that says what to install where Parquet cannot be written.

    Raises:
        ImportError: pyarrow is not installed.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise ImportError("Parquet needs pyarrow: pip install 'manifold-cl[parquet]', or write CSV or JSON") from error
