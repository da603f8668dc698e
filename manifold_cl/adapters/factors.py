"""A low-rank update as its factors, and its product with inputs."""

from __future__ import annotations

from dataclasses import dataclass

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
