"""Sketches of a layer's gradient by random projections, without a dense gradient.

The weight gradient ``G = Σ DᵀX`` (m, n), of inputs X (tokens × n) and output gradients D (tokens × m), is linear in the
tokens, so a few projections of it are summed instead.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple, cast

import torch
from torch import Tensor

from manifold_cl.continual.subspaces.statistic import Directions, Statistic
from manifold_cl.linalg import project_out

CHECKS = 10
"""Independent projections that estimate the energy outside the sketch: without bias, to a relative error of 1 / √5."""


class SingularTriplets(NamedTuple):
    """Leading singular triplets: left (m, q), sigma (q,) descending, right (n, q)."""

    left: Tensor
    sigma: Tensor
    right: Tensor


class Probes:
    """Gaussian test matrices by purpose and shape, drawn from one seed and shared by all layers of equal size.

    A matrix depends only on seed, purpose and shape, so that ranks and repeated passes agree.
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

    def forget(self) -> None:
        """Delete the matrices; they are drawn again, equal, when needed."""
        self._drawn.clear()


class GradientSketch(Statistic):
    """Range, co-range and core sketches of the gradient ``G = Σ DᵀX`` (m, n): O((m + n)ℓ) memory.

    With ``complement`` the sketched matrix is ``G (I − F Fᵀ)``, the gradient that a restricted adapter can follow.

    Source: tropp2019streaming, algorithms 4.1-4.3 (without truncation), Gaussian test matrices; the error estimate
    is its section 6.

    Args:
        m: outputs of the layer.
        n: inputs of the layer.
        size: ℓ, at least twice the needed rank; the core sketch has 2ℓ + 1 rows.
        generator: draws this sketch's own test matrices, three times the size of the sketch; or shared `Probes`.
        complement: F (n, k).
        device: of the layer.
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

        self._for_range, self._for_corange = gaussian("range", n, size), gaussian("co-range", m, size)
        self._core_in, self._core_out = gaussian("core in", n, core), gaussian("core out", m, core)
        if isinstance(generator, torch.Generator):  # another stream, so that later draws do not depend on the checks
            digest = hashlib.sha256(generator.get_state().numpy().tobytes()).digest()
            generator = Probes(int.from_bytes(digest[:7], "little"))
        self._for_check, zeros = gaussian("check", m, CHECKS), self._for_range.new_zeros
        self._range, self._corange, self._core = zeros(m, size), zeros(n, size), zeros(core, core)
        self._check = zeros(n, CHECKS)
        self._sums = (self._range, self._corange, self._core, self._check)
        self._probes = (self._for_range, self._for_corange, self._for_check)
        self._complement = complement

    @staticmethod
    def bytes_for(m: int, n: int, size: int, *, own_probes: bool = False) -> int:
        """Bytes of a float32 sketch; with ``own_probes`` also of its test matrices."""
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
        self._check += _few_columns(x, d, self._for_check)

    def triplets(self) -> SingularTriplets:
        """Approximate singular triplets of G, ℓ of them, in float64."""
        left, _ = torch.linalg.qr(self._range.double())
        right, _ = torch.linalg.qr(self._corange.double())
        outer = _solved(self._core_out.double().mT @ left, self._core.double())
        core = _solved(self._core_in.double().mT @ right, outer.mT).mT
        u, sigma, vt = torch.linalg.svd(core)
        return SingularTriplets(left @ u, sigma, right @ vt.mT)

    def importance(self) -> Directions:
        """Right singular directions times singular values; the total adds the energy outside them."""
        triplets = self.triplets()
        total = float(triplets.sigma.square().sum()) + self.missed(triplets)
        return Directions(triplets.right * triplets.sigma, total)

    def missed(self, triplets: SingularTriplets) -> float:
        """Unbiased estimate of ``|G − U Σ Vᵀ|_F²``, with a standard deviation of at most √(2/10) of it.

        From random projections of the error that are independent of the triplets. The missed energy is no larger.
        """
        return _missed(triplets.left, triplets.right * triplets.sigma, self._check, self._for_check)


class RangeSketch(Statistic):
    """``G Ω`` (m, ℓ): the first of two passes, which only finds the range of the gradient.

    Arguments are those of `GradientSketch`; ``probes`` are shared. Source: halko2011finding, algorithm 4.1.
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
        self._sums, self._probes = (self._range, self._check), (self._probe, self._for_check)
        self._complement = complement

    @staticmethod
    def bytes_for(m: int, n: int, size: int) -> int:
        """Bytes of the larger sketch of both passes, float32."""
        return 4 * ((m + n) * min(size, m, n) + n * CHECKS)

    def add(self, x: Tensor, d: Tensor) -> None:
        """Add ``dᵀ(x Ω)``. O(tokens · (m + n) ℓ)."""
        x = _outside(x, self._complement)
        self._range += d.mT @ (x @ self._probe)
        self._check += _few_columns(x, d, self._for_check)

    def importance(self) -> Directions:
        """Refuse: the importance needs a second pass."""
        raise TypeError("a range sketch has no importance: run a second pass with refined()")

    def refined(self) -> RefinedSketch:
        """The sketch for a second pass over the same data, inside the range of this one."""
        left, _ = torch.linalg.qr(self._range)
        return RefinedSketch(left, self._check, self._for_check, self._complement)


