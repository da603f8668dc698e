"""Low-rank updates: factors, their product with inputs, sums and differences, and the spectrum of a core."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from manifold_cl.linalg import full_precision


@dataclass(frozen=True, eq=False)
class Factors:
    """The factors of an update ``ΔW = left · core · rightᵀ``: left (m, r), right (n, r) and a small core.

    The core is called magnitude: a 0-d number for a balanced update, (r,) for a diagonal, (r, r) for a full one.

    >>> Factors(torch.eye(3, 2), torch.eye(2), torch.tensor(0.5)).delta_weight()
    tensor([[0.5000, 0.0000],
            [0.0000, 0.5000],
            [0.0000, 0.0000]])
    """

    left: Tensor
    right: Tensor
    magnitude: Tensor

    @property
    def rank(self) -> int:
        """r, the number of columns."""
        return self.left.shape[-1]

    def apply(self, x: Tensor) -> Tensor:
        """``x · right · coreᵀ · leftᵀ`` for inputs as rows, in the input's precision. O((m + n) r) per row."""
        inner = x @ self.right.to(x.dtype)
        core = self.magnitude.to(x.dtype)
        inner = inner @ core.mT if core.ndim == 2 else inner * core
        return inner @ self.left.to(x.dtype).mT

    def weighted_left(self) -> Tensor:
        """``left · core`` (m, r), the output side of a plain two-factor form. O(m r²) for a full core."""
        return self.left @ self.magnitude if self.magnitude.ndim == 2 else self.magnitude * self.left

    def delta_weight(self) -> Tensor:
        """The update as a matrix (m, n). O(m n r)."""
        with full_precision(self.left.device):
            return self.weighted_left() @ self.right.mT

    def clone(self) -> Factors:
        """A copy that later training does not change."""
        return Factors(self.left.clone(), self.right.clone(), self.magnitude.clone())

    def detach(self) -> Factors:
        """The same tensors without their gradients."""
        return Factors(self.left.detach(), self.right.detach(), self.magnitude.detach())

    def minus(self, other: Factors) -> Factors:
        """The difference of two updates, exactly: their columns side by side, the second core negated."""
        cores = [f.magnitude if f.magnitude.ndim == 2 else f.magnitude.expand(f.rank).diag() for f in (self, other)]
        core: Tensor = torch.block_diag(cores[0], -cores[1])  # type: ignore[no-untyped-call]
        if self.magnitude.ndim < 2 and other.magnitude.ndim < 2:
            core = core.diagonal()
        left, right = torch.cat([self.left, other.left], dim=-1), torch.cat([self.right, other.right], dim=-1)
        return Factors(left, right, core.contiguous())


@dataclass(frozen=True, eq=False)
class Update:
    """The update of an adapter: its trained factors, less its start where that is compensated."""

    trained: Factors
    start: Factors | None = None

    def apply(self, x: Tensor) -> Tensor:
        """``ΔW x`` for inputs as rows."""
        output = self.trained.apply(x)
        # The same operations on equal numbers: before training the difference is exactly zero.
        return output if self.start is None else output - self.start.apply(x)

    def factors(self) -> Factors:
        """Detached factors: views of the parameters, or of rank 2r with a compensated start."""
        trained = self.trained.detach()
        return trained if self.start is None else trained.minus(self.start.detach())


def spectrum(scale: Tensor, rank: int) -> Tensor:
    """The r singular values of a core, descending, in float64: the update's over its scaling.

    >>> spectrum(torch.tensor([3.0, -4.0]), 2)
    tensor([4., 3.], dtype=torch.float64)
    """
    values = scale.detach().double()
    if values.ndim == 2:
        return cast(Tensor, torch.linalg.svdvals(values))
    return values.abs().expand(rank).sort(descending=True).values


def spectral_entropy(scale: Tensor, rank: int) -> float:
    """``−Σ p log p / log r`` of the energies p = σ² / Σσ², in [0, 1]; 1 for a balanced spectrum, and for r = 1.

    A scalar core has entropy 1 by construction. NaN for a core that is zero, which has no spectrum.

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
