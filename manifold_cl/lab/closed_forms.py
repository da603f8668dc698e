"""Problems whose optimum is a formula: eigenvalues, a polar factor, or the point that the problem was made from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from manifold_cl.lab.pictures import covariance, leading_directions
from manifold_cl.lab.problems import Problem


def draw_basis(n: int, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """An orthogonal matrix (n, n), split into its first k columns and the others."""
    draw = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=draw))[0]
    return q[:, :k].contiguous(), q[:, k:].contiguous()


def _gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class PrincipalComponents(Problem):
    """``−tr(xᵀCx)/2``: principal components of one picture's patches, off those of another picture.

    C is the covariance of patches of an elevation map, F holds the first k principal directions of the patches of a
    brain scan. Both pictures come with matplotlib. The optimum is minus half the sum of the p largest eigenvalues of
    PCP.
    """

    name: ClassVar[str] = "pca"
    known_by: ClassVar[str] = "eigenvalues"
    side: int = 12
    p: int = 6
    k: int = 16

    @cached_property
    def complement(self) -> Tensor:
        """The first principal directions of the other picture."""
        return leading_directions(self.side, self.k)

    @cached_property
    def matrix(self) -> Tensor:
        """The covariance C, scaled so that PCP has the largest eigenvalue 1."""
        c = covariance("elevation", self.side)
        scaled: Tensor = c / self._eigenvalues(c)[-1]
        return scaled

    @cached_property
    def optimum(self) -> float:
        """Minus half the sum of the p largest eigenvalues of PCP."""
        return -float(self._eigenvalues(self.matrix)[-self.p :].sum()) / 2

    def _eigenvalues(self, c: Tensor) -> Tensor:
        f = self.complement
        c = c - f @ (f.mT @ c)
        values: Tensor = torch.linalg.eigvalsh(c - (c @ f) @ f.mT)
        return values

    def cost(self, x: Tensor) -> Tensor:
        """``−tr(xᵀCx)/2``."""
        return -(x * (self.matrix @ x)).sum() / 2

    def gradient(self, x: Tensor) -> Tensor:
        """``−Cx``."""
        return -self.matrix @ x

    def hessian(self, x: Tensor, v: Tensor) -> Tensor:
        """``−Cv``."""
        return -self.matrix @ v


@dataclass(frozen=True)
class Brockett(Problem):
    """``tr(xᵀAxN)/2`` with N = diag(p, …, 1)/p: single eigenvectors, in order. Source: absil2008optimization, 4.8."""

    name: ClassVar[str] = "brockett"
    known_by: ClassVar[str] = "eigenvalues"
    n: int = 96
    p: int = 6
    k: int = 16
    seed: int = 1

    @cached_property
    def complement(self) -> Tensor:
        """Random directions."""
        return draw_basis(self.n, self.k, self.seed)[0]

    @cached_property
    def matrix(self) -> Tensor:
        """A random symmetric matrix of spectral norm 1."""
        a = _gaussian(self.n, self.n, seed=self.seed + 1)
        a = a + a.mT
        scaled: Tensor = a / torch.linalg.eigvalsh(a).abs().max()
        return scaled

    @cached_property
    def weights(self) -> Tensor:
        """The diagonal of N."""
        return torch.arange(self.p, 0, -1, dtype=torch.float64) / self.p

    @cached_property
    def optimum(self) -> float:
        """The smallest eigenvalues on the complement of F, the smallest with the largest weight."""
        free = draw_basis(self.n, self.k, self.seed)[1]
        values = torch.linalg.eigvalsh(free.mT @ self.matrix @ free)
        return float((values[: self.p] * self.weights).sum()) / 2

    def cost(self, x: Tensor) -> Tensor:
        """``tr(xᵀAxN)/2``."""
        return (x * (self.matrix @ x) * self.weights).sum() / 2

    def gradient(self, x: Tensor) -> Tensor:
        """``AxN``."""
        return self.matrix @ x * self.weights

    def hessian(self, x: Tensor, v: Tensor) -> Tensor:
        """``AvN``."""
        return self.matrix @ v * self.weights


@dataclass(frozen=True)
class Procrustes(Problem):
    """``|Ax − B|²/2`` with a tall A and B = A y for a point y: the optimum is 0."""

    name: ClassVar[str] = "procrustes"
    known_by: ClassVar[str] = "construction"
    n: int = 64
    p: int = 8
    k: int = 16
    rows: int = 160
    seed: int = 2

    @cached_property
    def complement(self) -> Tensor:
        """Random directions."""
        return draw_basis(self.n, self.k, self.seed)[0]

    @cached_property
    def matrix(self) -> Tensor:
        """A Gaussian A, scaled to spectral norm 1."""
        a = _gaussian(self.rows, self.n, seed=self.seed + 1)
        scaled: Tensor = a / torch.linalg.matrix_norm(a, 2)
        return scaled

    @cached_property
    def solution(self) -> Tensor:
        """The point y that B is made from."""
        return draw_basis(self.n, self.k, self.seed)[1][:, : self.p].contiguous()

    @cached_property
    def target(self) -> Tensor:
        """``B = A y``."""
        return self.matrix @ self.solution

    @property
    def optimum(self) -> float:
        """Zero."""
        return 0.0

    def cost(self, x: Tensor) -> Tensor:
        """``|Ax − B|²/2``."""
        return (self.matrix @ x - self.target).square().sum() / 2

    def gradient(self, x: Tensor) -> Tensor:
        """``Aᵀ(Ax − B)``."""
        return self.matrix.mT @ (self.matrix @ x - self.target)

    def hessian(self, x: Tensor, v: Tensor) -> Tensor:
        """``AᵀAv``."""
        return self.matrix.mT @ (self.matrix @ v)


@dataclass(frozen=True)
class Nearest(Problem):
    """``|x − B|²/2`` with p close to n − k: little room beside the columns of a point.

    The optimum is ``(|B|² + p)/2`` less the sum of the singular values of PB.
    """

    name: ClassVar[str] = "nearest"
    known_by: ClassVar[str] = "polar factor"
    n: int = 48
    p: int = 20
    k: int = 24
    seed: int = 3

    @cached_property
    def complement(self) -> Tensor:
        """Random directions."""
        return draw_basis(self.n, self.k, self.seed)[0]

    @cached_property
    def target(self) -> Tensor:
        """A Gaussian B, scaled to spectral norm 1."""
        b = _gaussian(self.n, self.p, seed=self.seed + 1)
        scaled: Tensor = b / torch.linalg.matrix_norm(b, 2)
        return scaled

    @cached_property
    def optimum(self) -> float:
        """``(|B|² + p)/2 − |PB|_*``."""
        b, f = self.target, self.complement
        return float((b.square().sum() + self.p) / 2 - torch.linalg.svdvals(b - f @ (f.mT @ b)).sum())

    def cost(self, x: Tensor) -> Tensor:
        """``|x − B|²/2``."""
        return (x - self.target).square().sum() / 2

    def gradient(self, x: Tensor) -> Tensor:
        """``x − B``."""
        return x - self.target

    def hessian(self, x: Tensor, v: Tensor) -> Tensor:
        """``v``."""
        return v


@dataclass(frozen=True)
class JointDiagonalisation(Problem):
    """``−Σ_i |diag(xᵀA_i x)|²/2`` for matrices that share their eigenvectors on the complement of F, p = n − k.

    The sum over columns is a convex function of the squared coordinates in these eigenvectors. With p = n − k the
    squared coordinates form a doubly stochastic matrix, and every permutation has the same cost: the optimum is minus
    half the sum of all squared eigenvalues.
    """

    name: ClassVar[str] = "joint_diagonalisation"
    known_by: ClassVar[str] = "construction"
    n: int = 32
    p: int = 12
    k: int = 20
    count: int = 8
    seed: int = 4

    @cached_property
    def complement(self) -> Tensor:
        """Random directions."""
        return draw_basis(self.n, self.k, self.seed)[0]

    @cached_property
    def eigenvalues(self) -> Tensor:
        """Eigenvalues (count, p), scaled so that the squares of a column sum to at most 1/2."""
        values = _gaussian(self.count, self.p, seed=self.seed + 1)
        scaled: Tensor = values / (2 * values.square().sum(0).max()).sqrt()
        return scaled

    @cached_property
    def matrices(self) -> Tensor:
        """The A_i (count, n, n), with random parts in F and between F and the rest, which a step must not use."""
        f, free = draw_basis(self.n, self.k, self.seed)
        rest = f @ _gaussian(self.count, self.k, self.n, seed=self.seed + 2) / self.n
        return (free * self.eigenvalues.unsqueeze(1)) @ free.mT + rest + rest.mT

    @cached_property
    def optimum(self) -> float:
        """Minus half the sum of all squared eigenvalues."""
        return -float(self.eigenvalues.square().sum()) / 2

    def cost(self, x: Tensor) -> Tensor:
        """``−Σ_i |diag(xᵀA_i x)|²/2``."""
        return -(x * (self.matrices @ x)).sum(-2).square().sum() / 2

    def gradient(self, x: Tensor) -> Tensor:
        """``−2 Σ_i A_i x diag(xᵀA_i x)``."""
        ax = self.matrices @ x
        return -2 * (ax * (x * ax).sum(-2, keepdim=True)).sum(0)

    def hessian(self, x: Tensor, v: Tensor) -> Tensor:
        """The derivative of the gradient along v."""
        ax, av = self.matrices @ x, self.matrices @ v
        diagonal, change = (x * ax).sum(-2, keepdim=True), 2 * (v * ax).sum(-2, keepdim=True)
        return -2 * (av * diagonal + ax * change).sum(0)
