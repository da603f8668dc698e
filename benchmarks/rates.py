"""Writes `manifold_cl/continual/rates.json`, the searched rates, from the searches under `results`.

    python benchmarks/rates.py

A new search joins by its file, ``tuning-NAME.json`` in ``results`` or in a folder below; its stream must be in MODELS.
A search has one seed. A trial is left out if a committed run with its options, in ``cells`` beside the search, diverged
with another seed: the row is then that of the best other trial.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import manifold_cl
from manifold_cl import RunRecord
from manifold_cl.continual.losses import divergence

RESULTS = Path(__file__).parent / "results"
TABLE = Path(manifold_cl.__file__).parent / "continual" / "rates.json"
MODELS = {
    "text-val": {"model": "MiniLM-L6", "kind": "encoder", "width": 384},
    "lm-four": {"model": "SmolLM2-135M-Instruct", "kind": "decoder", "width": 576},
}
"""Stream → the model that its search trained."""


def rows() -> list[dict[str, Any]]:
    """One row per search: model, method, the winner's options, its score, and the file."""
    found = []
    for path in sorted(RESULTS.rglob("tuning-*.json")):
        search = json.loads(path.read_text(encoding="utf-8"))
        trials = sorted(search["trials"], key=lambda trial: -trial["mfn"])
        left_out = {i: runs for i, trial in enumerate(trials) if (runs := diverged(path.parent, search, trial))}
        best = next(trial for i, trial in enumerate(trials) if i not in left_out)
        about = {"stream": search["stream"], **MODELS[search["stream"]], "method": search["method"]}
        row = {**about, "options": best["options"], "mfn": best["mfn"], "file": str(path.relative_to(RESULTS))}
        found.append(row | ({"diverged": [run for runs in left_out.values() for run in runs]} if left_out else {}))
    return found


def diverged(folder: Path, search: dict[str, Any], trial: dict[str, Any]) -> list[str]:
    """Names of the runs beside a search that have the options of a trial, and diverged in a task."""
    names = []
    for path in sorted(folder.glob("cells/*/record.json")):
        record = RunRecord.load(path.parent)
        of_trial = record.method == search["method"] and trial["options"].items() <= record.config.items()
        firsts = [losses[0] for losses in record.losses if losses]
        if of_trial and any(divergence(losses, max(firsts)) for losses in record.losses):
            names.append(path.parent.name)
    return names


def main() -> None:
    TABLE.write_text(json.dumps(rows(), indent=1) + "\n", encoding="utf-8")
    print(f"{len(rows())} searches: {TABLE}")


if __name__ == "__main__":
    main()
