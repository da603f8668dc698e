"""The small dense algebra behind the tables: thin QR of tall factors, singular triples of their products."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Triples:
    """Updates of equally shaped layers as singular triples, ``ΔW = U diag(s) Vᵀ``.

    Ranks are numerical: the factors were rounded to float32, so what is smaller than that rounding of the
    largest value is no direction of the update. Its columns are zero.

    Frames are kept as Q of the thin QR and a small matrix that turns it: what two updates share is turned after
    the long products, which then serve many updates at once.
    """

    q_left: Tensor  # (L, m, r)
    q_right: Tensor  # (L, n, r)
    turn_left: Tensor  # (L, r, k)
    turn_right: Tensor  # (L, r, k)
    values: Tensor  # (L, k), descending
    rank: Tensor  # (L,)
    energy: Tensor  # (L,)

    @property
    def left(self) -> Tensor:
        """U, (L, m, k)."""
        return self.q_left @ self.turn_left

    @property
    def right(self) -> Tensor:
        """V, (L, n, k)."""
        return self.q_right @ self.turn_right

    def frames(self, place: int) -> tuple[Tensor, Tensor]:
        """U (m, k) and V (n, k) of one layer."""
        return self.q_left[place] @ self.turn_left[place], self.q_right[place] @ self.turn_right[place]

    @property
    def fourth(self) -> Tensor:
        """``Σ p²`` of the energy shares p, (L,); NaN for a zero update."""
        return self.values.pow(4).sum(-1) / self.energy.square()


def triples(left: Tensor, right: Tensor) -> Triples:
    """Singular triples of ``left rightᵀ`` by thin QR of both factors and the SVD of the r × r core."""
    (q_left, r_left), (q_right, r_right) = thin_qr(left), thin_qr(right)
    u, values, vt = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
    used = (values > torch.finfo(torch.float32).eps * values[:, :1]).to(values.dtype)
    return Triples(
        q_left=q_left,
        q_right=q_right,
        turn_left=u * used[:, None, :],
        turn_right=vt.mT * used[:, None, :],
        values=values,
        rank=used.sum(-1),
        energy=values.square().sum(-1),
    )


def shared(updates: Sequence[Triples]) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """(a, b, U_aᵀ U_b, V_aᵀ V_b) for every a before b; one long product a side for each a."""
    lefts, rights = (torch.cat([getattr(u, side) for u in updates], -1) for side in ("q_left", "q_right"))
    left_ends, right_ends = ([0], [0])
    for update in updates:
        left_ends.append(left_ends[-1] + update.q_left.shape[-1])
        right_ends.append(right_ends[-1] + update.q_right.shape[-1])
    for a, first in enumerate(updates[:-1]):
        outputs = first.turn_left.mT @ (first.q_left.mT @ lefts[..., left_ends[a + 1] :])
        inputs = first.turn_right.mT @ (first.q_right.mT @ rights[..., right_ends[a + 1] :])
        for b in range(a + 1, len(updates)):
            here = slice(left_ends[b] - left_ends[a + 1], left_ends[b + 1] - left_ends[a + 1])
            there = slice(right_ends[b] - right_ends[a + 1], right_ends[b + 1] - right_ends[a + 1])
            yield a, b, outputs[..., here] @ updates[b].turn_left, inputs[..., there] @ updates[b].turn_right


def thin_qr(x: Tensor) -> tuple[Tensor, Tensor]:
    """Q (L, n, k) with orthonormal columns and R with ``x = Q R``; Householder's, or products on a GPU.

    A batched Householder QR runs column by column on a GPU. There, tall factors in double precision go through
    two Cholesky factorisations of the Gram matrix. The second one removes the error of the first as long as the
    condition number is below 1e8, which factors rounded to float32 keep unless columns depend on each other;
    where they do, Householder's QR is taken after all.
    """
    if x.device.type == "cpu" or x.dtype != torch.float64 or x.shape[-2] < 4 * x.shape[-1]:
        found = torch.linalg.qr(x)
        return found.Q, found.R
    return cholesky_qr(x)


def cholesky_qr(x: Tensor) -> tuple[Tensor, Tensor]:
    """Thin QR by products in double precision, CholeskyQR2; Householder's where a Gram matrix is singular."""
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
