"""``manifold-cl subspace``: protected subspaces, built from tasks, shown and verified."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args

from typer import Argument, Option

from manifold_cl import adapters as layers_of_adapters
from manifold_cl import continual
from manifold_cl.cli.options import (
    Commands,
    Device,
    Json,
    Memory,
    MemoryBudget,
    Seed,
    Stream,
    Tasks,
    at_least,
    parse_bytes,
    require_path,
    split_names,
    validate_device,
    validate_out,
)
from manifold_cl.cli.screen import Screen, bars, print_table, screen
from manifold_cl.lists import listed

if TYPE_CHECKING:
    from torch import nn

    from manifold_cl.continual import Passes, SubspaceMemory, Task, TaskStream
    from manifold_cl.continual.subspaces import PassReport

commands = Commands(help="Protected subspaces: build them from tasks, show them, verify them.")

MEMORY = "memory.safetensors"
"""The file in a folder of protected subspaces."""
DEFAULT_STREAM = "text-six"
BATCH = 16
"""Examples per batch."""
TOLERANCE = 1e-5
"""Largest ``|FᵀF − I|`` of intact subspaces: ten times that after fifty growths in float32."""

Source = Annotated[str, Option(help="sensitivity, activation or gradient; join several with + to protect their union.")]
Weights = Annotated[
    float | None, Option(help="Share of the pre-trained weights' energy to protect first, such as 0.6.")
]
Rule = Annotated[str, Option(help="Protect the column that crosses the threshold (inclusive) or not (exclusive).")]
Adapters = Annotated[
    list[Path] | None,
    Option(metavar="FOLDER", help="Adapter folder to merge into the model first; repeat the option in order."),
]
LanguageModel = Annotated[
    str | None, Option("--model", help="Causal language model in place of a stream's: a folder, or a name on the hub.")
]
Data = Annotated[
    list[Path] | None,
    Option("--data", metavar="FILE", help="JSONL file whose rows --model reads, or a folder of tasks; repeatable."),
]
SkipNonfinite = Annotated[bool, Option("--skip-nonfinite", help="Leave out batches with NaN instead of stopping.")]
MemoryFolder = Annotated[Path, Argument(help=f"Folder with {MEMORY}.")]


@commands.command()
def build(
    out: Annotated[Path, Option(help="Folder for the protected subspaces.")],
    stream: Stream = DEFAULT_STREAM,
    model: LanguageModel = None,
    data: Data = None,
    tasks: Tasks = None,
    source: Source = "sensitivity",
    energy: Annotated[float, Option(help="Share of each task's energy to protect, in (0, 1].")] = 0.97,
    rank: Annotated[
        int, Option(callback=at_least(0), help="Directions to keep free in every layer: the rank of the adapters.")
    ] = 16,
    weights: Weights = None,
    policy: Annotated[str, Option(help="What to do when a layer is full: stop, evict or raise.")] = "stop",
    threshold_rule: Rule = "inclusive",
    memory: Memory = None,
    adapters: Adapters = None,
    examples: Annotated[int, Option(callback=at_least(1), help="Training examples per task.")] = 160,
    size: Annotated[int, Option(callback=at_least(1), help="Initial size of the sketches of wide layers.")] = 128,
    passes_per_sketch: Annotated[int | None, Option(help="Passes over the data for a gradient sketch: 1 or 2.")] = None,
    memory_budget: MemoryBudget = None,
    skip_nonfinite: SkipNonfinite = False,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Measure the important directions of each task at the present model, and protect them.

    With --memory, the subspaces in that folder are grown; otherwise the first task starts from nothing. The first use
    of a text stream downloads its archives. With --model and --data, the tasks are rows of your own. Subspaces in --out
    are replaced unless a task would be lost.
    """
    _require_folders(adapters, memory)
    validate_out(out)
    validate_device(device)
    _validate_growth(threshold_rule, passes_per_sketch)
    opened = _opener(stream, split_names(tasks), model, data)
    passes = continual.Passes(
        size=size,
        seed=seed,
        memory_budget=None if memory_budget is None else parse_bytes(memory_budget),
        per_sketch=cast(Literal[1, 2] | None, passes_per_sketch),
        on_nonfinite="skip" if skip_nonfinite else "raise",
    )
    room: dict[str, Any] = {"rank": rank, "policy": policy}
    growth = {"source": source, "energy": energy, "threshold_rule": threshold_rule, **room}
    chosen, network, layers, subspaces = _opened(opened, adapters or [], memory, device)
    _refuse_loss(out, [*subspaces.tasks, *(task.name for task in chosen.tasks)])
    out.mkdir(parents=True, exist_ok=True)
    if weights is not None:
        subspaces = continual.grow_memory_from_weights(subspaces, layers, energy=weights, **room)
    history = []
    for task in chosen.tasks:
        losses = continual.task_losses(network, task, examples=examples, batch_size=BATCH, seed=seed)
        with _passes(task, examples, passes) as (observed, reports):
            subspaces = continual.grow_memory(subspaces, layers, losses, task=task.name, passes=observed, **growth)
        history.append(_entry(task.name, reports, {name: subspaces.growth[name].to_dict() for name in layers}))
    subspaces = subspaces.with_model(network, layers)
    subspaces.save(out, energy=energy, source=source, stream=chosen.name, task=chosen.tasks[-1].name)
    if as_json:
        print(json.dumps({"folder": str(out), "tasks": list(subspaces.tasks), "history": history}, indent=1))
        return
    _print(subspaces)
    Screen().say(f"written to {out}")


