"""The numbers of docs/analysis-acting.md are those of the benchmark, and these reach what was promised."""

import json
from pathlib import Path

import manifold_cl

ROOT = Path(manifold_cl.__file__).parents[1]
PAGE = (ROOT / "docs/analysis-acting.md").read_text(encoding="utf-8")
FOUND = json.loads((ROOT / "benchmarks/results/suggest.json").read_text(encoding="utf-8"))


def test_shares_kept_on_the_page_are_those_measured() -> None:
    for keep, row in FOUND["by_keep"].items():
        shares = [f"{row['energy_kept']:.0%}", f"{row['drift_in_interval']:.1%}", f"{row['drift_kept']:.0%}"]
        ranks = [f"{row['energy_rank']:.1f}", f"{row['drift_rank']:.1f}"]
        assert f"| {' | '.join([f'{float(keep):.0%}', *shares, *ranks])} |" in PAGE
    overall = FOUND["overall"]
    assert f"within the interval in {overall['drift_in_interval']:.1%} of all cases" in PAGE
    assert f"{FOUND['layers_and_draws']} layers and draws" in PAGE


def test_suggested_ranks_keep_what_they_state() -> None:
    assert FOUND["overall"]["energy_kept"] == 1.0
    assert FOUND["overall"]["drift_in_interval"] >= 0.95
    assert FOUND["overall"]["drift_kept"] >= 0.95
