"""Runs every method, with its settings, and prints which global state each changed: a JSON object by method.

A process of its own, because the tests' type checks draw from Python's global generator themselves.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from old_versions import HAS_MUON
from toy import toy_stream

from manifold_cl import METHODS, ContinualRunner
from manifold_cl.continual import Training, make_method

SETTINGS: dict[str, list[dict[str, Any]]] = {
    "eblora": [{}, {"statistics_at": "pretrained", "from_weights": 0.3, "source": "gradient"}, {"step": "official"}],
    "balanced": [{}, {"step": "spectral", "lr": 0.05}],
    "stella_merge": [{}, {"core": "full"}],
}
"""Settings that run other code; of methods that are not listed the defaults run."""


def global_state() -> dict[str, Any]:
    """What a library must leave as it found it."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": (kind, np.asarray(keys).tolist(), *rest),
        "python": random.getstate(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
    }


def main(folder: Path) -> None:
    """Run all of them in subfolders of ``folder``."""
    changed: dict[str, list[str]] = {}
    missing = set() if HAS_MUON else {"lora_muon"}
    for name in sorted(set(METHODS) - missing):
        for number, settings in enumerate(SETTINGS.get(name, [{}])):
            rank = {"rank": 4} if "rank" in make_method(name).options() else {}
            method = make_method(name, **rank, **settings)
            before = global_state()
            stream = toy_stream(tasks=["first", "second"], examples=32)
            ContinualRunner(stream, method, folder / f"{name}-{number}", training=Training()).run()
            after = global_state()
            changed.setdefault(name, []).extend(key for key in before if before[key] != after[key])
    print(json.dumps(changed))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
