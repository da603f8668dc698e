"""``manifold-cl analyze``: spectra and interference of adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from manifold_cl.cli.screen import check_device, screen


def analyze(
    folders: Annotated[list[Path], typer.Argument(help="Run folders, or adapter folders in the order of their tasks.")],
    out: Annotated[Path, typer.Option(help="Where the report and the tables go.")] = Path("analysis-report"),
    device: Annotated[str, typer.Option(help="Where spectra are computed.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print where things were written as JSON.")] = False,
) -> None:
    """Spectra and interference of adapters (ours or PEFT LoRA): an HTML report and tidy CSV tables."""
    from analysis import AdapterSet, interference_table, spectrum_table, write_report

    check_device(device)
    adapters = AdapterSet.load(*folders)
    out.mkdir(parents=True, exist_ok=True)
    written = {"report": out / "report.html", "spectra": out / "spectra.csv", "interference": out / "interference.csv"}
    spectrum_table(adapters, device=device).to_csv(written["spectra"], index=False)
    interference_table(adapters, device=device).to_csv(written["interference"], index=False)
    write_report(written["report"], folders, device=device)
    if as_json:
        print(json.dumps({name: str(path) for name, path in written.items()}))
        return
    for name, path in written.items():
        screen.print(f"{name:>12}  {path}", highlight=False)
