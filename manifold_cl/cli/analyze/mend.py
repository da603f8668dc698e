"""``manifold-cl analyze mend``: interventions that are applied to adapters, with a table of before and after."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

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
    reading_options,
    write_tables,
)
from manifold_cl.cli.analyze.stream_evaluation import EvaluateOn
from manifold_cl.cli.model_data import Data, Examples, Model, read_model_data
from manifold_cl.cli.options import Device, Json, Memory, Renames, require_path, validate_device, validate_new

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor, nn

    from manifold_cl.cli.analysis_package import analysis

STRENGTHS: dict[str, float | None] = {
    "flatten": 1.0,
    "sharpen": 0.5,
    "truncate": None,
    "intruders": 0.25,
    "sensitivity": 0.5,
    "project": 1.0,
    "rotate": 1.0,
}
"""Intervention to the strength that it has where none is given; ``truncate`` needs a rank."""
WEIGHTS_ONLY = "weights do not show scores: evaluate the adapter before and after (--evaluate, --stream)"
UNCHANGED = 1e-6
"""Relative change up to which an adapter counts as unchanged: the rounding of float32 factors."""
NEEDS = {"intruders": "--base", "sensitivity": "--model and --data", "project": "--memory", "rotate": "--memory"}


@dataclass(frozen=True)
class Step:
    """An intervention and its strength."""

    name: str
    strength: float

    def __str__(self) -> str:
        """As it is typed."""
        return f"{self.name}={self.strength:g}"


def mend(
    paths: Annotated[list[Path], Argument(help="Adapters of any format, in the order of their tasks.")],
    apply: Annotated[
        list[str],
        Option(
            metavar="NAME[=STRENGTH]",
            help="flatten, sharpen, truncate=RANK, intruders (with --base), sensitivity (with --model and --data), "
            "project or rotate (off --memory); strengths are 0 to 1. Repeatable, in this order.",
        ),
    ],
    out: Annotated[Path, Option(help="New folder for the changed adapter, tables and report.")] = Path("mended"),
    memory: Memory = None,
    base: Base = None,
    model: Model = None,
    data: Data = None,
    examples: Examples = 128,
    evaluate: Evaluate = None,
    stream: EvaluateOn = None,
    max_drop: MaxDrop = 0.0,
    lower_is_better: LowerIsBetter = False,
    tasks: TaskNames = None,
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
    """Change adapters, and write them with a table of before and after.

    `flatten`, `sharpen`, `truncate` and `sensitivity` keep each update's norm. `project` takes the part on protected
    inputs away; `rotate` moves it to free inputs at the same spectrum. Layers that --layers does not find are written
    as read.

    Exit codes: 0 done, 2 wrong or missing input, 3 the evaluation fails, 130 interrupted.
    """
    from manifold_cl.cli.analysis_package import analysis

    steps = parse_steps(apply, {"--base": base, "--memory": memory, "--model and --data": model and data})
    validate_new(out)
    validate_device(device)
    bounds: dict[str, Any] = {"max_drop": max_drop, "lower_is_better": lower_is_better, "device": device}
    evaluator = Evaluator(evaluate, stream, paths, model=model, **bounds)
    if memory is not None:
        require_path(memory, "for --memory a folder with memory.safetensors")
    options = reading_options(alpha, rename, base=base, common=common, rank=rank, transposed=transposed)
    before = read_adapters(paths, tasks=tasks, options=options)
    checkpoint = analysis.Checkpoint.load(base).renamed(options["rename"]) if base is not None else None
    protected = _protected(before, memory)
    given = read_model_data(evaluator.model_for(data), data, examples=examples, device=device)
    effects = partial(_effects, given=given)
    changed, tables = _applied(before, steps, set(chosen_layers(before, layers)), checkpoint, protected, effects)
    with analysis.files.new_folder(out) as folder:
        written = analysis.changes.write_changed(folder, before, changed, dtype=torch_type(dtype))
        changes = analysis.change_table(before, written, protected=protected or None)
        scores = evaluator(before, written, folder)
        findings = _findings(steps, changes, tables) + loss_findings(before, written, given)
        findings += [scores.sentence] if scores else [WEIGHTS_ONLY] if given is None else []
        write_tables(folder, {"changes": changes, **tables})
        _write_page(folder, before, written, changes, findings, tables)
    further = {"applied": [str(step) for step in steps], "evaluation": scores and scores.to_dict()}
    print_results(out, before, changes, findings, further, as_json=as_json)
    close_gate(scores)


def _applied(
    before: analysis.AdapterSet,
    steps: Sequence[Step],
    layers: set[str],
    base: analysis.Checkpoint | None,
    protected: Mapping[str, Any],
    effects: Callable[[analysis.AdapterSet], pd.DataFrame],
) -> tuple[analysis.AdapterSet, dict[str, pd.DataFrame]]:
    """The adapters after all interventions on these layers, and the tables that decided what changed."""
    from manifold_cl.cli.analysis_package import analysis

    changed, tables = before, cast("dict[str, pd.DataFrame]", {})
    on = {layer: basis for layer, basis in protected.items() if layer in layers}
    for step in steps:
        action, table = _action(step, base, on, partial(effects, changed))
        changed = analysis.changes.for_layers(changed, action, layers)
        tables |= table
    return changed, tables


def parse_steps(texts: Sequence[str], given: Mapping[str, object]) -> list[Step]:
    """The interventions; ValueError for one that needs an option that is not among the `given`."""
    steps = [parse_step(text) for text in texts]
    for step in steps:
        needed = NEEDS.get(step.name)
        if needed is not None and not given[needed]:
            raise ValueError(f"--apply {step.name} needs {needed}")
    return steps


def parse_step(text: str) -> Step:
    """The intervention in ``NAME`` or ``NAME=STRENGTH``.

    >>> parse_step("flatten"), str(parse_step("truncate=4"))
    (Step(name='flatten', strength=1.0), 'truncate=4')
    """
    name, separator, number = text.partition("=")
    if name not in STRENGTHS:
        raise ValueError(f"--apply {text!r} is unknown: choose from {', '.join(STRENGTHS)}")
    strength = STRENGTHS[name]
    if separator:
        try:
            strength = float(number)
        except ValueError:
            raise ValueError(f"--apply {text!r}: {number!r} is no number") from None
    if strength is None:
        raise ValueError(f"--apply {name} needs a rank, such as {name}=8")
    if name == "truncate" and not (strength >= 1 and strength == int(strength)):
        raise ValueError(f"--apply {text!r}: a rank is a whole number of at least 1")
    if name != "truncate" and not 0 <= strength <= 1:
        raise ValueError(f"--apply {text!r}: the strength lies between 0 and 1")
    return Step(name, strength)


def _action(
    step: Step, base: analysis.Checkpoint | None, protected: dict[str, Any], effects: Callable[[], pd.DataFrame]
) -> tuple[Callable[[analysis.AdapterSet], analysis.AdapterSet], dict[str, pd.DataFrame]]:
    """A function from adapters to changed ones, and the tables that decide what changes."""
    from manifold_cl.cli.analysis_package import analysis

    match step.name:
        case "flatten" | "sharpen":
            function = analysis.flattened if step.name == "flatten" else analysis.sharpened
            return partial(function, gamma=step.strength), {}
        case "truncate":
            return partial(analysis.truncated, rank=int(step.strength)), {}
        case "intruders":
            assert base is not None  # NEEDS was verified
            return partial(analysis.changes.intruders_shrunk, base=base, share=step.strength), {}
        case "sensitivity":
            table = effects()
            return partial(analysis.changes.reweighted, table=table, gamma=step.strength), {"sensitivity": table}
    moved = analysis.projected_off if step.name == "project" else analysis.rotated_away
    return partial(moved, protected=protected, gamma=step.strength), {}


def _effects(
    adapters: analysis.AdapterSet, given: tuple[nn.Module, Mapping[str, list[dict[str, Tensor]]]] | None
) -> pd.DataFrame:
    """Effects of all components on the loss of the examples in all files of ``--data``."""
    from manifold_cl.cli.analysis_package import analysis

    assert given is not None  # NEEDS was verified
    network, named = given
    batches = [batch for each in named.values() for batch in each]
    measure = analysis.activations.component_effects
    return analysis.changes.effect_table({task: measure(network, adapters, task, batches) for task in adapters.tasks})


def _protected(adapters: analysis.AdapterSet, memory: Path | None) -> dict[str, Any]:
    """Bases of the memory by the adapters' names of their layers."""
    from manifold_cl.cli.analysis_package import analysis

    if memory is None:
        return {}
    bases = analysis.read_protected(memory)
    names = analysis.names.matched_names(adapters.layers, bases)
    if not names:
        raise ValueError(f"--memory {memory} protects none of the layers, such as {adapters.layers[0]}")
    return {layer: bases[name] for layer, name in names.items()}