class RefinedSketch(Statistic):
    """``C = Gᵀ P`` (n, ℓ) for an orthonormal P (m, ℓ) that holds nearly all of the range of G.

    The second pass of a randomised SVD: ``P Cᵀ`` is the projection of G onto the range from the first pass. Errors of
    its right singular directions are products of two ratios of singular values instead of one, and its energy is exact.

    Source: halko2011finding, section 5.1. Made by `RangeSketch.refined`.
    """

    def __init__(self, left: Tensor, check: Tensor, for_check: Tensor, complement: Tensor | None) -> None:
        self.dtype = left.dtype
        self._left, self._check, self._for_check, self._complement = left, check, for_check, complement
        self._corange = left.new_zeros(check.shape[0], left.shape[1])
        self._sums, self._probes = (self._corange,), (left,)  # ranks must refine the same range

    def add(self, x: Tensor, d: Tensor) -> None:
        """Add ``xᵀ(d P)``. O(tokens · (m + n) ℓ)."""
        self._corange += _outside(x, self._complement).mT @ (d @ self._left)

    def triplets(self) -> SingularTriplets:
        """Singular triplets of ``P PᵀG``, in float64."""
        right, r = torch.linalg.qr(self._corange.double())
        u, sigma, vt = torch.linalg.svd(r.mT)
        return SingularTriplets(self._left.double() @ u, sigma, right @ vt.mT)

    def importance(self) -> Directions:
        """C itself; the total adds the energy outside the range of P."""
        columns = self._corange.double()
        missed = _missed(self._left.double(), columns, self._check, self._for_check)
        return Directions(columns, float(columns.square().sum()) + missed)


def _missed(left: Tensor, columns: Tensor, check: Tensor, for_check: Tensor) -> float:
    """Estimate of ``|G − left · columnsᵀ|_F²`` from the checks ``Gᵀ for_check``, all but the checks in float64."""
    return float((check.double() - columns @ (left.mT @ for_check.double())).square().sum()) / CHECKS


def _few_columns(x: Tensor, d: Tensor, test: Tensor) -> Tensor:
    """``xᵀ(d test)``, with the few columns of ``test`` as rows: the BLAS of CPUs takes a fifth of the time then."""
    return ((test.mT @ d.mT) @ x).mT


def _core_rows(m: int, n: int, size: int) -> int:
    return min(2 * size + 1, m, n)


def _outside(x: Tensor, complement: Tensor | None) -> Tensor:
    if complement is None or not complement.shape[1]:
        return x
    return project_out(x.mT, complement.to(x.dtype)).mT


def _solved(a: Tensor, b: Tensor) -> Tensor:
    # QR without pivoting: the CPU default, gelsy, reads uninitialised pivots, so that equal inputs give results that
    # differ by rounding between calls (torch 2.13).
    return cast(Tensor, torch.linalg.lstsq(a, b, driver="gels").solution)
