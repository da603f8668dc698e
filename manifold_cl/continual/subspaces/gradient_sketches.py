"""The gradient of a layer from random projections of it: never a dense gradient, never a gradient of a weight.

The mean weight gradient ``G = Σ DᵀX`` (m, n), of inputs X (tokens × n) and output gradients D (tokens × m), is
linear in the tokens, so a few projections of it can be summed instead.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from manifold_cl.continual.subspaces.statistic import Directions, Statistic
from manifold_cl.linalg import project_out

CHECKS = 10
"""Independent projections that only measure what the sketch missed: its energy to 1 / √5, without bias."""


class SingularTriplets(NamedTuple):
    """Leading singular triplets: left (m, q), sigma (q,) descending, right (n, q)."""

    left: Tensor
    sigma: Tensor
    right: Tensor


class Probes:
    """Gaussian test matrices by purpose and shape, drawn from one seed and shared by all layers of equal size.

    A matrix depends on the seed, its purpose and its shape alone: not on which layers were served before, so that
    ranks and repeated passes agree.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._drawn: dict[tuple[str, int, int, str], Tensor] = {}

    def gaussian(self, purpose: str, rows: int, columns: int, device: torch.device | str) -> Tensor:
        """The matrix (rows, columns) for ``purpose``."""
        key = (purpose, rows, columns, str(device))
        if key not in self._drawn:
            digest = hashlib.sha256(repr((self.seed, *key[:3])).encode()).digest()
            draw = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            self._drawn[key] = torch.randn(rows, columns, generator=draw).to(device)
        return self._drawn[key]

    def nbytes(self) -> int:
        """Memory of what is drawn."""
        return sum(t.numel() * t.element_size() for t in self._drawn.values())

    def forget(self) -> None:
        """Let go of what is drawn; asked again, it comes out the same."""
        self._drawn.clear()


