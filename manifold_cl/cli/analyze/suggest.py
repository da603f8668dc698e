"""``manifold-cl analyze suggest``: ranks that keep a share of an update, and the compressed adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from manifold_cl.cli.analyze.acting import (
    Stored,
    StoredType,
    chosen_layers,
    loss_findings,
    print_results,
    read_adapters,
    spectra_picture,
    torch_type,
)
from manifold_cl.cli.analyze.evaluation import Evaluate
from manifold_cl.cli.analyze.gate import Evaluator, LowerIsBetter, MaxDrop, close_gate
from manifold_cl.cli.analyze.reading import (
    Alpha,
    Base,
    Common,
    Layers,
    Rank,
    TaskNames,
    Transposed,
    counting,
    print_notices,
    reading_options,
    write_tables,
)
from manifold_cl.cli.analyze.stream_evaluation import EvaluateOn
from manifold_cl.cli.model_data import Data, Examples, Model, read_model_data
from manifold_cl.cli.options import Device, Json, Renames, validate_device, validate_new
from manifold_cl.rules import validate_share

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor, nn

    from manifold_cl.cli.analysis_package import analysis

    ModelData = tuple[nn.Module, dict[str, list[dict[str, Tensor]]]]

LEVEL = 0.98
"""Level of the interval of the share that new examples keep."""
WITHOUT_SCORES = (
    "energy is no score: give --model and --data for the effect on outputs, --evaluate or --stream for scores"
)


def suggest(
    paths: Annotated[list[Path], Argument(help="Adapters of any format, in the order of their tasks.")],
    out: Annotated[Path, Option(help="New folder for the compressed adapter, tables and report.")] = Path("compressed"),
    keep: Annotated[float, Option(help="Share of the update that every layer keeps, above 0 and at most 1.")] = 0.95,
    uniform: Annotated[bool, Option("--uniform", help="Write one rank for all layers: the largest needed.")] = False,
    model: Model = None,
    data: Data = None,
    examples: Examples = 256,
    level: Annotated[
        float | None, Option(help="Level of the interval of the share that new examples keep (default: 0.98).")
    ] = None,
    evaluate: Evaluate = None,
    stream: EvaluateOn = None,
    max_drop: MaxDrop = 0.0,
    lower_is_better: LowerIsBetter = False,
    tasks: TaskNames = None,
    base: Base = None,
    common: Common = False,
    rank: Rank = None,
    alpha: Alpha = None,
    layers: Layers = None,
    transposed: Transposed = None,
    rename: Renames = None,
    dtype: Stored = StoredType.FLOAT32,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Suggest a rank per layer, and write the compressed adapter, which PEFT loads.

    The rank is the smallest that keeps --keep of the update's energy. With --model and --data it is the smallest
    that keeps this share of what the update adds to the layer's outputs, with an interval for new examples. Layers that
    --layers does not find are written as read.

    Exit codes: 0 done, 2 wrong or missing input, 3 the evaluation fails, 130 interrupted.
    """
    from manifold_cl.cli.analysis_package import analysis

    validate_new(out)
    validate_device(device)
    bounds: dict[str, Any] = {"max_drop": max_drop, "lower_is_better": lower_is_better, "device": device}
    evaluator = Evaluator(evaluate, stream, paths, model=model, **bounds)
    level = _level(level, data)
    options = reading_options(alpha, rename, base=base, common=common, rank=rank, transposed=transposed)
    adapters = read_adapters(paths, tasks=tasks, options=options)
    given = read_model_data(evaluator.model_for(data), data, examples=examples, device=device)
    moments = _moments(adapters, given)
    with counting("layers") as count:
        suggestion = analysis.suggest_ranks(
            adapters, keep, moments=moments, layers=chosen_layers(adapters, layers), level=level, progress=count
        )
    with analysis.files.new_folder(out) as folder:
        after = suggestion.compressed(uniform=uniform)
        written = analysis.changes.write_changed(folder, adapters, after, dtype=torch_type(dtype))
        changes = analysis.change_table(adapters, written)
        _verify(suggestion, changes)
        scores = evaluator(adapters, written, folder)
        findings = _findings(suggestion, level, uniform=uniform) + loss_findings(adapters, written, given)
        findings += [scores.sentence] if scores else [WITHOUT_SCORES] if given is None else []
        write_tables(folder, {"ranks": suggestion.table, "curve": suggestion.curve, "changes": changes})
        _write_page(folder, suggestion, written, changes, findings)
    now, per_layer, one = suggestion.parameters
    parameters = {"before": now, "per_layer": per_layer, "uniform": one}
    summary = {"uniform_rank": suggestion.uniform_rank, "parameters": parameters}
    further = summary | {"evaluation": scores and scores.to_dict()}
    print_results(out, adapters, changes, findings, further, as_json=as_json)
    close_gate(scores)


