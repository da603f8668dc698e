"""The table of six-orders is that of the committed cells, all of one version of the data and its reference."""

import json
from pathlib import Path

import manifold_cl
from analysis import StudyResults
from manifold_cl.cli.study_table import markdown_of

ROOT = Path(manifold_cl.__file__).parents[1]
FOLDER = ROOT / "benchmarks" / "results" / "six-orders"


def test_the_table_is_made_from_the_cells() -> None:
    results = StudyResults.load(FOLDER)
    assert markdown_of(results) + "\n" == (FOLDER / "means.md").read_text(encoding="utf-8")
    assert len(results.plan.methods) == 20


def test_cells_differ_in_method_order_and_seed_only() -> None:
    records = [json.loads(path.read_text(encoding="utf-8")) for path in FOLDER.glob("cells/*/record.json")]
    assert len(records) >= 20
    assert {record["status"] for record in records} == {"complete"}
    for record in records:  # archives stand in the order in which tasks use them
        record["provenance"]["archives"].sort(key=lambda archive: archive["file"])
    assert len({json.dumps(record["provenance"], sort_keys=True) for record in records}) == 1
    for option in ("stream", "epochs", "batch_size", "warmup", "evaluate_on", "device", "threads"):
        assert len({json.dumps(record["config"][option]) for record in records}) == 1, option
