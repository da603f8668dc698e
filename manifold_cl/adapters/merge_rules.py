"""Rules that merge the entries of several updates, from PEFT: TIES, DARE and magnitude pruning."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from manifold_cl.rules import validate_share

RuleName = Literal["ties", "dare", "dare_ties", "magnitude"]


def entry_rule(
    name: str, weights: Sequence[float], *, density: float, seed: int = 0
) -> Callable[[str, Tensor], Tensor]:
    """A function of a layer's name and its updates (T, m, n), as `analysis.adapters.merged` takes it, computed by PEFT.

    ``"ties"`` keeps the largest entries of each update and averages those that have the sign of their sum
    (yadav2023ties). ``"dare"`` keeps entries at random, divides them by `density`, and adds them (yu2024language);
    ``"dare_ties"`` does both. ``"magnitude"`` keeps the largest entries and adds them. The random choice depends on
    `seed` and on the layer's name, and leaves torch's own random state as it is.

    Args:
        name: the rule.
        weights: one factor per task.
        density: share of the entries that is kept, above 0 and below 1.
        seed: seed of the entries that ``"dare"`` keeps.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: an unknown rule, or a density outside (0, 1).
    """
    try:
        from peft.utils import merge_utils
    except ImportError as error:
        raise ImportError(f"the rule {name!r} needs PEFT: pip install 'peft>=0.21,<0.22'") from error
    if name not in get_args(RuleName):
        raise ValueError(f"rule is {name!r}, choose one of {', '.join(get_args(RuleName))}")
    validate_share("density", density, one=False)
    functions = {
        "ties": merge_utils.ties,
        "dare": merge_utils.dare_linear,
        "dare_ties": merge_utils.dare_ties,
        "magnitude": merge_utils.magnitude_prune,
    }

    def rule(layer: str, updates: Tensor) -> Tensor:
        devices = [updates.device] if updates.device.type == "cuda" else []
        factors = torch.tensor(weights, dtype=updates.dtype, device=updates.device)
        with torch.random.fork_rng(devices=devices):
            # Not torch.manual_seed, which would seed all other devices of the process too, for good.
            drawn_from = torch.cuda.default_generators[updates.device.index] if devices else torch.default_generator
            drawn_from.manual_seed(seed + zlib.crc32(layer.encode()))
            merged: Tensor = functions[name](list(updates), factors, density)
        return merged

    return rule
