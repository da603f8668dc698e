"""Thin QR of tall factors, and singular triples of low-rank updates."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Triples:
    """Updates of L equally shaped layers as singular triples, ``ΔW = U diag(s) Vᵀ``.

    Ranks are numerical: a singular value below the float32 rounding of the largest one is no direction of the
    update. Its columns of U and V are zero.
    """

    left: Tensor  # U, (L, m, r)
    right: Tensor  # V, (L, n, r)
    values: Tensor  # s, (L, r), descending
    rank: Tensor  # (L,)
    energy: Tensor  # (L,)

    @property
    def squared_shares(self) -> Tensor:
        """``Σ p²`` of the energy shares p, (L,); NaN for a zero update."""
        return self.values.pow(4).sum(-1) / self.energy.square()


def triples(left: Tensor, right: Tensor) -> Triples:
    """Singular triples of ``left rightᵀ``, from thin QR of both factors and the SVD of the r × r core."""
    (q_left, r_left), (q_right, r_right) = thin_qr(left), thin_qr(right)
    u, values, vt = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
    used = (values > torch.finfo(torch.float32).eps * values[:, :1]).to(values.dtype)
    return Triples(
        left=q_left @ (u * used[:, None, :]),
        right=q_right @ (vt.mT * used[:, None, :]),
        values=values,
        rank=used.sum(-1),
        energy=values.square().sum(-1),
    )


@dataclass(frozen=True, eq=False)
class Decomposition:
    """Updates of T tasks to L equally shaped layers, as coordinates in bases that all tasks share.

    All factors side by side have ``R = Σ r_t`` columns and take one thin QR per side (docs/analysis.md, "Analysis of
    updates").
    """

    left: Tensor  # (L, min(m, R), R), upper triangular
    right: Tensor  # (L, min(n, R), R), upper triangular
    ranks: tuple[int, ...]
    known: tuple[Triples, ...] | None = None
    """The triples of `updates`, where they are known without a computation."""

    @property
    def columns(self) -> list[slice]:
        """The columns of each task's factors."""
        ends = torch.tensor(self.ranks).cumsum(0).tolist()
        return [slice(end - rank, end) for end, rank in zip(ends, self.ranks, strict=True)]

    @cached_property
    def updates(self) -> tuple[Triples, ...]:
        """The singular triples of each task's update, U and V in coordinates."""
        if self.known is not None:
            return self.known
        return tuple(triples(self.left[..., task], self.right[..., task]) for task in self.columns)

    def accumulated_values(self) -> list[Tensor]:
        """Singular values (L, k) of the sum of all updates up to each task: the product of the leading columns."""
        ends = [task.stop for task in self.columns[1:]]
        sums = [torch.linalg.svdvals(self.left[:, :end, :end] @ self.right[:, :end, :end].mT) for end in ends]
        return [self.updates[0].values, *sums]

    def pairs(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """(a, b, U_aᵀ U_b, V_aᵀ V_b) for every task a before b."""
        for a, b in combinations(range(len(self.ranks)), 2):
            first, second = self.updates[a], self.updates[b]
            yield a, b, first.left.mT @ second.left, first.right.mT @ second.right


def decompose(lefts: Tensor, rights: Tensor, ranks: Sequence[int]) -> Decomposition:
    """The decomposition of stacked factors (L, m, R) and (L, n, R). O((m + n) R²) per layer."""
    return Decomposition(triangle(lefts), triangle(rights), tuple(ranks))


def decompose_aligned(left: Tensor) -> Decomposition:
    """The decomposition of one task's factors ``U diag(σ)`` (L, m, r) and ``V``, with orthonormal columns: O(m r).

    The left columns have the norms σ. U and V are the bases of the coordinates.
    """
    values = torch.linalg.vector_norm(left, dim=-2).cummin(-1).values  # rounding may change the order of equal values
    used = (values > torch.finfo(torch.float32).eps * values[:, :1]).to(values.dtype)
    eye = torch.eye(values.shape[-1], dtype=values.dtype, device=values.device)
    sides = eye * used[:, None, :]
    known = Triples(sides, sides, values, used.sum(-1), values.square().sum(-1))
    return Decomposition(torch.diag_embed(values), eye.expand(len(values), -1, -1), (values.shape[-1],), (known,))


def triangle(x: Tensor) -> Tensor:
    """R of the thin QR. Householder's keeps every column to rounding, where a Gram matrix squares the condition."""
    if x.device.type != "cpu":
        return thin_qr(x)[1]
    with _one_thread():
        r: Tensor = torch.linalg.qr(x, mode="r")[1]
    return r


def thin_qr(x: Tensor) -> tuple[Tensor, Tensor]:
    """Q (L, n, k) with orthonormal columns and R with ``x = Q R``; Householder's, or products on a GPU.

    A batched Householder QR runs column by column on a GPU, so tall factors in double precision take `cholesky_qr`.
    """
    if x.device.type == "cpu" or x.dtype != torch.float64 or x.shape[-2] < 4 * x.shape[-1]:
        with _one_thread():
            q, r = torch.linalg.qr(x)
        return q, r
    return cholesky_qr(x)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Runs LAPACK on one thread: for few columns several threads wait for each other at every column."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def cholesky_qr(x: Tensor) -> tuple[Tensor, Tensor]:
    """Thin QR by products in double precision, CholeskyQR2; Householder's where a Gram matrix is singular.

    The second factorisation removes the error of the first while the condition number is below 1e8.
    """
    norms = torch.linalg.vector_norm(x, dim=-2, keepdim=True)
    scaled = x / torch.where(norms > 0, norms, 1.0)
    first, failed = torch.linalg.cholesky_ex(scaled.mT @ scaled, upper=True)
    q = torch.linalg.solve_triangular(first, scaled, upper=True, left=False)
    gram = q.mT @ q
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    error = torch.linalg.matrix_norm(gram - eye)
    second, again = torch.linalg.cholesky_ex(gram, upper=True)
    q = torch.linalg.solve_triangular(second, q, upper=True, left=False)
    r = second @ first * norms
    # Beyond an error of 0.1 the second factorisation no longer reaches rounding.
    bad = (failed > 0) | (again > 0) | ~(error < 0.1)
    if bad.any():
        q, r = q.clone(), r.clone()
        q[bad], r[bad] = torch.linalg.qr(x[bad])
    return q, r


CONDITIONED = 1e-3
"""Least diagonal entry of the triangle of normed columns for which one Gram matrix is used: its error is then 1e-10."""


def tall_frames(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """V (L, r, n) as rows, singular values (L, r) and numerical ranks (L,) of many updates ``left rightᵀ``; float64.

    The factors are given as rows too, left (L, r, m) and right (L, r, n). For U in place of V, exchange them.

    One Gram matrix per factor in double precision, a tenth of the time of Householder's QR. Its error grows with the
    square of the condition number, so factors with nearly dependent columns take `triples`.
    """
    (first, good), (second, fine) = _gram_triangle(left), _gram_triangle(right)
    if not (good & fine).all():
        parts = triples(left.mT, right.mT)
        return parts.right.mT, parts.values, parts.rank
    _, values, vt = torch.linalg.svd(first @ second.mT)
    kept = (values > torch.finfo(torch.float32).eps * values[:, :1]).to(values.dtype)
    inner = torch.linalg.solve_triangular(second, vt.mT * kept[:, None, :], upper=True)
    return inner.mT @ right, values, kept.sum(-1)


def _gram_triangle(rows: Tensor) -> tuple[Tensor, Tensor]:
    """R of ``rowsᵀ = Q R`` from the Gram matrix, and whether the rows are well conditioned."""
    gram = rows @ rows.mT
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    safe = torch.where(norms > 0, norms, 1.0)
    upper, failed = torch.linalg.cholesky_ex(gram / (safe[:, :, None] * safe[:, None, :]), upper=True)
    least = upper.diagonal(dim1=-2, dim2=-1).amin(-1)
    return upper * norms[:, None, :], (failed == 0) & (least > CONDITIONED)
