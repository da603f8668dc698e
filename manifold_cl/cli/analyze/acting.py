"""Options and steps that `suggest` and `mend` share: both write changed adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from manifold_cl.cli.analyze.reading import print_findings, print_notices, print_paths, require_adapters
from manifold_cl.cli.analyze.summary import entries, print_summary
from manifold_cl.cli.options import split_names
from manifold_cl.cli.screen import print_table

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from torch import Tensor, nn

    from manifold_cl.cli.analysis_package import analysis


class StoredType(StrEnum):
    """A type of stored factors."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


Stored = Annotated[StoredType, Option("--dtype", help="Type in which the factors are stored.")]


def read_adapters(paths: Sequence[Path], *, tasks: str | None, options: dict[str, Any]) -> analysis.AdapterSet:
    """The adapters, with their notices printed; one per task names what a changed adapter keeps beside its factors."""
    from manifold_cl.cli.analysis_package import analysis

    require_adapters(paths, "an adapter folder or file, or a run folder", base=options["base"])
    adapters = analysis.AdapterSet.load(*paths, tasks=split_names(tasks), **options)
    copied = [
        f"{source.task}: copied into the new adapter: {analysis.names.listed(list(tensors))}"
        for source in adapters.sources
        if (tensors := analysis.formats.carried_over(source).tensors)
    ]
    adapters = replace(adapters, notices=(*adapters.notices, *copied))
    print_notices(adapters.notices)
    return adapters


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


def loss_findings(
    before: analysis.AdapterSet,
    after: analysis.AdapterSet,
    given: tuple[nn.Module, Mapping[str, Sequence[Mapping[str, Tensor]]]] | None,
) -> list[str]:
    """Sentences about the change of the examples' losses, pair by pair; none where they have no labels."""
    from manifold_cl.cli.analysis_package import analysis

    if given is None:
        return []
    network, named = given
    batches = [batch for each in named.values() for batch in each if "labels" in batch]
    sentences = []
    for task in before.tasks if batches else ():
        pair = [analysis.activations.example_losses(network, each, task, batches) for each in (before, after)]
        rise = (pair[1] - pair[0]).cpu().numpy()
        low, high = analysis.bootstrap_interval(rise)
        sentences.append(
            f"{task}: the loss of these {len(rise)} examples goes from {pair[0].mean():.4f} to {pair[1].mean():.4f}, "
            f"a change of {rise.mean():+.4f} (95% interval {low:+.4f} to {high:+.4f})"
        )
    return sentences


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


def print_results(
    out: Path,
    before: analysis.AdapterSet,
    changes: pd.DataFrame,
    findings: Sequence[str],
    further: Mapping[str, Any],
    *,
    as_json: bool,
) -> None:
    """Print what changed, what was found, and where the adapter is; or the summary as JSON."""
    paths = {"adapter": out, "report": out / "report.html"}
    if as_json:
        paths |= {path.stem: path for path in sorted(out.glob("*.csv"))}
        left_out = entries(before.left_out)
        print_summary(out, paths, findings, notices=before.notices, left_out=left_out, further=further)
        return
    print_changes(changes)
    print_findings(findings)
    print_paths(paths)


def spectra_picture(before: analysis.AdapterSet, after: analysis.AdapterSet, change: str) -> analysis.report.Picture:
    """The figure of singular values before and after a change."""
    from manifold_cl.cli.analysis_package import analysis

    spectra = {label: analysis.singular_values(each) for label, each in (("before", before), ("after", after))}
    return analysis.report.Picture(
        analysis.plots.spectra_panels(spectra, columns=1),
        f"Singular values before and after the {change}, median over layers",
        "Singular values before and after, relative to a flat spectrum of the same norm.",
    )
