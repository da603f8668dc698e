"""``manifold-cl export``: adapters as plain LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from manifold_cl.adapters import export_lora
from manifold_cl.cli.screen import check_out, screen


def export(
    folders: Annotated[
        list[Path],
        typer.Argument(help="An adapter folder (ours, or PEFT's EBLoRA), a run folder, or several: updates add up."),
    ],
    out: Annotated[Path, typer.Option(help="Where the LoRA folder goes.")] = Path("lora"),
    base_model: Annotated[
        str | None, typer.Option(help="Name or path of the base model, for readers that load it themselves.")
    ] = None,
    task_type: Annotated[str | None, typer.Option(help="PEFT's task type, such as CAUSAL_LM.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Adapters as a plain LoRA folder, exactly: loads in stock PEFT and in whatever reads its files."""
    check_out(out)
    written = export_lora(folders, out, base_model=base_model, task_type=task_type)
    ranks = sorted({factors.rank for factors in written.values()})
    if as_json:
        print(json.dumps({"out": str(out), "layers": len(written), "ranks": ranks}))
        return
    said = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    screen.say(f"{len(written)} layers of {said} written to {out}")
