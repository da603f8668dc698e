"""Options of an adapter: cores, starts of the frames, and their validation."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from manifold_cl.adapters.base_layers import sides

Core = Literal["scalar", "diagonal", "full"]
CORES: tuple[str, ...] = get_args(Core)
Start = Literal["random", "pretrained"]
STARTS: tuple[str, ...] = get_args(Start)


def validate_core(core: str) -> None:
    """Raise for a name that is no core."""
    if core not in CORES:
        raise ValueError(f"core is one of {', '.join(CORES)}, got {core!r}")


def validate_start(start: str) -> None:
    """Raise for a name that is no start."""
    if start not in STARTS:
        raise ValueError(
            f"start is one of {', '.join(STARTS)}, got {start!r}; for a task's directions use point_along(left, right)"
        )


def validate_finite(**options: float) -> None:
    """Refuse a number that is NaN or infinite.

    Raises:
        ValueError: naming the option.
    """
    for name, value in options.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} is a finite number, got {value!r}")


def validate_rank(base: nn.Module, rank: int) -> None:
    """Refuse a rank that the layer's weight cannot have."""
    if not 1 <= rank <= min(sides(base)):
        raise ValueError(f"rank {rank} does not fit a weight of shape {sides(base)}: choose 1 to {min(sides(base))}")


def initial_core(core: str, rank: int, scale: float, *, device: torch.device | None = None) -> Tensor:
    """``scale`` times the identity, in the shape of the core and in float32: every core starts balanced."""
    if core == "scalar":
        return torch.tensor(float(scale), dtype=torch.float32, device=device)
    if core == "diagonal":
        return torch.full((rank,), float(scale), dtype=torch.float32, device=device)
    return float(scale) * torch.eye(rank, dtype=torch.float32, device=device)
