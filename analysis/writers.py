"""Tidy tables as files."""

from pathlib import Path

import pandas as pd

SCHEMA = "analysis.table/1"
"""Version of the columns; kept in Parquet's metadata and JSON's head, so that a reader can tell."""


def write_table(table: pd.DataFrame, path: str | Path) -> Path:
    """The path of the table written as ``.csv``, ``.json`` or ``.parquet``, by its suffix.

    JSON is an object with the schema and a list of rows, unknown numbers null. Parquet needs pyarrow.

    Raises:
        ValueError: another suffix.
        ImportError: Parquet without pyarrow.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        table.to_csv(path, index=False)
    elif path.suffix == ".json":
        rows = table.to_json(orient="records", double_precision=15)
        path.write_text(f'{{"schema": "{SCHEMA}", "rows": {rows}}}\n', encoding="utf-8")
    elif path.suffix == ".parquet":
        need_parquet()
        tagged = table.copy()
        tagged.attrs = {"schema": SCHEMA}
        tagged.to_parquet(path, index=False, engine="pyarrow")
    else:
        raise ValueError(f"{path.name}: tables are written as .csv, .json or .parquet")
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
