"""Learning rates that won a search, by width of the model and by method."""

from __future__ import annotations

import json
import math
from functools import cache
from importlib.resources import files
from typing import Any

from torch import nn

from manifold_cl.adapters.base_layers import sides
from manifold_cl.adapters.layers import named_linears
from manifold_cl.kinds import is_whole
from manifold_cl.plugins import unknown

RATES = ("lr", "scale_lr")


@cache
def _table() -> list[dict[str, Any]]:
    text = files("manifold_cl.continual").joinpath("rates.json").read_text(encoding="utf-8")
    return list(json.loads(text))


def searched_rates(model: Any, method: str = "eblora") -> dict[str, float]:
    """The rates that won the search on the model nearest in width: ``lr``, and ``scale_lr`` where the method has it.

    Pass them to `param_groups`, `TrainerOptimizer` or `make_method`. For a model wider than any that was searched,
    ``lr`` falls with the root of the width, so that a step turns a frame by the same angle: our choice, not a result
    (docs/choosing.md, "The table of rates").

    Args:
        model: a model, or its width (hidden size) as a number.
        method: name of a method.

    Raises:
        ValueError: for a method without a search, with the nearest names.

    >>> searched_rates(384)
    {'lr': 0.006, 'scale_lr': 0.02}
    """
    rows = [row for row in _table() if row["method"] == method and not row["options"].get("step")]
    if not rows:
        raise ValueError(unknown("method with searched rates", method, sorted({row["method"] for row in _table()})))
    width = width_of(model)
    best = {}  # of several searches at one width the one with the best score
    for row in sorted(rows, key=lambda row: row["mfn"]):
        best[row["width"]] = row
    nearest = min(best, key=lambda searched: abs(math.log(width / searched)))
    rates = {name: best[nearest]["options"][name] for name in RATES if name in best[nearest]["options"]}
    if width > max(best):
        rates["lr"] *= math.sqrt(nearest / width)
    return rates


def width_of(model: Any) -> int:
    """The hidden size of a transformers model, or the most common number of inputs of another model's linear layers.

    Raises:
        TypeError: for anything but a model or a positive number.
    """
    if is_whole(model) and model > 0:
        return model
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    if is_whole(size := getattr(config, "hidden_size", None)):
        return size
    if not isinstance(model, nn.Module):
        raise TypeError(f"a width is that of a model or a number above 0, got {model!r}")
    widths = [sides(layer)[1] for layer in named_linears(model).values()]
    if not widths:
        raise TypeError("the model has no linear layers, so it has no width: give a number")
    return max(widths, key=lambda n: (widths.count(n), n))
