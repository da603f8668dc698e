"""Spectral steps beside AdamW's on the validation stream: scores, and effective directions of the updates.

    python benchmarks/spectral.py --threads 1

Every method has its searched options (``results/tuning-*.json``). Winners of older searches, which kept no measures of
their updates, run again. Writes ``results/spectral.json``, and the table of docs/method.md as ``spectral.md``. Finished
runs are kept, so an interrupted call goes on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from manifold_cl.cli.search import update_measures
from manifold_cl.continual import ContinualRunner, Training, make_method
from manifold_cl.continual.environment import library_versions, machine
from manifold_cl.files import write_json
from manifold_cl.streams import open_stream
from manifold_cl.study.trials import trial_result

RESULTS = Path(__file__).parent / "results"
TARGET = RESULTS / "spectral.json"
BUDGET = 7
"""Trials of a complete search (docs/decisions/0013-equal-searches.md)."""
LABELS = (
    "sequential_merge",
    "lora_muon",
    "lora_muon_ogd",
    "eblora",
    "eblora-spectral-exact",
    "eblora-spectral-spel",
    "eblora-spectral-projected",
    "eblora-spectral-intrinsic",
)
COLUMNS = {
    "mft": "MFT",
    "mfn": "MFN",
    "bwt": "BWT",
    "participation_ratio": "participation ratio",
    "effective_rank_energy": "effective rank, σ²",
    "effective_rank_roy_vetterli": "effective rank, σ",
    "stable_rank": "stable rank",
    "spectral_norm": "largest σ",
    "frobenius": "Frobenius norm",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    known = json.loads(TARGET.read_text(encoding="utf-8"))["rows"] if TARGET.exists() else []
    rows = []
    for label in LABELS:
        path = RESULTS / f"tuning-{label}.json"
        if path.exists():
            rows.append(measure(label, json.loads(path.read_text(encoding="utf-8")), known))
            content = {"stream": "text-val", "rows": rows, "versions": library_versions(), "machine": machine()}
            write_json(TARGET, content)
    TARGET.with_suffix(".md").write_text(table(rows), encoding="utf-8")
    print(table(rows))


def measure(label: str, search: dict[str, Any], known: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of the winner of a search, from the search itself, a finished run, or a new one."""
    winner = next(trial for trial in search["trials"] if trial["options"] == search["winner"])
    row = {"label": label, "method": search["method"], "trials": len(search["trials"])}
    same = [one["run"] for one in known if (one["label"], one["run"]["options"]) == (label, search["winner"])]
    if "updates" in winner:
        return {**row, "run": winner}
    if not same:
        same = [run_winner(search)]
    return {**row, "run": same[0], "mfn_in_the_search": winner["mfn"]}


def run_winner(search: dict[str, Any]) -> dict[str, Any]:
    """The winner of a search, run again for the measures of its updates."""
    training = Training(seed=search["seed"], evaluate_on=search.get("evaluate_on", "test"))
    method, stream = make_method(search["method"], **search["winner"]), open_stream(search["stream"])
    with tempfile.TemporaryDirectory() as folder:
        record = ContinualRunner(stream, method, folder, training=training).run()
        return trial_result(search["winner"], record, update_measures(Path(folder), search["method"]))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown. A search that is not finished has its number of trials in the first column."""
    lines = [f"| | lr | {' | '.join(COLUMNS.values())} |", "|---|" + "--:|" * (len(COLUMNS) + 1)]
    for row in rows:
        options, run = row["run"]["options"], {**row["run"], **row["run"]["updates"]}
        name = f"`{row['method']}`" + (f', `direction="{options["direction"]}"`' if "direction" in options else "")
        unfinished = "" if row["trials"] == BUDGET else f" ({row['trials']} of {BUDGET} trials)"
        figures = [f"{run[key]:.{3 if key in ('spectral_norm', 'frobenius') else 1}f}" for key in COLUMNS]
        lines.append(f"| {name}{unfinished} | {options['lr']:g} | {' | '.join(figures)} |".replace("| -", "| −"))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
