"""Learning time of methods beside plain LoRA: start, training, merge and memory of one task, without evaluation.

    python benchmarks/learning_time.py
    python benchmarks/learning_time.py --methods sequential_merge eblora --task nouns --laps 5

Each lap runs every method once, in turn, so that a change of the machine's speed affects all of them. Numbers are
medians over laps; a ratio is the median of the ratios of single laps. Seconds are CPU seconds of one thread, since
other work may share the machine.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from manifold_cl.continual import Training, make_method
from manifold_cl.continual.environment import library_versions, machine
from manifold_cl.continual.stage import Stage
from manifold_cl.continual.task import TaskStream
from manifold_cl.continual.training_loop import TrainingJob, TrainingLoop
from manifold_cl.files import write_json
from manifold_cl.streams import open_stream

RESULT = Path(__file__).parent / "results" / "learning-time.json"
REFERENCE = "sequential_merge"
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    REFERENCE: (REFERENCE, {}),
    "eblora": ("eblora", {}),
    "eblora, start of 32 examples": ("eblora", {"start_examples": 32}),
    "eblora, memory from the last steps": ("eblora", {"statistics_during": 0.034}),
    "best, memory from twice as many steps": ("best", {"statistics_during": 0.067}),
    "best": ("best", {}),
}
"""Row of the table → method and its options."""


@dataclass
class Laps:
    """CPU seconds of the phases of one task, for each lap."""

    start: list[float]
    train: list[float]
    end: list[float]

    def totals(self) -> list[float]:
        """Seconds of each lap."""
        return [sum(parts) for parts in zip(self.start, self.train, self.end, strict=True)]


def learn(stream: TaskStream, name: str, options: dict[str, Any]) -> tuple[float, float, float]:
    """CPU seconds of start, training and end of the stream's first task."""
    training = Training()
    method, model = make_method(name, **options), stream.make_model().requires_grad_(False)
    stage = Stage(stream.tasks[0], 0, stream.targets, training.seed, training.batch_size, stream.tasks)
    clock = [time.process_time()]
    method.begin_task(model, stage)
    clock.append(time.process_time())
    TrainingLoop().train(model, TrainingJob(method, stage, training))
    clock.append(time.process_time())
    method.finish_task(model, stage)
    method.end_task(model, stage)
    clock.append(time.process_time())
    return clock[1] - clock[0], clock[2] - clock[1], clock[3] - clock[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=[*VARIANTS], default=[*VARIANTS])
    parser.add_argument("--task", default="movies", help="a task of text-six")
    parser.add_argument("--laps", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    stream = open_stream("text-six", tasks=[options.task])
    names = list(dict.fromkeys([REFERENCE, *options.methods]))
    laps = {name: Laps([], [], []) for name in names}
    for _ in range(options.laps):
        for name in names:
            start, trained, end = learn(stream, *VARIANTS[name])
            laps[name].start.append(start)
            laps[name].train.append(trained)
            laps[name].end.append(end)
    rows = {name: summary(found, laps[REFERENCE]) for name, found in laps.items()}
    content = {"task": options.task, "laps": options.laps, "rows": rows, "load_average": round(os.getloadavg()[0], 1)}
    write_json(options.out, {**content, "versions": library_versions(), "machine": machine()})
    table = Table("method", "start", "training", "end", "CPU seconds", f"over {REFERENCE}")
    for name, row in rows.items():
        table.add_row(name, *(f"{value:.2f}" for value in row.values()))
    Console().print(table)


def summary(laps: Laps, reference: Laps) -> dict[str, float]:
    """Medians over laps."""
    ratios = [own / other for own, other in zip(laps.totals(), reference.totals(), strict=True)]
    parts = {"start": laps.start, "train": laps.train, "end": laps.end, "total": laps.totals()}
    return {**{name: round(median(part), 2) for name, part in parts.items()}, "ratio": round(median(ratios), 3)}


if __name__ == "__main__":
    main()
