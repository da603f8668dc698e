"""Options and steps that commands share which write changed adapters."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from manifold_cl.cli.options import require_path, split_names
from manifold_cl.cli.screen import Screen, bars, print_table, screen

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd
    import torch

    from manifold_cl.cli.analysis_package import analysis

Alpha = Annotated[str | None, Option(help="Alpha where a LoRA file has none: a number, or rank for scaling 1.")]
Layers = Annotated[
    str | None,
    Option(help="Regular expression: only layers that it finds change, the others are written as read."),
]
Transposed = Annotated[
    str | None, Option(help="Regular expression: layers whose base weight is stored inputs by outputs (Conv1D).")
]


class StoredType(StrEnum):
    """A type of stored factors."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


Stored = Annotated[StoredType, Option("--dtype", help="Type in which the factors are stored.")]


def read_adapters(
    paths: Sequence[Path], *, tasks: str | None, base: Path | None, alpha: str | None, transposed: str | None
) -> analysis.AdapterSet:
    """The adapters, with their notices printed; one per task names what a changed adapter keeps beside its factors."""
    from manifold_cl.cli.analysis_package import analysis

    for path in paths:
        require_path(path, "an adapter folder or file, or a run folder")
    if base is not None:
        require_path(base, "for --base a checkpoint")
    options: dict[str, Any] = {"base": base, "alpha": parse_alpha(alpha), "transposed": transposed}
    adapters = analysis.AdapterSet.load(*paths, tasks=split_names(tasks), **options)
    copied = [
        f"{source.task}: copied into the new adapter: {analysis.names.listed(list(tensors))}"
        for source in adapters.sources
        if (tensors := analysis.formats.carried_over(source).tensors)
    ]
    adapters = replace(adapters, notices=(*adapters.notices, *copied))
    for notice in adapters.notices:
        screen.print(notice, style="yellow", markup=False, highlight=False, soft_wrap=True)
    return adapters


def parse_alpha(text: str | None) -> float | str | None:
    """A number, ``rank``, or None; ValueError for another text."""
    if text is None or text == "rank":
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--alpha is {text!r}: give a number, or rank") from None


def chosen_layers(adapters: analysis.AdapterSet, pattern: str | None) -> list[str]:
    """The layers that the pattern of ``--layers`` finds, all without one; ValueError for none."""
    from manifold_cl.cli.analysis_package import analysis

    if pattern is None:
        return list(adapters.layers)
    found = analysis.formats.matching_names(pattern, adapters.layers)
    if not found:
        raise ValueError(f"--layers {pattern!r} finds none of the {len(adapters.layers)}, such as {adapters.layers[0]}")
    return found


def torch_type(stored: StoredType) -> torch.dtype:
    """The type of that name."""
    import torch

    dtype: torch.dtype = getattr(torch, stored.value)
    return dtype


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar; yields a function of the numbers that are done and of all."""
    with bars(counted=True) as progress:
        bar = progress.add_task(what, total=None, note="", left="")
        yield lambda done, total: progress.update(bar, completed=done, total=total)


def write_tables(folder: Path, tables: Mapping[str, pd.DataFrame]) -> None:
    """Write each table as CSV."""
    from manifold_cl.cli.analysis_package import analysis

    for name, table in tables.items():
        analysis.write_table(table, folder / f"{name}.csv")


def total_rows(changes: pd.DataFrame) -> list[tuple[str, ...]]:
    """Cells of the printed table of before and after: one row per task."""
    rows = []
    for task, table in changes[changes["layer"] == "total"].groupby("task", sort=False):
        values = table.set_index("metric")
        cells = [_both(values, "rank", ".0f"), _both(values, "frobenius", ".3g")]
        cells += [format(values["after"]["relative_change"], ".2%"), format(values["after"]["cosine"], ".4f")]
        leak = [_both(values, "leakage", ".2%")] if "leakage" in values.index else []
        rows.append((str(task), *cells, *leak))
    return rows


def _both(values: pd.DataFrame, metric: str, form: str) -> str:
    return f"{values['before'][metric]:{form}} → {values['after'][metric]:{form}}"


def print_changes(changes: pd.DataFrame) -> None:
    """Print what changed in all layers together."""
    rows = total_rows(changes)
    leak = ["leakage"] if len(rows[0]) > 5 else []
    print_table(
        "before → after, all layers together", ("task", "rank, summed", "‖ΔW‖", "change", "cosine", *leak), rows
    )


def print_written(out: Path, summary: Mapping[str, Any], *, as_json: bool) -> None:
    """Print where the adapter is, and how to load it; or the summary as JSON."""
    if as_json:
        print(json.dumps({"out": str(out), **summary}))
        return
    Screen().say(f"{'adapter':>12}  {out}")
    Screen().say(f"{'report':>12}  {out / 'report.html'}")