class GradientSketch(Statistic):
    """Range, co-range and core sketches of the gradient ``G = Σ DᵀX`` (m, n): O((m + n)ℓ) memory.

    With ``complement`` the sketched matrix is ``G (I − F Fᵀ)``, the gradient that a restricted adapter can follow.

    Source: tropp2019streaming, algorithms 4.1-4.3 (without truncation), Gaussian test matrices; the error estimate
    is its section 6.

    Args:
        m: outputs of the layer.
        n: inputs of the layer.
        size: ℓ, at least twice the rank that is wanted; the core sketch has 2ℓ + 1 rows.
        generator: draws test matrices of this sketch's own, three times the sketch's size; or shared `Probes`.
        complement: F (n, k).
        device: where the layer lives.
        dtype: float32, or float64 for a model in float64.
    """

    def __init__(
        self,
        m: int,
        n: int,
        *,
        size: int,
        generator: torch.Generator | Probes,
        complement: Tensor | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        size = min(size, m, n)
        core = _core_rows(m, n, size)
        self.dtype = dtype

        def gaussian(purpose: str, rows: int, columns: int) -> Tensor:
            if isinstance(generator, Probes):
                drawn = generator.gaussian(purpose, rows, columns, device)
            else:
                drawn = torch.randn(rows, columns, generator=generator, device=generator.device).to(device)
            return drawn.to(dtype)

        def zeros(rows: int, columns: int) -> Tensor:
            return torch.zeros(rows, columns, device=device, dtype=dtype)

        self._for_range, self._for_corange = gaussian("range", n, size), gaussian("co-range", m, size)
        self._core_in, self._core_out = gaussian("core in", n, core), gaussian("core out", m, core)
        if isinstance(generator, torch.Generator):  # a stream of its own: later draws stay what they were without it
            digest = hashlib.sha256(generator.get_state().numpy().tobytes()).digest()
            generator = Probes(int.from_bytes(digest[:7], "little"))
        self._for_check = gaussian("check", m, CHECKS)
        self._range, self._corange, self._core = zeros(m, size), zeros(n, size), zeros(core, core)
        self._check = zeros(n, CHECKS)
        self._complement = complement

    @staticmethod
    def bytes_for(m: int, n: int, size: int, *, own_probes: bool = False) -> int:
        """Memory of a float32 sketch; with ``own_probes`` that of its test matrices too."""
        size = min(size, m, n)
        core = _core_rows(m, n, size)
        probes = (m + n) * (size + core) + m * CHECKS
        return 4 * ((m + n) * size + core * core + n * CHECKS + own_probes * probes)

    @property
    def size(self) -> int:
        """ℓ."""
        return self._range.shape[1]

    def add(self, x: Tensor, d: Tensor) -> None:
        """Add ``dᵀx`` to the sketches. O(tokens · (m + n) ℓ)."""
        x = _outside(x, self._complement)
        self._range += d.mT @ (x @ self._for_range)
        self._corange += x.mT @ (d @ self._for_corange)
        self._core += (d @ self._core_out).mT @ (x @ self._core_in)
        self._check += x.mT @ (d @ self._for_check)

    def sums(self) -> list[Tensor]:
        """The four sketches."""
        return [self._range, self._corange, self._core, self._check]

    def draws(self) -> float:
        """Sum of the first rows of the test matrices."""
        return float(sum(p[0].double().sum() for p in (self._for_range, self._for_corange, self._for_check)))

    def triplets(self) -> SingularTriplets:
        """Approximate singular triplets of G, as many as the sketch holds, in float64."""
        left, _ = torch.linalg.qr(self._range.double())
        right, _ = torch.linalg.qr(self._corange.double())
        outer = _solved(self._core_out.double().mT @ left, self._core.double())
        core = _solved(self._core_in.double().mT @ right, outer.mT).mT
        u, sigma, vt = torch.linalg.svd(core)
        return SingularTriplets(left @ u, sigma, right @ vt.mT)

    def importance(self) -> Directions:
        """Right singular directions times singular values; the total adds what the checks see beside them."""
        found = self.triplets()
        return Directions(found.right * found.sigma, float(found.sigma.square().sum()) + self.missed(found))

    def missed(self, found: SingularTriplets) -> float:
        """Unbiased estimate of ``|G − U Σ Vᵀ|_F²``, the squared error of these triplets of the sketch.

        From random projections of the error that had no part in the triplets. Its deviation is at most √(2/10) of
        it, and less for an error of many directions. The energy that the triplets lack is no larger.
        """
        explained = (found.right * found.sigma) @ (found.left.mT @ self._for_check.double())
        return float((self._check.double() - explained).square().sum()) / CHECKS


class RangeSketch(Statistic):
    """``G Ω`` (m, ℓ): the first of two looks, which only finds where the range of the gradient lies.

    Source: halko2011finding, algorithm 4.1.

    Args:
        m: outputs of the layer.
        n: inputs of the layer.
        size: ℓ.
        probes: the shared test matrices.
        complement: F (n, k), as in `GradientSketch`.
        device: where the layer lives.
        dtype: float32, or float64 for a model in float64.
    """

    def __init__(
        self,
        m: int,
        n: int,
        *,
        size: int,
        probes: Probes,
        complement: Tensor | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.dtype = dtype
        self._probe = probes.gaussian("range", n, min(size, m, n), device).to(dtype)
        self._for_check = probes.gaussian("check", m, CHECKS, device).to(dtype)
        self._range = self._probe.new_zeros(m, self._probe.shape[1])
        self._check = self._probe.new_zeros(n, CHECKS)
        self._complement = complement

    @staticmethod
    def bytes_for(m: int, n: int, size: int) -> int:
        """Memory of the larger of both looks, float32."""
        return 4 * ((m + n) * min(size, m, n) + n * CHECKS)

    def add(self, x: Tensor, d: Tensor) -> None:
        """Add ``dᵀ(x Ω)``. O(tokens · (m + n) ℓ)."""
        x = _outside(x, self._complement)
        self._range += d.mT @ (x @ self._probe)
        self._check += x.mT @ (d @ self._for_check)

    def sums(self) -> list[Tensor]:
        """Range sketch and checks."""
        return [self._range, self._check]

    def draws(self) -> float:
        """Sum of the first rows of the test matrices."""
        return float(self._probe[0].double().sum() + self._for_check[0].double().sum())

    def importance(self) -> Directions:
        """Nothing yet: one look finds a range, not what lies along it."""
        raise TypeError("a range is half an answer: look at the data again with refined()")

    def refined(self) -> RefinedSketch:
        """The second look: what the same data, read again, say about the range that this sketch found."""
        left, _ = torch.linalg.qr(self._range)
        return RefinedSketch(left, self._check, self._for_check, self._complement)


class RefinedSketch(Statistic):
    """``C = Gᵀ P`` (n, ℓ) for an orthonormal P (m, ℓ) that holds nearly all of the range of G.

    The second pass of a randomised SVD: ``P Cᵀ`` is the projection of G onto the range that one pass found. Errors of
    its right singular directions are products of two ratios of singular values where one pass leaves one, and the
    energy it holds is exact.

    Source: halko2011finding, section 5.1. Made by `RangeSketch.refined`.
    """

    def __init__(self, left: Tensor, check: Tensor, for_check: Tensor, complement: Tensor | None) -> None:
        self.dtype = left.dtype
        self._left, self._check, self._for_check, self._complement = left, check, for_check, complement
        self._corange = left.new_zeros(check.shape[0], left.shape[1])

    def add(self, x: Tensor, d: Tensor) -> None:
        """Add ``xᵀ(d P)``. O(tokens · (m + n) ℓ)."""
        self._corange += _outside(x, self._complement).mT @ (d @ self._left)

    def sums(self) -> list[Tensor]:
        """The one sketch."""
        return [self._corange]

    def draws(self) -> float:
        """Sum of the first row of P: ranks must refine the same range."""
        return float(self._left[0].double().sum())

    def triplets(self) -> SingularTriplets:
        """Singular triplets of ``P PᵀG``, in float64."""
        right, r = torch.linalg.qr(self._corange.double())
        u, sigma, vt = torch.linalg.svd(r.mT)
        return SingularTriplets(self._left.double() @ u, sigma, right @ vt.mT)

    def importance(self) -> Directions:
        """C itself; the total adds what the checks see outside the range of P."""
        columns = self._corange.double()
        explained = columns @ (self._left.double().mT @ self._for_check.double())
        missed = float((self._check.double() - explained).square().sum()) / CHECKS
        return Directions(columns, float(columns.square().sum()) + missed)


def _core_rows(m: int, n: int, size: int) -> int:
    return min(2 * size + 1, m, n)


def _outside(x: Tensor, complement: Tensor | None) -> Tensor:
    if complement is None or not complement.shape[1]:
        return x
    return project_out(x.mT, complement.to(x.dtype)).mT


def _solved(a: Tensor, b: Tensor) -> Tensor:
    """The least-squares solution of ``a x = b`` for a tall matrix of full rank.

    By QR without pivoting: the CPU default, ``gelsy``, starts from pivots in memory that nobody set, so that equal
    inputs give results that differ by rounding from call to call (torch 2.13).
    """
    solution: Tensor = torch.linalg.lstsq(a, b, driver="gels").solution
    return solution
