"""``manifold-cl compare``: the figures of several runs or studies in one table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from manifold_cl import continual
from manifold_cl.cli.options import Json, require_path
from manifold_cl.cli.runs_table import print_runs
from manifold_cl.cli.screen import screen
from manifold_cl.cli.study_table import markdown_of, print_study
from manifold_cl.lists import listed

if TYPE_CHECKING:
    from manifold_cl.cli.analysis_package import analysis


def compare(
    runs: Annotated[list[Path], Argument(help="Run folders, or folders of studies.")],
    as_json: Json = False,
    markdown: Annotated[bool, Option("--markdown", help="Print a study as a Markdown table.")] = False,
) -> None:
    """Compare the figures of runs, finished or not, or of studies."""
    from manifold_cl.cli.analysis_package import analysis

    if as_json and markdown:
        raise ValueError("--json and --markdown exclude each other")
    for folder in runs:
        require_path(folder, "folders of runs or of studies")
        if folder.is_file():
            raise NotADirectoryError(f"{folder} is a file: give the folder of a run or of a study")
        if not (folder / "study.json").exists() and not (folder / "record.json").exists():
            raise FileNotFoundError(
                f"{folder} holds neither a record.json (a run) nor a study.json (a study){_below(folder)}"
            )
    studies = [folder for folder in runs if (folder / "study.json").exists()]
    if studies and len(studies) < len(runs):
        raise ValueError("folders of runs and of studies do not stand in one table: compare them in two calls")
    if as_json and len(studies) > 1:
        raise ValueError(f"--json prints one study, got {len(studies)}: give one folder")
    if markdown and not studies:
        raise ValueError("--markdown prints studies, and none of these folders holds a study.json")
    for folder in studies:
        study = analysis.StudyResults.load(folder)
        _warn_of_missing(study)
        if markdown:
            print(markdown_of(study))
        else:
            print_study(study, as_json=as_json)
    if not studies:
        print_runs([continual.RunRecord.load(folder) for folder in runs], as_json=as_json)


def _below(folder: Path) -> str:
    """The advice to give the folders of runs and studies in this one."""
    inside = sorted({str(each.parent) for name in ("study", "record") for each in folder.glob(f"*/{name}.json")})
    return f": give the folders in it, {listed(inside)}" if inside else ""


def _warn_of_missing(study: analysis.StudyResults) -> None:
    if study.missing:
        missing = [
            f"{each.cell.label}, seed {each.cell.seed} "
            f"({f'{each.done} of {each.tasks} tasks' if each.started else 'not begun'})"
            for each in study.missing
        ]
        total = len(study.plan.cells)
        screen.say((f"{len(missing)} of {total} cells are not complete: {listed(missing, 1)}", "yellow"))
