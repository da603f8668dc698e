"""The page on reliability says how long the committed measurement of the suite took."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PHASES = ("collect", "setup", "call", "teardown")


def test_the_page_has_the_measured_times() -> None:
    files = json.loads((ROOT / "benchmarks/results/suite-times.json").read_text())["fast"].values()
    seconds = sum(file[phase] for file in files for phase in PHASES)
    count = sum(file["tests"] for file in files)
    page = " ".join((ROOT / "docs/reliability.md").read_text(encoding="utf-8").split())
    assert f"the {count} tests of `make test` took {seconds:.0f} CPU seconds" in page
