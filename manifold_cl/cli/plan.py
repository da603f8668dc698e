"""``manifold-cl plan``: the memory of a training run, before it starts and without weights."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

from typer import Option

from manifold_cl.cli.options import Json, at_least, split_names
from manifold_cl.cli.screen import print_table

if TYPE_CHECKING:
    from manifold_cl.planning import MemoryPlan


def plan(
    model: Annotated[str, Option(help="A config.json, the folder of a model, or its name on the Hub.")],
    method: Annotated[str, Option(help="Method that trains adapters.")] = "eblora",
    rank: Annotated[int | None, Option(min=1, help="Rank of the adapters (default: the method's).")] = None,
    targets: Annotated[str, Option(help="Layers to adapt: names separated by commas, or all-linear.")] = "all-linear",
    batch: Annotated[int, Option(callback=at_least(1), help="Examples per device and step.")] = 8,
    tokens: Annotated[int, Option(callback=at_least(1), help="Tokens per example.")] = 512,
    devices: Annotated[int, Option(callback=at_least(1), help="GPUs that share the weights (FSDP2).")] = 1,
    dtype: Annotated[str | None, Option(help="Precision of the base weights (default: the model's own).")] = None,
    checkpointing: Annotated[
        bool, Option("--checkpointing", help="Recompute activations in the backward pass.")
    ] = False,
    protected: Annotated[
        float, Option(help="Protected directions per layer: a share of its inputs below 1, or a number.")
    ] = 0.2,
    set_: Annotated[
        list[str] | None, Option("--set", metavar="NAME=VALUE", help="Option of the method; repeatable.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show how much memory a training run needs per GPU, and what to change when that is too much.

    No weight is loaded. The numbers are bytes of tensors; the CUDA context and unused memory of the allocator come on
    top, about a tenth more.
    """
    from manifold_cl.cli.run import method_options
    from manifold_cl.planning import memory_plan

    options = method_options(set_ or [], [method])[method]
    if rank is not None and options.get("rank", rank) != rank:
        raise ValueError(f"--rank {rank} and --set rank={options['rank']}: give one of them")
    made = memory_plan(
        model,
        method=method,
        targets=targets if targets == "all-linear" else split_names(targets) or [],
        batch=batch,
        tokens=tokens,
        devices=devices,
        dtype=dtype,
        checkpointing=checkpointing,
        protected=int(protected) if protected >= 1 and protected == int(protected) else protected,
        **({} if rank is None else {"rank": rank}),
        **{key: value for key, value in options.items() if key != "rank" or rank is None},
    )
    if as_json:
        print(json.dumps(made.to_dict(), indent=1))
        return
    _print(made)


def _print(made: MemoryPlan) -> None:
    from manifold_cl.planning.lines import gigabytes

    setup = made.setup
    devices = f", {setup['devices']} GPUs" if setup["devices"] > 1 else ""
    title = (
        f"Memory per GPU: {setup['model']}, {setup['method']}, {setup['batch']} × {setup['tokens']} tokens, "
        f"{setup['dtype']}{devices}"
    )
    rows: list[tuple[str, ...]] = []
    for line in made.lines:
        training, statistics = (
            gigabytes(line.nbytes) if line.phase in ("always", phase) else "–" for phase in ("training", "statistics")
        )
        rows.append((line.name, line.note, training, statistics))
    rows.append(("together", "", gigabytes(made.total("training")), gigabytes(made.total("statistics"))))
    key = (
        "training: forward, backward, step · statistics: passes for the start of a task and for the memory · "
        "1 GB = 10⁹ bytes"
    )
    print_table(title, ("kind", "what is counted", "training", "statistics"), rows, key, leading=2)
    if made.savings:
        changes = [(s.change, s.how, gigabytes(s.nbytes)) for s in made.savings]
        headings = ("change", "option here · in your code", "saves about")
        print_table("When memory is short, the largest saving first", headings, changes, leading=2)
