"""The table of spectral steps in docs/method.md is what was measured, at the options that won their searches."""

import json
from pathlib import Path

import pytest

import manifold_cl

ROOT = Path(manifold_cl.__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FOUND = json.loads((RESULTS / "spectral.json").read_text(encoding="utf-8"))


def test_the_table_is_the_one_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import spectral

    assert spectral.table(FOUND["rows"]) == (RESULTS / "spectral.md").read_text(encoding="utf-8")
    assert {row["label"] for row in FOUND["rows"]} <= set(spectral.LABELS)
    assert "../benchmarks/results/spectral.md" in (ROOT / "docs/method.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("row", FOUND["rows"], ids=[row["label"] for row in FOUND["rows"]])
def test_a_row_is_the_winner_of_its_search(row: dict[str, object]) -> None:
    search = json.loads((RESULTS / f"tuning-{row['label']}.json").read_text(encoding="utf-8"))
    assert row["trials"] == len(search["trials"])
    run = row["run"]
    assert isinstance(run, dict)
    assert run["options"] == search["winner"]
    assert run["mfn"] == row.get("mfn_in_the_search", run["mfn"])  # an older winner that ran again
