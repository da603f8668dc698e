"""The README's figures: every task's score along the stream for finished runs, and the study of all methods.

python benchmarks/figure.py runs/text-six-sequential_merge-seed0 runs/text-six-eblora-seed0
python benchmarks/figure.py benchmarks/results/text-six
"""

from __future__ import annotations

import argparse
from pathlib import Path

from analysis import Record, Study, forgetting_panels, plot_study

OUT = Path(__file__).parent.parent / "docs" / "_static"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="run folders, or the folder of one study")
    parser.add_argument("--out", type=Path, help="default: text-six.png or study.png under docs/_static")
    options = parser.parse_args()
    if len(options.folders) == 1 and (options.folders[0] / "study.json").exists():
        figure, name = plot_study(Study.load(options.folders[0]), highlight=["eblora"]), "study.png"
    else:
        records = [Record.load(run) for run in options.folders]
        figure, name = forgetting_panels({record.method: record for record in records}), "text-six.png"
    path = options.out or OUT / name
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, facecolor="white", bbox_inches="tight")
    print(path)


if __name__ == "__main__":
    main()
