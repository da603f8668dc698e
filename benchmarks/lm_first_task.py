"""Losses of the first task of lm-four by `eblora`, at rates and warm-ups around the one that diverged.

    python benchmarks/lm_first_task.py                # 30 steps per setting, some minutes each on one core
    python benchmarks/lm_first_task.py 0.006 0.1      # one setting: lr, warmup

Adds to ``results/lm-four/first-task.json``. The seed is that of the cell that diverged.
"""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import torch

from manifold_cl import ContinualRunner
from manifold_cl.continual import Training, make_method
from manifold_cl.continual.runner import Progress
from manifold_cl.streams import open_stream

RESULT = Path(__file__).parent / "results" / "lm-four" / "first-task.json"
SETTINGS = ((0.012, 0.1), (0.006, 0.1), (0.012, 0.3))
SEED = 2
OPTIONS = {"rank": 16, "scale_lr": 0.02, "initial_scale": -0.05, "energy": 0.97, "source": "sensitivity"}


class Trained(Exception):  # noqa: N818 - the end of the part that is measured
    """The first task is trained."""


def losses_of(lr: float, warmup: float) -> list[float]:
    """The loss of every step."""
    losses: list[float] = []

    def take(state: Progress) -> None:
        if state.phase == "train" and state.step:
            losses.append(round(state.loss, 3))
            if state.step == state.steps:
                raise Trained

    method = make_method("eblora", lr=lr, **OPTIONS)
    with tempfile.TemporaryDirectory() as folder:
        training = Training(seed=SEED, warmup=warmup)
        runner = ContinualRunner(open_stream("lm-four"), method, folder, training=training, on_progress=take)
        with suppress(Trained):
            runner.run()
    return losses


def main() -> None:
    """Measure each setting, and add it to the file."""
    torch.set_num_threads(1)
    settings = [(float(sys.argv[1]), float(sys.argv[2]))] if len(sys.argv) == 3 else SETTINGS
    for lr, warmup in settings:
        rows = json.loads(RESULT.read_text(encoding="utf-8"))["rows"] if RESULT.exists() else []
        rows = [row for row in rows if (row["lr"], row["warmup"]) != (lr, warmup)]
        rows.append({"lr": lr, "warmup": warmup, "losses": losses_of(lr, warmup)})
        content = {"stream": "lm-four", "method": "eblora", "seed": SEED, "options": OPTIONS, "rows": rows}
        RESULT.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(lr, warmup, rows[-1]["losses"])


if __name__ == "__main__":
    main()
