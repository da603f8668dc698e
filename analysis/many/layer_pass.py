"""One layer of all members: singular values, overlaps of every pair, and common directions."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from analysis.numerics.decomposition import tall_frames

Side = Literal["input", "output"]
Factors = tuple[Tensor, Tensor]
"""Left (m, r) and right (n, r)."""
TILE = 512
"""Columns of one block of the products of frames."""
BATCH_NUMBERS = 2**20
"""Numbers of the factors that are decomposed at a time: 8 MiB in float64."""


class Frames(NamedTuple):
    """The frames of some members in one layer, side by side."""

    columns: Tensor  # (n, R), float32; zero where a direction is below rounding
    values: list[Tensor]  # per member singular values (r,), descending, float64
    ranks: Tensor  # (members,), numerical ranks, float64

    @property
    def widths(self) -> list[int]:
        """Columns per member."""
        return [len(values) for values in self.values]

    @property
    def weights(self) -> Tensor:
        """Share of the energy of its update in every column, (R,); zeros for a zero update."""
        energies = [values.square() for values in self.values]
        return torch.cat([energy / energy.sum().clamp(min=torch.finfo(energy.dtype).tiny) for energy in energies])


@dataclass(frozen=True)
class Curve:
    """The share of all members' energy in the best common directions of one layer."""

    share: Tensor  # (k,), share in the j + 1 best directions, ascending to 1
    random: Tensor | None  # the same for random members with these spectra; None where it is not drawn


def frames(
    factors: Iterable[Factors], n: int, widths: Sequence[int], side: Side, *, device: torch.device | str
) -> Frames:
    """The singular frames in R^n of one side of updates of ranks `widths`, which are read a few at a time."""
    columns = torch.zeros(sum(widths), n, device=device).mT
    values: list[Tensor] = []
    ranks: list[Tensor] = []
    start = 0
    for batch in _batches(factors):
        left, right = (_rows([pair[part] for pair in batch], device) for part in (0, 1))
        frame, sigma, rank = tall_frames(left, right) if side == "input" else tall_frames(right, left)
        width = left.shape[1]
        block = columns[:, start : start + width * len(batch)].mT.view(len(batch), width, n)
        block[:, : frame.shape[1]] = frame
        start += width * len(batch)
        values += list(torch.nn.functional.pad(sigma, (0, width - sigma.shape[1])))
        ranks.append(rank.double())
    return Frames(columns, values, torch.cat(ranks))


def _rows(factors: Sequence[Tensor], device: torch.device | str) -> Tensor:
    """Factors (n, r) of one rank as (L, r, n) in float64."""
    rows = torch.empty(len(factors), factors[0].shape[1], factors[0].shape[0], dtype=torch.float64, device=device)
    for row, factor in zip(rows, factors, strict=True):
        row.copy_(factor.mT)
    return rows


def _batches(factors: Iterable[Factors]) -> Iterator[Sequence[Factors]]:
    """Neighbours of one rank, about `BATCH_NUMBERS` numbers at a time."""
    batch: list[Factors] = []
    numbers = 0
    for left, right in factors:
        if batch and (numbers >= BATCH_NUMBERS or left.shape[1] != batch[0][0].shape[1]):
            yield batch
            batch, numbers = [], 0
        batch.append((left, right))
        numbers += left.numel() + right.numel()
    yield batch


def overlaps(a: Frames, b: Frames) -> Tensor:
    """``‖V_aᵀ V_b‖²`` for every member of `a` (rows) and of `b`, float64. Only half is computed where both are one."""
    top = torch.zeros(len(a.values), len(b.values), dtype=torch.float64, device=a.columns.device)
    for rows, first in _tiles(a):
        for cells, second in _tiles(b):
            if a is b and cells.start < rows.start:
                continue
            squares = (a.columns[:, first].mT @ b.columns[:, second]).square_()
            left, right = (_membership(x, y).to(squares) for x, y in ((a, rows), (b, cells)))
            top[rows, cells] = (left @ squares @ right.mT).double()
    return torch.triu(top) + torch.triu(top, 1).mT if a is b else top


def _tiles(parts: Frames) -> Iterator[tuple[slice, slice]]:
    """Members and their columns, about `TILE` columns at a time."""
    start, begin, end = 0, 0, 0
    for position, width in enumerate(parts.widths):
        end += width
        if end - begin >= TILE or position + 1 == len(parts.values):
            yield slice(start, position + 1), slice(begin, end)
            start, begin = position + 1, end


def _membership(parts: Frames, members: slice) -> Tensor:
    """(members, columns): 1 where a column belongs to a member."""
    widths = torch.tensor(parts.widths[members])
    return torch.eye(len(widths)).repeat_interleave(widths, dim=1)


def common_share(columns: Tensor, weights: Tensor) -> Tensor:
    """Share of the energy ``Σ w_i ‖Pv_i‖²`` in the best k common directions, for k = 1, 2, ..., float64.

    The best directions are eigenvectors of ``Σ w_i v_i v_iᵀ``; the smaller of it and of its Gram matrix is formed.
    `columns` are scaled in place.
    """
    scaled = columns.mul_(weights.sqrt().to(columns))
    gram = _upper_gram(scaled.mT if scaled.shape[1] <= scaled.shape[0] else scaled)
    energies: Tensor = torch.linalg.eigvalsh(gram, UPLO="U").double().clamp(min=0.0).flip(0).cumsum(0)
    return energies / energies[-1].clamp(min=torch.finfo(energies.dtype).tiny)


def _upper_gram(rows: Tensor) -> Tensor:
    """The upper triangle of ``rows rowsᵀ``, in strips of `TILE` rows: half of the products. Zeros below the strips."""
    gram = rows.new_zeros(len(rows), len(rows))
    for start in range(0, len(rows), TILE):
        strip = slice(start, start + TILE)
        torch.mm(rows[strip], rows[start:].mT, out=gram[strip, start:])
    return gram


def fill_randomly(columns: Tensor, widths: Sequence[int], *, seed: int = 0) -> Tensor:
    """The columns (n, R), filled with frames whose directions are uniformly random."""
    draw = torch.Generator().manual_seed(seed)
    n, start = columns.shape[0], 0
    columns.zero_()
    for width in widths:
        frame = torch.linalg.qr(torch.randn(n, width, generator=draw)).Q
        columns[:, start : start + frame.shape[1]] = frame.to(columns)
        start += width
    return columns


def curve(parts: Frames, *, random: bool) -> Curve:
    """The curve of one layer, and with `random` that of random members of these spectra.

    `parts.columns` are overwritten, since a copy may not fit into memory.
    """
    weights = parts.weights
    share = common_share(parts.columns, weights).cpu()
    if not random:
        return Curve(share, None)
    return Curve(share, common_share(fill_randomly(parts.columns, parts.widths), weights).cpu())


def blocked_overlaps(
    read: Callable[[slice], Frames], blocks: Sequence[slice], count: int
) -> tuple[Tensor, list[Frames]]:
    """Overlaps (count, count) where not all frames fit: pairs of blocks, each read again for every pair.

    Also returns the frames without their columns, one per block.
    """
    top = torch.zeros(count, count, dtype=torch.float64)
    seen = []
    for position, rows in enumerate(blocks):
        first = read(rows)
        top[rows, rows] = overlaps(first, first).cpu()
        seen.append(first._replace(columns=first.columns[:0]))
        for cells in blocks[position + 1 :]:
            top[rows, cells] = overlaps(first, read(cells)).cpu()
            top[cells, rows] = top[rows, cells].mT
    return top, seen
