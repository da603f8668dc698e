"""Retractions and steps on problems with known optimum: the numbers and the figure of docs/which-retraction.md.

    python benchmarks/lab.py             # measure, write results/lab.json and docs/_static/lab.png, print the tables
    python benchmarks/lab.py --tables    # print the tables of the file that is there

The same as ``manifold-cl lab``. Seconds are CPU seconds, so that other work on the machine counts little.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from manifold_cl.continual.environment import library_versions, machine
from manifold_cl.lab import run_suite

HERE = Path(__file__).parent
RESULT = HERE / "results" / "lab.json"
FIGURE = HERE.parent / "docs" / "_static" / "lab.png"
USUAL_STEP = "momentum"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="only print the tables")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    if not options.tables:
        report = run_suite(jobs=options.jobs, on_progress=lambda label, done, total: print(f"{done}/{total} {label}"))
        content = {**report.to_dict(), "jobs": options.jobs, "versions": library_versions(), "machine": machine()}
        RESULT.write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")  # one line: 0.2 MB
        from manifold_cl.lab.figures import plot_profiles

        plot_profiles(report).savefig(FIGURE, dpi=150)
    content = json.loads(RESULT.read_text(encoding="utf-8"))
    for names in (steps_of(content), retractions_of(content)):
        print("\n".join(table(content, names)), end="\n\n")


def steps_of(content: Any) -> list[str]:
    """Labels of the steps with their usual retraction, the largest area in seconds first."""
    return _ranked(c for c in content["contestants"] if " + " not in c["name"])


def retractions_of(content: Any) -> list[str]:
    """Labels of the usual step with every retraction, the largest area in seconds first."""
    return _ranked(c for c in content["contestants"] if c["step"] == USUAL_STEP)


def table(content: Any, names: list[str]) -> list[str]:
    """The lines of a Markdown table: solved instances, areas, and the largest distance to the manifold."""
    contestants = {c["name"]: c for c in content["contestants"]}
    instances = len(content["problems"]) * content["budget"]["starts"]
    lines = ["| | solved | area, gradients | area, seconds | distance |", "| --- | --: | --: | --: | --: |"]
    for name in names:
        c = contestants[name]
        shown = c["retraction"] if set(names) == set(retractions_of(content)) else name
        worst = max(r["orthonormality"] or 0.0 for r in content["results"] if r["contestant"] == name)
        solved = round(c["evaluations"]["solved_share"] * instances)
        areas = [f"{c[unit]['area']:.2f}" for unit in ("evaluations", "seconds")]
        lines.append(f"| `{shown}` | {solved} of {instances} | {areas[0]} | {areas[1]} | {worst:.0e} |")
    return lines


def _ranked(contestants: Iterable[Any]) -> list[str]:
    kept = [c for c in contestants if "seconds" in c]
    return [c["name"] for c in sorted(kept, key=lambda c: (-c["seconds"]["area"], c["name"]))]


if __name__ == "__main__":
    main()
