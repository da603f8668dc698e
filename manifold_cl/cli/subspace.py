"""``manifold-cl subspace``: build protected subspaces from a stream's tasks, look at them, check them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

import typer
from rich.progress import BarColumn, SpinnerColumn, TimeElapsedColumn
from rich.table import Table

from manifold_cl.adapters import read_adapters
from manifold_cl.adapters.inject import merge_factors
from manifold_cl.adapters.layers import device_of, target_linears
from manifold_cl.cli.screen import Commands, Words, bars, check_device, check_out, output, screen
from manifold_cl.continual import SubspaceMemory
from manifold_cl.continual.losses import task_losses
from manifold_cl.continual.subspaces import START, Passes, PassReport, Policy, grow_memory, grow_memory_from_weights
from manifold_cl.files import FileError
from manifold_cl.geometry.subspace import ThresholdRule
from manifold_cl.streams import open_stream

subspace = Commands(
    no_args_is_help=True,
    help="Protected subspaces: build them from tasks, look at them, check them.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

BATCH = 16
TOLERANCE = 1e-5
"""Largest ``|FᵀF − I|`` that passes: ten times what fifty growths leave in float32."""


@subspace.command()
def build(
    out: Annotated[Path, typer.Option(help="Folder for memory.safetensors and memory.json.")],
    stream: Annotated[str, typer.Option(help="Stream whose model and tasks are read.")] = "text-six",
    tasks: Annotated[str | None, typer.Option(help="Tasks by name with commas, in this order (default: all).")] = None,
    source: Annotated[
        str, typer.Option(help="sensitivity, activation or gradient; several joined by + for their union.")
    ] = "sensitivity",
    energy: Annotated[float, typer.Option(help="Share of each task's energy to hold, in (0, 1].")] = 0.97,
    rank: Annotated[int, typer.Option(help="Directions to keep free for an adapter in every layer.")] = 16,
    weights: Annotated[
        float | None, typer.Option(help="Protect this share of the pre-trained weights' energy first (0.6 is usual).")
    ] = None,
    policy: Annotated[str, typer.Option(help="Where a layer is full: stop, evict or raise.")] = "stop",
    threshold_rule: Annotated[
        str, typer.Option(help="Protect the column that crosses the threshold (inclusive) or not (exclusive).")
    ] = "inclusive",
    memory: Annotated[Path | None, typer.Option(help="Folder of a memory to grow, instead of an empty one.")] = None,
    adapters: Annotated[
        list[Path] | None, typer.Option(help="Adapter folder to merge into the model first; repeat in order.")
    ] = None,
    examples: Annotated[int, typer.Option(help="Training examples a task that are read.")] = 160,
    size: Annotated[int, typer.Option(help="Size that sketches of wide layers start from.")] = START,
    passes_per_sketch: Annotated[
        int | None, typer.Option(help="Passes over the data for a gradient sketch: 1 or 2.")
    ] = None,
    memory_budget: Annotated[
        float | None, typer.Option(help="MB that the statistics of one pass may take; more passes if need be.")
    ] = None,
    skip_nonfinite: Annotated[
        bool, typer.Option("--skip-nonfinite", help="Leave out batches with NaN instead of stopping.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of examples and test matrices.")] = 0,
    device: Annotated[str, typer.Option(help="Where the model runs, such as cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Read each task once at the present model, and protect what it relies on.

    The archives of a text stream are downloaded on first use.
    """
    check_device(device)
    check_out(out)
    if threshold_rule not in get_args(ThresholdRule):
        raise ValueError(f"--threshold-rule is {' or '.join(get_args(ThresholdRule))}, got {threshold_rule!r}")
    if passes_per_sketch not in (None, 1, 2):
        raise ValueError(f"--passes-per-sketch is 1 or 2, got {passes_per_sketch}")
    updates = [read_adapters(folder) for folder in adapters or []]  # before anything is downloaded or computed
    found = SubspaceMemory.load(memory) if memory else None
    out.mkdir(parents=True, exist_ok=True)
    chosen = open_stream(stream, tasks=[name.strip() for name in tasks.split(",")] if tasks else None)
    model = chosen.make_model().to(device)
    for update in updates:
        merge_factors(model, update)
    layers = target_linears(model, chosen.targets)
    if found is None:
        found = SubspaceMemory.empty(layers)
    found.require_fit(model)
    found = found.to(device_of(layers))
    chosen_policy = cast(Policy, policy)
    if weights is not None:
        found = grow_memory_from_weights(found, layers, rank=rank, energy=weights, policy=chosen_policy)
    history: list[dict[str, Any]] = []
    for task in chosen.tasks:
        batches = math.ceil(min(examples, task.size("train")) / BATCH)
        readings: list[PassReport] = []
        with _bar(task.name, batches) as on_batch:
            found = grow_memory(
                found,
                layers,
                task_losses(model, task, examples=examples, batch_size=BATCH, seed=seed),
                source=source,
                energy=energy,
                rank=rank,
                policy=chosen_policy,
                threshold_rule=cast(ThresholdRule, threshold_rule),
                task=task.name,
                passes=Passes(
                    size=size,
                    seed=seed,
                    memory_budget=None if memory_budget is None else int(memory_budget * 1e6),
                    per_sketch=cast(Literal[1, 2] | None, passes_per_sketch),
                    on_nonfinite="skip" if skip_nonfinite else "raise",
                    on_batch=on_batch,
                    on_pass=readings.append,
                ),
            )
        skipped = sorted({batch for reading in readings for batch in (*reading.skipped, *reading.excluded)})
        if skipped:
            screen.say((f"{task.name}: left out batches {skipped}, whose values are not finite", "yellow"))
        history.append(
            {
                "task": task.name,
                "passes": len(readings),
                "skipped_batches": skipped,
                "layers": {name: found.growth[name].plain() for name in layers},
            }
        )
    found = found.signed(model, layers)
    found.save(out, energy=energy, source=source, stream=chosen.name, task=chosen.tasks[-1].name)
    if as_json:
        print(json.dumps({"folder": str(out), "tasks": list(found.tasks), "history": history}, indent=1))
        return
    _print(found)
    screen.say(f"written to {out}")


