"""A low-rank update as its factors, and its product with inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from manifold_cl.linalg import full_precision


@dataclass(frozen=True, eq=False)
class Factors:
    """An update ``ΔW = left · core · rightᵀ`` as its factors: left (m, r), right (n, r) and a small core.

    The core is called magnitude: a 0-d number for a balanced update, (r,) for a diagonal, (r, r) for a full one.
    """

    left: Tensor
    right: Tensor
    magnitude: Tensor

    @property
    def rank(self) -> int:
        """r, the number of columns."""
        return self.left.shape[-1]

    def weighted_left(self) -> Tensor:
        """``left · core`` (m, r), the output side of a plain two-factor form. O(m r²) for a full core."""
        if self.magnitude.ndim == 2:
            return self.left @ self.magnitude
        return self.magnitude * self.left

    def delta_weight(self) -> Tensor:
        """The update as a matrix (m, n). O(m n r)."""
        with full_precision(self.left.device):
            return self.weighted_left() @ self.right.mT

    def clone(self) -> Factors:
        """A copy that later training does not change."""
        return Factors(self.left.clone(), self.right.clone(), self.magnitude.clone())

    def minus(self, other: Factors) -> Factors:
        """The difference of two updates, exactly: their columns side by side, the second core negated."""
        ours, theirs = (_core_matrix(f.magnitude, f.rank) for f in (self, other))
        core: Tensor = torch.block_diag(ours, -theirs)  # type: ignore[no-untyped-call]
        if self.magnitude.ndim < 2 and other.magnitude.ndim < 2:
            core = core.diagonal()
        return Factors(
            torch.cat([self.left, other.left], dim=-1), torch.cat([self.right, other.right], dim=-1), core.contiguous()
        )


def low_rank(x: Tensor, left: Tensor, right: Tensor, core: Tensor) -> Tensor:
    """``x · right · coreᵀ · leftᵀ`` for inputs as rows, in the input's precision. O((m + n) r) a row."""
    inner = x @ right.to(x.dtype)
    core = core.to(x.dtype)
    inner = inner @ core.mT if core.ndim == 2 else inner * core
    return inner @ left.to(x.dtype).mT


def _core_matrix(core: Tensor, rank: int) -> Tensor:
    return core if core.ndim == 2 else torch.diag(core.expand(rank))


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