def _level(level: float | None, data: list[str] | None) -> float:
    """The level, or that without the option; ValueError without examples or outside (0, 1)."""
    if level is None:
        return LEVEL
    if not data:
        raise ValueError(f"--level {level:g} is for the interval over examples: give --model and --data")
    validate_share("--level", level, one=False)
    return level


def _moments(adapters: analysis.AdapterSet, given: ModelData | None) -> analysis.activations.InputMoments | None:
    """Moments of the inputs on all files of ``--data`` together; None without them."""
    from manifold_cl.cli.analysis_package import analysis

    if given is None:
        return None
    network, named = given
    batches = [batch for each in named.values() for batch in each]
    with counting("batches") as count:
        moments = analysis.activations.input_moments(
            network, adapters, batches, progress=lambda done: count(done, len(batches))
        )
    print_notices(f"{layer} stays as it is: {reason}" for layer, reason in moments.left_out.items())
    return moments


def _verify(suggestion: analysis.RankSuggestion, changes: pd.DataFrame) -> None:
    """Raise ValueError for a written adapter whose rounding took a layer's energy below the share."""
    if suggestion.criterion == "drift":
        return
    lost = changes[changes["metric"] == "relative_change"].set_index(["task", "layer"])["after"] ** 2
    short = lost.reindex(list(zip(suggestion.table["task"], suggestion.table["layer"], strict=True)))
    short = short[short > 1 - suggestion.keep + 1e-6]  # rounding of float32
    if len(short):
        task, layer = short.index[0]
        raise ValueError(
            f"{task}, {layer} keeps {1 - short.iloc[0]:.6f} of its energy after rounding, below --keep "
            f"{suggestion.keep}: store float32 (--dtype float32), or keep a little more"
        )


def _findings(suggestion: analysis.RankSuggestion, level: float, *, uniform: bool) -> list[str]:
    """Sentences about the ranks."""
    table = suggestion.table
    now, per_layer, one = suggestion.parameters
    what = "energy" if suggestion.criterion == "energy" else "effect on the outputs"
    low, high = int(table["rank"].min()), int(table["rank"].max())
    ranks = f"rank {low} keeps" if low == high else f"ranks {low} to {high}, median {table['rank'].median():g}, keep"
    sentences = [
        f"{ranks} {suggestion.keep:.1%} of the update's {what} in every one of {len(table)} layers: "
        f"{per_layer / now:.0%} of the present {now:,} numbers",
        f"one rank for all layers is {suggestion.uniform_rank}: {one / now:.0%} of the present numbers",
    ]
    if suggestion.criterion == "drift":
        worst = table.iloc[int(table["ci_low"].argmin())]
        sentences.append(
            f"least sure is {worst['layer']}: it keeps {worst['kept']:.1%}, and on as many new examples "
            f"{worst['ci_low']:.1%} to {worst['ci_high']:.1%} ({level:.0%} interval)"
        )
    return [f"{each}{' (written)' if number == uniform else ''}" for number, each in enumerate(sentences)]


def _write_page(
    folder: Path,
    suggestion: analysis.RankSuggestion,
    written: analysis.AdapterSet,
    changes: pd.DataFrame,
    findings: list[str],
) -> None:
    from manifold_cl.cli.analysis_package import analysis

    table = suggestion.table
    picture = analysis.report.Picture
    curve = analysis.plots.plot_kept_share(suggestion.curve, keep=suggestion.keep, rank=suggestion.uniform_rank)
    ranks = table.assign(metric="suggested rank", update="task", value=table["rank"].astype(float))
    per_layer = analysis.plots.plot_entropy_map(ranks, metric="suggested rank")
    pictures = [
        picture(curve, findings[1], "Share of the update lost per rank. The band holds the middle 80 % of layers."),
        picture(per_layer, findings[0], "Suggested rank per layer."),
        spectra_picture(suggestion.adapters, written, "compression"),
    ]
    notices, extra = suggestion.adapters.notices, {"Suggested ranks": table}
    title = f"{', '.join(suggestion.adapters.tasks)}: suggested ranks"
    page = folder / "report.html"
    analysis.report.write_change_report(
        page, changes, title=title, findings=findings, pictures=pictures, notices=notices, extra=extra
    )
