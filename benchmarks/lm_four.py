"""The winners of the searches on lm-four as a table, ``results/lm-four/searches.md``, which docs/results.md includes.

    manifold-cl search benchmarks/search/lm-four/*.json --out benchmarks/results/lm-four    # hours on a CPU
    python benchmarks/lm_four.py

``--device cuda --processes 18`` runs the trials on a GPU that all processes share.
"""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "lm-four"
TABLE = RESULTS / "searches.md"


def table() -> str:
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


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
