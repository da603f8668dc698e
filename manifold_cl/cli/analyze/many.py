"""``manifold-cl analyze many``: a folder of many adapters, their clusters, common directions, and outliers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from manifold_cl.cli.analyze.reading import (
    Alpha,
    Base,
    Common,
    Layers,
    Rank,
    TableFormats,
    Transposed,
    counting,
    file_endings,
    print_notices,
    print_paths,
    reading_options,
    replacing_results,
    require_adapters,
    write_tables,
)
from manifold_cl.cli.analyze.summary import print_summary
from manifold_cl.cli.options import Device, Json, MemoryBudget, Renames, parse_bytes, validate_device, validate_out
from manifold_cl.cli.screen import Screen, print_table, screen
from manifold_cl.lists import listed

if TYPE_CHECKING:
    from manifold_cl.cli.analysis_package import analysis

TABLES = ("members", "pairs", "outliers", "layers", "curves")


class Side(StrEnum):
    """The side of the updates whose directions are compared."""

    INPUT = "input"
    OUTPUT = "output"


def many(
    paths: Annotated[list[Path], Argument(help="A folder that holds adapters; or several adapters, of any format.")],
    out: Annotated[Path, Option(help="Folder for the page and the tables.")] = Path("analysis-many"),
    side: Annotated[Side, Option(help="Directions that are compared.")] = Side.INPUT,
    clusters: Annotated[int | None, Option(help="Number of clusters (default: by the widest gap of the tree).")] = None,
    curves: Annotated[int, Option(help="Layers whose curve of common directions is measured.")] = 16,
    processes: Annotated[
        int | None, Option(help="Processes that share the layers (default: one per core, or one with a GPU).")
    ] = None,
    device: Device = "cpu",
    memory_budget: MemoryBudget = None,
    base: Base = None,
    common: Common = False,
    rank: Rank = None,
    alpha: Alpha = None,
    layers: Layers = None,
    transposed: Transposed = None,
    rename: Renames = None,
    formats: TableFormats = None,
    as_json: Json = False,
) -> None:
    """Compare many adapters: clusters by principal angles, common directions, outliers; an HTML page and tables.

    A member that cannot be read is named and left out, and the others are read.

    Exit codes: 0 done, 2 wrong or missing input, 130 interrupted.
    """
    from manifold_cl.cli.analysis_package import analysis

    require_adapters(paths, "a folder of adapters, or several adapters", base=base)
    validate_out(out)
    validate_device(device)
    endings = file_endings(formats)
    options = reading_options(alpha, rename, base=base, common=common, rank=rank, layers=layers, transposed=transposed)
    budget = parse_bytes(memory_budget) if memory_budget is not None else analysis.many.MEMORY_BUDGET
    with counting("layers") as count:
        collection = analysis.AdapterCollection.load(*paths, **options)
        if processes is None:
            processes = analysis.many.usable_processes() if device == "cpu" else 1
        tables = collection.measure(
            side=side.value,
            device=device,
            processes=processes,
            memory_budget=budget,
            curves=curves,
            clusters=clusters,
            progress=count,
        )
        written = _write(out, tables, endings)
    _print_results(out, tables, written, as_json=as_json)


def _write(out: Path, tables: analysis.many.CollectionTables, endings: Sequence[str]) -> dict[str, Path]:
    """Write page and tables, all or none; the path of each."""
    from manifold_cl.cli.analysis_package import analysis

    with replacing_results(out, TABLES) as folder:
        written = {"report": analysis.report.write_many_report(folder / "report.html", tables)}
        written |= write_tables(folder, {name: getattr(tables, name) for name in TABLES}, endings)
    return {key: out / path.name for key, path in written.items()}


def _print_results(
    out: Path, tables: analysis.many.CollectionTables, written: Mapping[str, Path], *, as_json: bool
) -> None:
    """Print what was left out, the findings, and where things were written."""
    from manifold_cl.cli.analysis_package import analysis

    for name, reason in tables.left_out:
        screen.say(("left out:", "yellow"), f" {name}: {reason}")
    print_notices(tables.notices)
    findings = analysis.report.many_findings(tables)
    if as_json:
        left_out = [{"task": name, "file": "", "tensor": "", "reason": reason} for name, reason in tables.left_out]
        counts = {"members": len(tables.names), "clusters": int(tables.tree.clusters.max()), "pairs": len(tables.pairs)}
        counts["related_pairs"] = tables.related_pairs
        outliers = list(dict.fromkeys(tables.found_outliers["member"]))
        further = counts | {"outliers": outliers}
        print_summary(out, written, findings, notices=tables.notices, left_out=left_out, further=further)
        return
    _print_clusters(tables)
    for finding in findings:
        Screen().say((finding["headline"], "bold"), f" {finding['detail']}")
    print_paths(written)


def _print_clusters(tables: analysis.many.CollectionTables) -> None:
    """Print one row per cluster: its size, mean overlap inside, and the first members."""
    rows = []
    for number in range(1, min(12, int(tables.tree.clusters.max())) + 1):
        inside = [index for index, cluster in enumerate(tables.tree.clusters) if cluster == number]
        block = tables.overlap[inside][:, inside]
        mean = (block.sum() - len(inside)) / (len(inside) * (len(inside) - 1))
        names = [tables.names[index] for index in inside]
        rows.append((str(number), listed(names), str(len(inside)), f"{mean:.3f}"))
    if rows:
        headings = ("cluster", "members", "size", "overlap")
        print_table("clusters by principal angles", headings, rows, leading=2)
