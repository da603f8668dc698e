"""``manifold-cl export``: adapters as plain LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from manifold_cl import adapters
from manifold_cl.cli.options import Json, require_path, validate_out
from manifold_cl.cli.screen import Screen


def export(
    folders: Annotated[
        list[Path], Argument(help="Adapter folders (ours or PEFT's EBLoRA) or run folders; several updates are added.")
    ],
    out: Annotated[Path, Option(help="Folder for the LoRA adapter.")] = Path("lora"),
    base_model: Annotated[
        str | None, Option(help="Name or path of the base model, written to the configuration.")
    ] = None,
    task_type: Annotated[str | None, Option(help="PEFT's task type, such as CAUSAL_LM.")] = None,
    as_json: Json = False,
) -> None:
    """Convert adapters to plain LoRA, exactly, in a folder that PEFT loads."""
    for folder in folders:
        require_path(folder, "adapter folders or run folders")
    validate_out(out)
    written = adapters.export_lora(folders, out, base_model=base_model, task_type=task_type)
    ranks = sorted({factors.rank for factors in written.values()})
    if as_json:
        print(json.dumps({"out": str(out), "layers": len(written), "ranks": ranks}))
        return
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    Screen().say(f"{len(written)} layers of {rank} written to {out}")
