"""The README's figures, from the committed study: all methods, and the scores of the two that `make run` trains.

Each is drawn twice: for a page, and narrow, for a telephone.

python benchmarks/figure.py
python benchmarks/figure.py benchmarks/results/text-six --seed 1
python benchmarks/figure.py runs/text-six-sequential_merge-seed0 runs/text-six-eblora-seed0 --out docs/_static/mine.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from analysis import Record, StudyResults, forgetting_panels, plot_study
from analysis.formats import label_records

HERE = Path(__file__).parent
STUDY = HERE / "results" / "text-six"
STATIC = HERE.parent / "docs" / "_static"
SHOWN = {"sequential_merge": "sequential_merge (plain LoRA)", "eblora": "eblora"}
"""Labels of the study whose scores are drawn along the stream, and their names in the figure."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, default=[STUDY], help="one study's folder, or run folders")
    parser.add_argument("--seed", type=int, default=0, help="the study's seed whose scores are drawn along the stream")
    parser.add_argument("--out", type=Path, help="file for the figure of run folders (default: text-six.png)")
    options = parser.parse_args()
    first = options.folders[0]
    if len(options.folders) == 1 and (first / "study.json").exists():
        study = StudyResults.load(first)
        seeds = {cell.label: run for cell, run in study.records.items() if cell.seed == options.seed}
        shown = {name: seeds[label] for label, name in SHOWN.items()}
        for suffix, narrow in (("", False), ("-narrow", True)):
            save(forgetting_panels(shown, columns=2 if narrow else 3), STATIC / f"text-six{suffix}.png")
            save(plot_study(study, highlight=["eblora"], narrow=narrow), STATIC / f"study{suffix}.png")
    else:
        records = label_records([Record.load(run) for run in options.folders])
        save(forgetting_panels(records), options.out or STATIC / "text-six.png")


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, facecolor="white", bbox_inches="tight")
    print(path)


if __name__ == "__main__":
    main()
