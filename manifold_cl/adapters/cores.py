"""What stands between two frames: one number, a diagonal or a full matrix, and the spectrum it gives the update."""

from __future__ import annotations

from typing import Literal, cast, get_args

import torch
from torch import Tensor

Core = Literal["scalar", "diagonal", "full"]
CORES: tuple[str, ...] = get_args(Core)


def check_core(core: str) -> None:
    """Raise for a name that is no core."""
    if core not in CORES:
        raise ValueError(f"core is one of {', '.join(CORES)}, got {core!r}")


def initial_core(core: str, rank: int, scale: float, *, device: torch.device | None = None) -> Tensor:
    """``scale`` times the identity, in the shape of the core and in float32: every core starts balanced."""
    if core == "scalar":
        return torch.tensor(float(scale), dtype=torch.float32, device=device)
    if core == "diagonal":
        return torch.full((rank,), float(scale), dtype=torch.float32, device=device)
    return float(scale) * torch.eye(rank, dtype=torch.float32, device=device)


def spectrum(scale: Tensor, rank: int) -> Tensor:
    """The update's r singular values over its scaling, descending, in float64: those of the core alone.

    >>> spectrum(torch.tensor([3.0, -4.0]), 2)
    tensor([4., 3.], dtype=torch.float64)
    """
    values = scale.detach().double()
    if values.ndim == 2:
        return cast(Tensor, torch.linalg.svdvals(values))
    return values.abs().expand(rank).sort(descending=True).values


def spectral_entropy(scale: Tensor, rank: int) -> float:
    """``−Σ p log p / log r`` of the energies p = σ² / Σσ², in [0, 1]; 1 for a balanced spectrum, and for r = 1.

    A scalar core has entropy 1 by construction; NaN where the core is zero, as no spectrum is there yet.

    >>> spectral_entropy(torch.tensor(-0.3), 8)
    1.0
    """
    energy = spectrum(scale, rank).square()
    total = float(energy.sum())
    if not total > 0:
        return float("nan")
    if scale.numel() == 1:
        return 1.0
    p = energy / total
    return float(torch.special.entr(p).sum() / torch.tensor(float(rank), dtype=torch.float64).log())
