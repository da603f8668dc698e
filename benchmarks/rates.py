"""Writes `manifold_cl/continual/rates.json`, the searched rates, from the searches under `results`.

    python benchmarks/rates.py

A new search joins by its file, ``tuning-NAME.json`` in ``results`` or in a folder below; its stream must be in MODELS.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import manifold_cl

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
        score = max(trial["mfn"] for trial in search["trials"])
        about = {"stream": search["stream"], **MODELS[search["stream"]]}
        file = str(path.relative_to(RESULTS))
        found.append({**about, "method": search["method"], "options": search["winner"], "mfn": score, "file": file})
    return found


def main() -> None:
    TABLE.write_text(json.dumps(rows(), indent=1) + "\n", encoding="utf-8")
    print(f"{len(rows())} searches: {TABLE}")


if __name__ == "__main__":
    main()
