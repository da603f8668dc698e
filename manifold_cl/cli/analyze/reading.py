"""Options and steps of all commands that read adapters."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from manifold_cl.cli.options import parse_renames, require_path
from manifold_cl.cli.screen import Screen, bars, screen

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd


class TableFormat(StrEnum):
    """A file format of tables; Parquet needs pyarrow."""

    CSV = "csv"
    JSON = "json"
    PARQUET = "parquet"


TaskNames = Annotated[
    str | None, Option(help="Names of the tasks with commas, in the order of the paths; run folders keep their own.")
]
Base = Annotated[
    Path | None,
    Option(help="Checkpoint of the base model: for DoRA, OSF, dense checkpoints, and ratios to the weights."),
]
Common = Annotated[bool, Option("--common", help="Read only the layers that all adapters have in common.")]
Rank = Annotated[int | None, Option(help="Rank to which dense differences are truncated.")]
Alpha = Annotated[str | None, Option(help="Alpha where a LoRA file has none: a number, or rank for scaling 1.")]
Layers = Annotated[str | None, Option(help="Regular expression: only layers that it finds are read, or changed.")]
Transposed = Annotated[
    str | None, Option(help="Regular expression: layers whose base weight is stored inputs by outputs (Conv1D).")
]
TableFormats = Annotated[
    list[TableFormat] | None,
    Option("--format", metavar="FORMAT", help="csv (default), json or parquet; repeatable."),
]


def require_adapters(paths: Sequence[Path], needed: str, *, base: Path | None, memory: Path | None = None) -> None:
    """Raise FileNotFoundError for paths that do not exist; ``needed`` says what the paths of adapters are."""
    for path in paths:
        require_path(path, needed)
    for given, what in ((memory, "for --memory a folder with memory.safetensors"), (base, "for --base a checkpoint")):
        if given is not None:
            require_path(given, what)


def reading_options(alpha: str | None, rename: Sequence[str] | None, **options: Any) -> dict[str, Any]:
    """The options of `AdapterSet.load` from those of a command; ValueError for a wrong ``--alpha`` or ``--map``."""
    return {**options, "alpha": parse_alpha(alpha), "rename": parse_renames(rename)}


def parse_alpha(text: str | None) -> float | str | None:
    """The number, or ``"rank"``, of ``--alpha``; ValueError for another text."""
    if text is None or text == "rank":
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--alpha is {text!r}: give a number, or rank") from None


def file_endings(formats: Sequence[TableFormat] | None) -> list[str]:
    """The endings of the files of a table, ``.csv`` by default; ImportError for Parquet without pyarrow."""
    from manifold_cl.cli.analysis_package import analysis

    if TableFormat.PARQUET in (formats or []):
        analysis.tables.need_parquet()
    return [f".{one.value}" for one in dict.fromkeys(formats or [TableFormat.CSV])]


def write_tables(
    folder: Path, tables: Mapping[str, pd.DataFrame], endings: Sequence[str] = (".csv",)
) -> dict[str, Path]:
    """Write each table with each ending; name to path, names with their ending where there are several."""
    from manifold_cl.cli.analysis_package import analysis

    return {
        f"{name}{'' if len(endings) == 1 else ending}": analysis.write_table(table, folder / f"{name}{ending}")
        for name, table in tables.items()
        for ending in endings
    }


@contextmanager
def replacing_results(out: Path, tables: Iterable[str]) -> Iterator[Path]:
    """A folder for new results. When the block ends they move to ``out``; nothing changes there if the block fails.

    Tables of these names from an earlier run are removed: they are about other adapters or examples.
    """
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    unfinished = out / ".unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir()
        yield unfinished
        new = sorted(unfinished.iterdir())
        for path in new:
            path.replace(out / path.name)
        earlier = {out / f"{name}.{ending.value}" for name in tables for ending in TableFormat}
        for path in earlier - {out / path.name for path in new}:
            path.unlink(missing_ok=True)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        if made and not any(out.iterdir()):
            out.rmdir()


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar; yields a function of the numbers that are done and of all."""
    with bars(counted=True) as progress:
        bar = progress.add_task(what, total=None, note="", left="")
        yield lambda done, total: progress.update(bar, completed=done, total=total)


def print_notices(notices: Iterable[str]) -> None:
    """Print each notice on a line of its own, to standard error."""
    for notice in notices:
        screen.print(notice, style="yellow", markup=False, highlight=False, soft_wrap=True)


def print_findings(findings: Iterable[str]) -> None:
    """Print each finding as a point of a list."""
    for finding in findings:
        Screen().say(f"• {finding}")


def print_paths(written: Mapping[str, Path]) -> None:
    """Print where each file is."""
    for name, path in written.items():
        Screen().say(f"{name:>12}  {path}")
