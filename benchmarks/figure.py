"""The README's figure: every task's score along the stream, for finished runs.

python benchmarks/figure.py runs/text-six-sequential_merge-seed0 runs/text-six-eblora-seed0
"""

from __future__ import annotations

import argparse
from pathlib import Path

from analysis import Record, forgetting_panels

OUT = Path(__file__).parent.parent / "docs" / "_static" / "text-six.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    records = [Record.load(run) for run in options.runs]
    figure = forgetting_panels({record.method: record for record in records})
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=160, facecolor="white", bbox_inches="tight")
    print(options.out)


if __name__ == "__main__":
    main()
