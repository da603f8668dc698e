"""The tables of lm-four, which docs/results.md includes: the winners of the searches, and the study of them.

    manifold-cl search benchmarks/search/lm-four/*.json --out benchmarks/results/lm-four    # hours on a CPU
    manifold-cl study benchmarks/lm-four.toml --out benchmarks/results/lm-four              # ten hours of a CPU core
    python benchmarks/lm_four.py

``--device cuda --processes 18`` runs the trials on a GPU that all processes share.
"""

from __future__ import annotations

import json
from pathlib import Path

from analysis import StudyResults
from manifold_cl.cli.study_table import markdown_of

RESULTS = Path(__file__).parent / "results" / "lm-four"
SEARCHES = RESULTS / "searches.md"
STUDY = RESULTS / "means.md"
SEEDS = RESULTS / "seeds.md"


def searches() -> str:
    """The winners, best first, as a Markdown table: seed 100, validation parts."""
    rows = []
    for path in RESULTS.glob("tuning-*.json"):
        search = json.loads(path.read_text(encoding="utf-8"))
        best = max(search["trials"], key=lambda result: result["mfn"])
        rates = [trial["options"]["lr"] for trial in search["trials"]]
        rows.append((
            best["mfn"],
            search["method"],
            *(f"{best[figure]:.1f}" for figure in ("mft", "mfn", "bwt")),
            f"{best['updates']['participation_ratio']:.1f}",
            ", ".join(f"{key}={value}" for key, value in best["options"].items()),
            "yes" if best["options"]["lr"] in (min(rates), max(rates)) else "no",
        ))  # fmt: skip
    head = ("method", "MFT", "MFN", "BWT", "participation ratio", "options", "rate on the edge")
    lines = [f"| {' | '.join(head)} |", "|---|--:|--:|--:|--:|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row[1:])} |" for row in sorted(rows, reverse=True))]) + "\n"


def study() -> str:
    """The means of the study, as ``manifold-cl compare --markdown`` prints them: three seeds, test parts."""
    return markdown_of(StudyResults.load(RESULTS)) + "\n"


def seeds() -> str:
    """What each seed measured, as a Markdown table: the methods in the order of their means, best first."""
    runs: dict[str, list[dict[str, float]]] = {}
    for path in sorted(RESULTS.glob("cells/*/record.json")):
        metrics = json.loads(path.read_text(encoding="utf-8"))["metrics"]
        runs.setdefault(path.parent.name.rpartition("-seed")[0], []).append(metrics)
    lines = ["| method | MFT, seeds 0, 1, 2 | MFN | BWT |", "|---|---|---|---|"]
    for name in sorted(runs, key=lambda name: -sum(run["mfn"] for run in runs[name])):
        each = (", ".join(f"{run[figure]:.1f}" for run in runs[name]) for figure in ("mft", "mfn", "bwt"))
        lines.append(f"| `{name}` | {' | '.join(each)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    SEARCHES.write_text(searches(), encoding="utf-8")
    STUDY.write_text(study(), encoding="utf-8")
    SEEDS.write_text(seeds(), encoding="utf-8")