@commands.command()
def info(folder: MemoryFolder, as_json: Json = False) -> None:
    """Show what is protected in each layer, from the manifest alone."""
    require_path(folder, f"a folder with {MEMORY}")
    memory = continual.SubspaceMemory.load(folder, lazy=True)
    if as_json:
        print(json.dumps({"folder": str(folder), **_summary(memory)}, indent=1))
        return
    _print(memory)


@commands.command()
def check(
    folder: MemoryFolder,
    stream: Annotated[str | None, Option(help="Name of the stream whose model must fit.")] = None,
    rank: Annotated[
        int | None, Option(callback=at_least(1), help="Rank of the adapters that must fit in every layer.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Verify a folder of protected subspaces: files intact, columns orthonormal, room left, the right model."""
    from manifold_cl.files import FileError
    from manifold_cl.streams.user_streams import open_named

    require_path(folder, f"a folder with {MEMORY}")
    memory = continual.SubspaceMemory.load(folder)
    error = memory.max_error()
    problems = [] if error <= TOLERANCE else [f"columns are not orthonormal: max|FᵀF − I| = {error:.1e}"]
    if rank is not None:
        free = {name: n - k for name, (n, k) in memory.shapes().items()}
        problems += [
            f"{name}: {left} free directions, too few for rank {rank}" for name, left in free.items() if left < rank
        ]
    if stream is not None:
        problems += memory.differences(open_named(stream, code_folder=Path()).make_model())
    if as_json:
        print(json.dumps({"folder": str(folder), "orthonormality": error, "problems": problems}, indent=1))
    if problems:
        shown = listed(problems, 5, separator="; ")
        raise FileError(f"{folder}: {len(problems)} problems: {shown}")
    if not as_json:
        screen.say(f"{folder}: {len(memory)} layers, intact, orthonormal to {error:.0e}")


def _refuse_loss(out: Path, tasks: Sequence[str]) -> None:
    """Raise FileExistsError where subspaces in ``out`` protect a task that the new ones, of ``tasks``, do not."""
    from manifold_cl.files import FileError

    try:
        there = continual.SubspaceMemory.load(out, lazy=True).tasks
    except FileError:
        return  # there are none, or none that anybody can read
    if lost := [task for task in there if task not in tasks]:
        raise FileExistsError(
            f"--out is {out}, which protects {listed(lost)}: add --memory {out} to grow it, or choose another folder"
        )


def _require_folders(adapters: Sequence[Path] | None, memory: Path | None) -> None:
    for folder in adapters or ():
        require_path(folder, "for --adapters a folder with an adapter")
    if memory is not None:
        require_path(memory, f"for --memory a folder with {MEMORY}")


def _validate_growth(threshold_rule: str, passes_per_sketch: int | None) -> None:
    from manifold_cl.geometry.subspace import ThresholdRule

    if threshold_rule not in get_args(ThresholdRule):
        raise ValueError(f"--threshold-rule is {' or '.join(get_args(ThresholdRule))}, got {threshold_rule!r}")
    if passes_per_sketch not in (None, 1, 2):
        raise ValueError(f"--passes-per-sketch is 1 or 2, got {passes_per_sketch}")


def _opener(
    stream: str, tasks: Sequence[str] | None, model: str | None, data: Sequence[Path] | None
) -> Callable[[], TaskStream]:
    """A function that opens the stream, or the rows of ``data`` for ``model``."""
    from manifold_cl.streams import open_rows
    from manifold_cl.streams.user_streams import open_named

    if model is None and not data:
        return partial(open_named, stream, tasks, code_folder=Path())
    if model is None or not data:
        raise ValueError("--model and --data belong together: give the model, and the rows that it reads")
    if stream != DEFAULT_STREAM:
        raise ValueError(f"--stream {stream} has its own model and data: leave out --model and --data, or --stream")
    for path in data:
        require_path(path, "for --data a JSONL file, or a folder of tasks")
    return partial(open_rows, data, model, tasks=tasks)


def _opened(
    opened: Callable[[], TaskStream], adapters: Sequence[Path], memory: Path | None, device: str
) -> tuple[TaskStream, nn.Module, dict[str, nn.Module], SubspaceMemory]:
    """The stream, its model with the adapters merged, the target layers, and the subspaces to start from."""
    from manifold_cl.adapters.layers import device_of
    from manifold_cl.continual.finite_weights import validate_finite_weights

    updates = [
        layers_of_adapters.read_adapters(folder) for folder in adapters
    ]  # before anything is downloaded or computed
    subspaces = continual.SubspaceMemory.load(memory) if memory else None
    chosen = opened()
    model = chosen.make_model().to(device)
    validate_finite_weights(model)
    for update in updates:
        layers_of_adapters.merge_factors(model, update)
    layers = layers_of_adapters.target_linears(model, chosen.targets)
    if subspaces is None:
        subspaces = continual.SubspaceMemory.empty(layers)
    subspaces.require_fit(model)
    return chosen, model, layers, subspaces.to(device_of(layers))


def _entry(task: str, reports: Sequence[PassReport], layers: dict[str, Any]) -> dict[str, Any]:
    skipped = sorted({batch for report in reports for batch in (*report.skipped, *report.excluded)})
    if skipped:
        screen.say((f"{task}: left out batches {skipped}, whose values are not finite", "yellow"))
    return {"task": task, "passes": len(reports), "skipped_batches": skipped, "layers": layers}


@contextmanager
def _passes(task: Task, examples: int, passes: Passes) -> Iterator[tuple[Passes, list[PassReport]]]:
    """Passes that show a progress bar, and the list that receives their reports."""
    reports: list[PassReport] = []
    with bars() as progress:
        bar = progress.add_task(task.name, total=math.ceil(min(examples, task.size("train")) / BATCH), note="", left="")

        def on_batch(count: int, batch: int) -> None:
            progress.update(bar, note=f"pass {count}", completed=batch)

        yield replace(passes, on_batch=on_batch, on_pass=reports.append), reports


def _summary(memory: SubspaceMemory) -> dict[str, Any]:
    shapes = memory.shapes()
    return {
        "tasks": list(memory.tasks),
        "full": list(memory.full),
        "model": None if memory.model is None else memory.model.name,
        "protected_share": sum(k for _, k in shapes.values()) / sum(n for n, _ in shapes.values()),
        "layers": {
            name: memory.growth[name].to_dict() if name in memory.growth else {"n": n, "k": k}
            for name, (n, k) in shapes.items()
        },
    }


def _print(memory: SubspaceMemory) -> None:
    model = f", {memory.model.name}" if memory.model else ""
    title = f"protected subspaces: {', '.join(memory.tasks) or 'no task recorded'}{model}"
    key = (
        "added: columns of the last task · before, held: share of its energy protected before and after it · "
        "left: directions that can still be protected · forecast: tasks until full"
    )
    rows = []
    for name, (n, k) in memory.shapes().items():
        cells = ["–"] * 5
        if (growth := memory.growth.get(name)) is not None:
            forecast = "full" if name in memory.full else f"{growth.tasks_left:.1f}"
            shares = (f"{growth.before:.3f}", f"{growth.explained:.3f}")
            cells = [f"{growth.added}", *shares, f"{growth.capacity_left}", forecast]
        rows.append((name, f"{n}", f"{k} ({100 * k / n:.0f} %)", *cells))
    headings = ("layer", "inputs", "protected", "added", "before", "held", "left", "forecast")
    print_table(title, headings, rows, key)