def _findings(steps: Sequence[Step], changes: pd.DataFrame, tables: dict[str, pd.DataFrame]) -> list[str]:
    """Sentences about what was done."""
    total = changes[changes["layer"] == "total"]
    sentences = []
    for task, rows in total.groupby("task", sort=False):
        values = rows.set_index("metric")
        change, cosine = values["after"]["relative_change"], values["after"]["cosine"]
        applied = f"{task}: {', '.join(map(str, steps))}"
        text = f"{applied} changed the update by {change:.1%} of its norm (cosine {cosine:.3f})"
        if change < UNCHANGED:
            text = f"{applied} changed nothing: its strength is 0, no layer has a higher rank, or no direction counts"
        if "leakage" in values.index:
            old, new = values["before"]["leakage"], values["after"]["leakage"]
            text += f"; its energy on protected inputs went from {old:.2%} to {new:.2%}"
        sentences.append(text)
    if "sensitivity" in tables:
        table = tables["sensitivity"]
        sure = table[table["p_holm"] < 0.05]
        sentences.append(
            f"{len(sure)} of {len(table)} components have an effect on the loss beyond chance (Holm, 5 %): "
            f"{int((sure['effect'] > 0).sum())} shrank, {int((sure['effect'] < 0).sum())} grew"
        )
    return sentences


def _write_page(
    folder: Path,
    before: analysis.AdapterSet,
    written: analysis.AdapterSet,
    changes: pd.DataFrame,
    findings: list[str],
    tables: dict[str, pd.DataFrame],
) -> None:
    from manifold_cl.cli.analysis_package import analysis

    picture = analysis.report.Picture
    single = changes[(changes["metric"] == "relative_change") & (changes["layer"] != "total")]
    moved = single.assign(metric="relative change", update="task", value=single["after"])
    pictures = [
        spectra_picture(before, written, "change"),
        picture(analysis.plots.plot_entropy_map(moved, metric="relative change"), findings[0], "Change per layer."),
    ]
    analysis.report.write_change_report(
        folder / "report.html",
        changes,
        title=f"{', '.join(before.tasks)}: before and after",
        findings=findings,
        pictures=pictures,
        notices=before.notices,
        extra={"Effects of components on the loss": tables["sensitivity"]} if "sensitivity" in tables else None,
    )
