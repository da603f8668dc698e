"""The numbers of docs/analysis-noise.md and docs/analysis-merge.md are those of the benchmark."""

import json
from pathlib import Path

import manifold_cl

ROOT = Path(manifold_cl.__file__).parents[1]
PAGE = (ROOT / "docs/analysis-noise.md").read_text(encoding="utf-8")
FOUND = json.loads((ROOT / "benchmarks/results/noise.json").read_text(encoding="utf-8"))


def test_false_alarms_on_the_page_are_those_measured_and_near_the_level() -> None:
    for row in FOUND["shapes"]:
        normal, uniform = (row[kind]["alarms"] for kind in ("normal", "uniform"))
        cells = [f"${row['m']} \\times {row['n']}$, {row['r']}", f"{row['edge']:.2f}", f"{row['normal']['mean']:.2f}"]
        cells += [f"{normal['0.05']:.3f}", f"{normal['0.01']:.3f}", f"{normal['0.001']:.4f}"]
        cells += [f"{uniform['0.05']:.3f}", f"{uniform['0.01']:.3f}"]
        assert f"| {' | '.join(cells)} |" in PAGE
        assert max(normal["0.05"], uniform["0.05"]) < 0.055  # 4000 draws: the standard error is 0.0035


def test_counts_and_tails_on_the_page_are_those_measured() -> None:
    for row in FOUND["counts"]:
        assert f"| {row['larger']} | {row['low']:.3f} | {row['right']:.3f} | {row['high']:.3f} |" in PAGE
    for row in FOUND["tails"]:
        assert f"| {row['values']} | {row['defined']:.3f} | {row['covered']:.3f} |" in PAGE


def test_false_alarms_of_opposite_signs_are_those_measured() -> None:
    page = " ".join((ROOT / "docs/analysis-merge.md").read_text(encoding="utf-8").split())
    one, four = (row["alarms"]["0.05"] for row in FOUND["signs"])
    assert f"in {one:.3f} of the cases for rank 1, and in {four:.3f} for rank 4" in page
    assert max(one, four) < 0.055
