"""Protected subspaces: an orthonormal basis that grows by energy, and validation of bases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from manifold_cl.geometry.compact_bases import pack, unpack
from manifold_cl.linalg import is_finite, project_out, sym
from manifold_cl.rules import validate_share, validate_whole

ROUNDING = 1e-12
"""Rounding of a float64 sum of energies: a threshold missed by less adds no column."""
NOISE = 1e-20
"""Share of the energy below which a direction is rounding of a float64 SVD."""
TINY = 1e-300
"""Avoids a division by an energy of zero."""

Array = npt.NDArray[Any]

ThresholdRule = Literal["inclusive", "exclusive"]
"""Whether the column that crosses an energy threshold is protected. EBLoRA and KeepLoRA include it. GPM and InfLoRA
exclude it while nothing is protected (unless it is the only one), and include it from the second task on. For the
spectrum 3, 2, 1, ½ and the threshold 0.97 a first task adds three columns or two."""


@dataclass(frozen=True, eq=False)
class ProtectedSubspace:
    """An orthonormal basis F (n, k) of the directions that matter to earlier tasks; k may be 0.

    Immutable: growing returns a new subspace, whose first columns are the old ones.

    Raises:
        TypeError: for a basis that is no tensor or array, or in half precision, which leaks 1e-4 of a vector.
        ValueError: for a basis that is not a matrix, is wider than tall, or is not orthonormal to 1e-4.
    """

    basis: Tensor
    packed: Tensor | None = field(default=None, repr=False)
    """The columns in six bits per entry, from which ``basis`` is computed; None for a basis that is stored as it is."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "basis", as_basis(self.basis))
        check_basis(self.basis)
        if self.basis.ndim != 2:
            raise ValueError(f"a subspace is one matrix (n, k), got shape {tuple(self.basis.shape)}")
        basis = self.basis.double()
        worst = float((basis.mT @ basis - torch.eye(self.k).to(basis)).abs().max()) if self.k else 0.0
        if not worst < 1e-4:  # ten times what float32 QR leaves at n = 10⁴; a half-precision basis fails it
            raise ValueError(
                f"the basis is not orthonormal: max|FᵀF − I| = {worst:.1e}; "
                "build it with ProtectedSubspace.from_directions"
            )

    @classmethod
    def from_packed(cls, packed: Tensor, n: int) -> ProtectedSubspace:
        """The subspace of Rⁿ that ``packed`` columns define (`compacted`); ValueError where they define none."""
        return cls(unpack(packed, n), packed)

    def compacted(self, old: ProtectedSubspace | None = None) -> ProtectedSubspace:
        """The near subspace that six bits per entry define: a fifth of the bytes, for about 1e-3 of the energy.

        ``old`` has the first columns; they keep their bits, since the decomposition goes from left to right.

        >>> subspace = ProtectedSubspace.from_directions(torch.randn(64, 5)).compacted()
        >>> bool((ProtectedSubspace.from_packed(subspace.packed, 64).basis == subspace.basis).all())
        True
        """
        if old is None or old.packed is None:
            return self.from_packed(pack(self.basis), self.n)
        return self.from_packed(torch.cat([old.packed, pack(self.basis[:, old.k :])]), self.n)

    def to(self, device: torch.device) -> ProtectedSubspace:
        """The same subspace on another device."""
        return ProtectedSubspace(self.basis.to(device), None if self.packed is None else self.packed.to(device))

    @classmethod
    def empty(
        cls, n: int, *, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> ProtectedSubspace:
        """The subspace {0} of Rⁿ: nothing is protected."""
        validate_whole("n", n, least=0)
        return cls(torch.zeros(n, 0, dtype=dtype, device=device))

    @classmethod
    def from_directions(
        cls, a: Tensor | Array, *, energy: float | None = None, rank: int | None = None
    ) -> ProtectedSubspace:
        """The leading left singular directions of ``a`` (n, N): by share of energy, by number, or its whole range.

        Args:
            a: directions as columns, weighted by their length.
            energy: in (0, 1]; the fewest columns whose squared singular values reach this share.
            rank: number of columns instead.
        """
        if energy is not None and rank is not None:
            raise ValueError("give an energy share or a rank, not both")
        a = as_basis(a)
        dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
        empty = cls.empty(a.shape[0], dtype=dtype, device=a.device)
        return empty.extended(a, energy=1.0 if energy is None else energy, rank=rank)

    @property
    def n(self) -> int:
        """Dimension of the surrounding space."""
        return self.basis.shape[0]

    @property
    def k(self) -> int:
        """Dimension of the subspace."""
        return self.basis.shape[1]

    def project(self, x: Tensor) -> Tensor:
        """``F Fᵀ x``, the part of x (…, n, p) inside the subspace."""
        self._require_fitting(x)
        return self.basis @ (self.basis.mT @ x)

    def project_out(self, x: Tensor) -> Tensor:
        """``x − F Fᵀ x``, the part of x (…, n, p) orthogonal to the subspace."""
        self._require_fitting(x)
        return project_out(x, self.basis)

    def project_out_twice(self, x: Tensor) -> Tensor:
        """`project_out` twice in float64: the second pass removes the rounding errors of the first (Kahan's rule)."""
        self._require_fitting(x, any_dtype=True)
        basis = self.basis.double()
        return project_out(project_out(x.double(), basis), basis)

    def energy_fraction(self, x: Tensor) -> float:
        """``|Fᵀx|² / |x|²`` in [0, 1]; 0 for x = 0."""
        self._require_fitting(x)
        total = float(x.square().sum())
        return float((self.basis.mT @ x).square().sum()) / total if total > 0 else 0.0

    def capacity(self, rank: int) -> int:
        """Number of columns that can be added while points of ``rank`` columns exist: n − k − rank, at least 0."""
        validate_whole("rank", rank, least=0)
        return max(self.n - self.k - rank, 0)

    def extended(
        self,
        directions: Tensor,
        *,
        energy: float = 1.0,
        rank: int | None = None,
        total: float | None = None,
        threshold_rule: ThresholdRule = "inclusive",
    ) -> ProtectedSubspace:
        """The smallest extension that holds the share ``energy`` of ``directions`` (n, N); old columns stay first.

        Adds left singular vectors of the part outside the subspace, in float64, until ``|Fᵀa|² ≥ energy · |a|²``; none
        if the old columns suffice (the energy rule of saha2021gpm).

        Args:
            directions: columns weighted by their length: the moment aaᵀ is to be protected.
            energy: threshold in (0, 1].
            rank: number of columns to add instead of the threshold; fewer if there are fewer independent directions.
            total: ``|a|²`` of all directions, if ``directions`` is a sketch that lacks some of their energy.
            threshold_rule: whether the column that crosses the threshold is added (`ThresholdRule`).

        Directions on another device are moved to the basis; an empty subspace moves to them.
        """
        if directions.ndim != 2 or directions.shape[0] != self.n:
            raise ValueError(f"directions must have {self.n} rows, got shape {tuple(directions.shape)}")
        _validate(directions, energy, threshold_rule)
        if rank is not None:
            validate_whole("rank, the number of columns to add,", rank, least=0)
        held = self._beside(directions)
        a = directions.to(held.basis.device, torch.float64)
        left, sigma, _ = torch.linalg.svd(held.project_out_twice(a), full_matrices=False)
        own = float(a.square().sum())
        return held._appended(
            left,
            sigma.square(),
            total=own,
            energy=energy,
            rank=rank,
            beyond=max(total - own, 0.0) if total is not None else 0.0,
            threshold_rule=threshold_rule,
        )

    def extended_to_moment(
        self, moment: Tensor, *, energy: float, threshold_rule: ThresholdRule = "inclusive"
    ) -> ProtectedSubspace:
        """`extended`, for directions a of which only ``moment`` = a aᵀ (n, n) is available.

        Ranks directions by an eigendecomposition in the moment's own precision. The columns are then made orthonormal
        in float64. O(n³).
        """
        if tuple(moment.shape) != (self.n, self.n):
            raise ValueError(f"the moment must be ({self.n}, {self.n}), got shape {tuple(moment.shape)}")
        _validate(moment, energy, threshold_rule)
        held = self._beside(moment)
        moment, basis = moment.to(held.basis.device), held.basis.to(moment.dtype)
        outside = project_out(project_out(moment, basis).mT, basis)
        energies, vectors = torch.linalg.eigh(sym(outside))
        return held._appended(
            vectors.flip(-1),
            energies.flip(-1).double().clamp_min(0),
            total=float(moment.diagonal().double().sum()),
            energy=energy,
            noise=self.n * torch.finfo(moment.dtype).eps,  # the error of a symmetric eigensolver, relative to |moment|
            threshold_rule=threshold_rule,
        )

    def extended_to_few(
        self, directions: Tensor, *, energy: float, threshold_rule: ThresholdRule = "inclusive"
    ) -> ProtectedSubspace:
        """`extended`, for few directions (n, N), through their Gram matrix in float64. O(n N² + N³).

        Directions below its rounding errors, a share of N times the precision, are not ranked.
        """
        if directions.ndim != 2 or directions.shape[0] != self.n:
            raise ValueError(f"directions must have {self.n} rows, got shape {tuple(directions.shape)}")
        _validate(directions, energy, threshold_rule)
        held = self._beside(directions)
        a = directions.to(held.basis.device, torch.float64)
        outside = held.project_out_twice(a)
        energies, mixing = torch.linalg.eigh(outside.mT @ outside)
        energies = energies.flip(-1).clamp_min(0)
        return held._appended(
            (outside @ mixing.flip(-1)) / energies.sqrt().clamp_min(TINY),
            energies,
            total=float(a.square().sum()),
            energy=energy,
            noise=max(NOISE, a.shape[1] * torch.finfo(a.dtype).eps),
            threshold_rule=threshold_rule,
        )

    def _require_fitting(self, x: Tensor, *, any_dtype: bool = False) -> None:
        """Refuse a matrix of other rows than the basis, or of another dtype, which torch would name neither."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x is a tensor (…, {self.n}, p), got {type(x).__name__}: convert it with torch.as_tensor")
        rows = x.shape[-2:][0] if x.ndim else None
        if rows != self.n:
            turned = ": pass x.mT" if x.ndim > 1 and x.shape[-1] == self.n else ""
            raise ValueError(f"x has shape {tuple(x.shape)} and must have {self.n} rows, as the basis has{turned}")
        if x.dtype != self.basis.dtype and not any_dtype:
            raise TypeError(
                f"x has {x.dtype} and the basis {self.basis.dtype}: convert it with x.to(subspace.basis.dtype)"
            )

    def _beside(self, directions: Tensor) -> ProtectedSubspace:
        """This subspace, which lies where its basis does; while it has no columns, where the directions are."""
        if self.k or self.basis.device == directions.device:
            return self
        return self.empty(self.n, dtype=self.basis.dtype, device=directions.device)

    def _appended(
        self,
        vectors: Tensor,
        energies: Tensor,
        *,
        total: float,
        energy: float,
        rank: int | None = None,
        noise: float = NOISE,
        beyond: float = 0.0,
        threshold_rule: ThresholdRule = "inclusive",
    ) -> ProtectedSubspace:
        """This basis and the leading ``vectors``, which are off the subspace and sorted by descending energy.

        ``beyond`` is energy that no vector represents.
        """
        inside = total - float(energies.sum())
        held = (inside + torch.cat([energies.new_zeros(1), energies.cumsum(0)])) / max(total + beyond, TINY)
        wanted = int((held < energy - ROUNDING).sum()) if rank is None else rank
        if threshold_rule == "exclusive" and rank is None and not self.k:
            wanted = max(wanted - 1, min(wanted, 1))
        real = int((energies > noise * max(total, TINY)).sum())
        count = min(wanted, real, self.n - self.k)
        if not count:
            return self
        new, _ = torch.linalg.qr(self.project_out_twice(vectors[:, :count]))
        return ProtectedSubspace(torch.cat([self.basis, new.to(self.basis.dtype)], dim=1))


def as_basis(basis: Any) -> Tensor:
    """The basis as a tensor: itself, or a copy of an array; TypeError for anything else."""
    if isinstance(basis, Tensor):
        return basis
    if isinstance(basis, np.ndarray) and basis.dtype.kind in "biufc":
        # A copy: an array may be read-only, reversed (eigh's vectors by falling value), and is the caller's.
        return torch.tensor(np.ascontiguousarray(basis))
    kind = f"an array of {basis.dtype}" if isinstance(basis, np.ndarray) else type(basis).__name__
    raise TypeError(
        f"a basis is a tensor or an array of shape (n, k), got {kind}: convert it with torch.tensor, "
        "or torch.stack(columns, dim=-1) for a list of directions"
    )


def check_basis(basis: Tensor) -> None:
    """Refuse a dtype or shape that no orthonormal basis has."""
    if basis.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"a protected basis is kept in float32 or float64, got {basis.dtype}: convert it first")
    if basis.ndim < 2 or basis.shape[-1] > basis.shape[-2]:
        raise ValueError(
            f"a basis (n, k) has at most n columns, got shape {tuple(basis.shape)}: directions are columns, so pass "
            f"{'basis.mT if they are rows' if basis.ndim > 1 else 'v[:, None] for one direction v'}"
        )


def stack_bases(bases: Sequence[Tensor | None], n: int, *, like: Tensor, width: int | None = None) -> Tensor:
    """Bases (n, kᵢ) as one tensor (B, n, width), padded by zero columns, which protect nothing; None has no columns.

    ``width`` defaults to the widest basis.
    """
    if width is None:
        width = max((b.shape[-1] for b in bases if b is not None), default=0)
    stacked = like.new_zeros(len(bases), n, width)
    for slot, basis in zip(stacked, bases, strict=True):
        if basis is not None:
            slot[:, : basis.shape[-1]] = basis.to(like)
    return stacked


def orthonormal_columns(complement: Tensor) -> Tensor:
    """The complement itself if orthonormal (zero columns aside), else an orthonormal basis of its columns."""
    check_basis(complement)
    if not is_finite(complement):
        raise ValueError("the complement holds NaN or infinite values: look at the gradients it came from")
    wide = complement.detach().double()
    live = (wide.square().sum(-2) > 0).to(wide.dtype)  # zero columns are padding
    error = wide.mT @ wide - torch.diag_embed(live)
    if not complement.numel() or float(error.abs().max()) < 1e-6:  # what float32 QR leaves
        return complement.detach().clone(memory_format=torch.contiguous_format)  # a factorisation returns columns
    if not bool(live.bool().all()):
        raise ValueError("a zero-padded complement must be orthonormal in its other columns")
    q, r = torch.linalg.qr(wide)
    size = r.diagonal(dim1=-2, dim2=-1).abs()
    if bool((size.amin(-1) <= 1e-7 * size.amax(-1)).any()):  # float32 data carries 7 digits
        raise ValueError(
            f"complement of shape {tuple(complement.shape)} has dependent columns: "
            "ProtectedSubspace.from_directions picks independent ones"
        )
    orthonormal: Tensor = q.to(complement.dtype).contiguous()
    return orthonormal


def _validate(a: Tensor, energy: float, threshold_rule: str) -> None:
    rules = get_args(ThresholdRule)
    validate_share("energy, the threshold,", energy)
    if threshold_rule not in rules:
        raise ValueError(f"threshold_rule is one of {', '.join(map(repr, rules))}, got {threshold_rule!r}")
    if not is_finite(a):
        raise ValueError("directions hold NaN or infinite values: look at the gradients they came from")
