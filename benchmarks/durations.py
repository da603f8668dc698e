"""Seconds of one run per stream and method, for the first line of ``manifold-cl run`` and its help.

Reads the committed results, and writes manifold_cl/cli/durations.json. The default methods were measured alone on the
machine (``stream-*.json``). The other ones come from the study of text-six, whose cells ran in pairs. They are scaled
by the default methods, which were measured in both ways.

    python benchmarks/durations.py
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from manifold_cl.streams.catalogue import TEXT_SIX, TEXT_THREE

RESULTS = Path(__file__).parent / "results"
TARGET = Path(__file__).parents[1] / "manifold_cl" / "cli" / "durations.json"


def phases(timings: Sequence[Mapping[str, float]], tasks: int) -> dict[str, int]:
    """Seconds of training, and of the rest: statistics, merging, and evaluations, one of them before training."""
    train, other, evaluate = (
        sum(timing.get(phase, 0.0) for timing in timings for phase in names)
        for names in (("train",), ("prepare", "finish"), ("evaluate",))
    )
    return {"train": round(train), "other": round(other + evaluate * (tasks + 1) / tasks)}


def in_study() -> dict[str, dict[str, int]]:
    """Seconds per method of its fastest cell in the study of text-six."""
    cells: dict[str, list[tuple[bool, int, dict[str, int]]]] = {}
    for path in sorted(RESULTS.glob("text-six/cells/*/record.json")):
        record = json.loads(path.read_text())
        variant = record["name"].rpartition("-seed")[0] != record["method"]  # the method with other options
        seconds = phases(record["timings"], len(record["tasks"]))
        cells.setdefault(record["method"], []).append((variant, sum(seconds.values()), seconds))
    return {method: min(runs, key=lambda run: run[:2])[2] for method, runs in sorted(cells.items())}


def alone(summary: Mapping[str, Any]) -> tuple[int, dict[str, dict[str, int]]]:
    """Number of tasks, and seconds per default method of its fastest run, alone on the machine."""
    methods = summary["runs"][0]["methods"]
    tasks = len(next(iter(methods.values()))["accuracy"])
    runs = {name: [phases([run["methods"][name]["seconds"]], tasks) for run in summary["runs"]] for name in methods}
    return tasks, {name: min(each, key=lambda seconds: sum(seconds.values())) for name, each in runs.items()}


def durations() -> dict[str, Any]:
    """The content of the file."""
    study, streams = in_study(), {}
    for stream in (TEXT_SIX, TEXT_THREE):
        summary = json.loads((RESULTS / f"stream-{stream.name}.json").read_text())
        tasks, measured = alone(summary)
        ratio = sum(sum(each.values()) for each in measured.values()) / sum(sum(study[m].values()) for m in measured)
        scaled = {m: {part: round(value * ratio) for part, value in each.items()} for m, each in study.items()}
        streams[stream.name] = {"tasks": tasks, "examples": stream.train, "seconds": scaled | measured}
    return {"machine": f"{summary['machine']['cores']} CPU cores", "streams": streams}


if __name__ == "__main__":
    TARGET.write_text(json.dumps(durations(), indent=1) + "\n")
    print(TARGET.read_text())
