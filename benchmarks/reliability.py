"""Writes the counts of ``make reliability`` into docs/reliability.md: ``python benchmarks/reliability.py``."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "reliability.json"
PAGE = ROOT / "docs" / "reliability.md"
START, END = "<!-- counts -->", "<!-- end of counts -->"


def counts() -> str:
    """The table of counts, and the time they took."""
    content = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = "\n".join(f"| {name} | {number} |" for name, number in content["counts"].items())
    minutes, cores, tests = content["seconds"] / 60, content["cores"], sum(content["tests"].values())
    skipped = f" {len(content['skipped'])} of them were skipped." if content["skipped"] else ""
    return (
        f"| what | number |\n|---|--:|\n{rows}\n\n{tests} tests took {minutes:.0f} minutes on {cores} cores.{skipped}"
    )


def main() -> None:
    """Replace the counts on the page."""
    page = PAGE.read_text(encoding="utf-8")
    between = f"{START}\n{counts()}\n{END}"
    PAGE.write_text(re.sub(f"{START}.*{END}", lambda _: between, page, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()