@subspace.command()
def info(
    folder: Annotated[Path, typer.Argument(help="Folder with memory.safetensors and memory.json.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """What a memory protects, layer by layer, from its manifest alone."""
    memory = SubspaceMemory.load(folder, lazy=True)
    if as_json:
        print(json.dumps({"folder": str(folder), **_summary(memory)}, indent=1))
        return
    _print(memory)


@subspace.command()
def check(
    folder: Annotated[Path, typer.Argument(help="Folder with memory.safetensors and memory.json.")],
    stream: Annotated[str | None, typer.Option(help="Also check that it fits this stream's model.")] = None,
    rank: Annotated[int | None, typer.Option(help="Also check that adapters of this rank have room.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Read everything, and list what is wrong: damage, columns that are not orthonormal, no room, another model."""
    memory = SubspaceMemory.load(folder)
    error = memory.max_error()
    problems = [] if error <= TOLERANCE else [f"columns are not orthonormal: max|FᵀF − I| = {error:.1e}"]
    if rank is not None:
        free = {name: n - k for name, (n, k) in memory.shapes().items()}
        problems += [
            f"{name}: {left} free directions, too few for rank {rank}" for name, left in free.items() if left < rank
        ]
    if stream is not None:
        problems += memory.differences(open_stream(stream).make_model())
    if as_json:
        content = {"folder": str(folder), "orthonormality": error, "problems": problems}
        print(json.dumps(content, indent=1))
    if problems:
        shown = "; ".join(problems[:5]) + (" …" if len(problems) > 5 else "")
        raise FileError(f"{folder}: {len(problems)} problems: {shown}")
    if not as_json:
        said = f"{len(memory)} layers, intact, orthonormal to {error:.0e}"
        screen.say(f"{folder}: {said}")


@contextmanager
def _bar(task: str, batches: int) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, a pass at a time; nothing elsewhere."""
    columns = (SpinnerColumn(), Words("{task.description}", "bold"), BarColumn(), TimeElapsedColumn())
    with bars(*columns) as progress:
        bar = progress.add_task(task, total=batches)

        def show(count: int, batch: int) -> None:
            progress.update(bar, description=f"{task}, pass {count}", completed=batch)

        yield show


def _summary(memory: SubspaceMemory) -> dict[str, Any]:
    shapes = memory.shapes()
    return {
        "tasks": list(memory.tasks),
        "full": list(memory.full),
        "model": None if memory.signature is None else memory.signature.model,
        "protected_share": sum(k for _, k in shapes.values()) / sum(n for n, _ in shapes.values()),
        "layers": {
            name: memory.growth[name].plain() if name in memory.growth else {"n": n, "k": k}
            for name, (n, k) in shapes.items()
        },
    }


def _print(memory: SubspaceMemory) -> None:
    shapes = memory.shapes()
    model = f", {memory.signature.model}" if memory.signature else ""
    title = f"protected subspaces: {', '.join(memory.tasks) or 'no task recorded'}{model}"
    caption = (
        "added, before, held: columns of the last task, the share of its energy that was held before and is held now · "
        "left: directions that may still be protected · forecast: tasks until full"
    )
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for column in ("layer", "inputs", "protected", "added", "before", "held", "left", "forecast"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for name, (n, k) in shapes.items():
        growth = memory.growth.get(name)
        said = (
            ("–",) * 5
            if growth is None
            else (
                f"{growth.added}",
                f"{growth.before:.3f}",
                f"{growth.explained:.3f}",
                f"{growth.capacity_left}",
                "full" if name in memory.full else f"{growth.tasks_left:.1f}",
            )
        )
        table.add_row(name, f"{n}", f"{k} ({100 * k / n:.0f} %)", *said)
    output(120).print(table)
