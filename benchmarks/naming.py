"""Held-out emoji named by the projector of ``vlm-three``: a choice among 20 names, with a 95 % interval.

    python benchmarks/naming.py

Trains the projector first if the cache has none. Writes ``benchmarks/results/naming.json``.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from manifold_cl.continual.environment import library_versions, machine
from manifold_cl.files import write_json
from manifold_cl.streams.emoji import Emoji, Painter
from manifold_cl.streams.picture_streams import RECIPE, emoji_parts, load_small_llava
from manifold_cl.streams.projector_training import Namer, naming_accuracy
from manifold_cl.streams.small_llava import picture_tokenizer
from manifold_cl.streams.vision_tower import normalised

CHOICES = 20


def main() -> None:
    """Measure and write."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    start = time.process_time()
    model: Any = load_small_llava()
    seconds = time.process_time() - start
    parts = emoji_parts()
    namer = Namer(model, picture_tokenizer(), [e.name for e in parts["train"][: RECIPE.shots]])
    pooled = pooled_in_the_middle(model, parts["test"])
    right = naming_accuracy(namer, pooled, namer.names(parts["test"]), choices=CHOICES)
    share, n = sum(right) / len(right), len(right)
    low, high = wilson(share, n)
    content = {
        "question": f"the likeliest of {CHOICES} names, per token; names and pictures were never trained on",
        "recipe": asdict(RECIPE),
        "trained_on": len(parts["train"]),
        "pictures": n,
        "chance": 100 / CHOICES,
        "right": round(100 * share, 1),
        "interval_95": [round(100 * low, 1), round(100 * high, 1)],
        "cpu_seconds": round(seconds),
        "named": [e.name for e, good in zip(parts["test"], right, strict=True) if good],
        "versions": library_versions(),
        "machine": machine(),
    }
    write_json(Path(__file__).parent / "results" / "naming.json", content)
    print({name: content[name] for name in ("pictures", "chance", "right", "interval_95", "cpu_seconds")})


@torch.no_grad()
def pooled_in_the_middle(model: Any, emoji: tuple[Emoji, ...]) -> torch.Tensor:
    """The pooled states of every emoji in the middle of its picture."""
    painter = Painter(RECIPE.side)
    pixels = normalised(torch.stack([painter.paint(e.character) for e in emoji]))
    hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
    pooled: torch.Tensor = model.model.multi_modal_projector.pool(hidden)
    return pooled


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of Wilson for a share of ``n``."""
    middle, spread = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)


if __name__ == "__main__":
    main()
