"""Adapters of one linear layer: the base class, with forward pass and merging, and LoRALinear."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from manifold_cl.adapters.base_layers import WrappedLinear, sides, validate_base
from manifold_cl.adapters.frames import Points
from manifold_cl.adapters.low_rank import Factors, Update
from manifold_cl.adapters.merging import Backup, merge_reversibly
from manifold_cl.adapters.options import validate_rank, validate_scaling


class Adapter(WrappedLinear):
    """``y = W x + (alpha / r) · s · left (rightᵀ x)`` around a frozen linear layer.

    Factors are float32 on any base and stay so when the model is converted. Their product with the input is computed in
    the input's precision.

    Args:
        base: the layer to adapt, `nn.Linear` or GPT-2's Conv1D; it is frozen and shared, not copied.
        rank: r, at most the smaller side of the weight.
        alpha, dropout: as in `EBLoRAOptions`; the base's inputs are never zeroed.

    Raises:
        TypeError: for a layer that is not linear, or whose weight is computed.
        ValueError: for a rank, alpha or dropout out of range.
    """

    kind: ClassVar[str]
    base_name = "base"
    start_left: Tensor
    start_right: Tensor

    def __init__(self, base: nn.Module, rank: int, *, alpha: float | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        validate_base(base)
        validate_rank(base, rank)
        validate_scaling(alpha, dropout)
        self.base = base.requires_grad_(False)
        self.rank = rank
        self.alpha = float(rank if alpha is None else alpha)
        self.dropout = nn.Dropout(dropout)
        self._backup: Backup | None = None
        self.compensated = False
        m, n = sides(base)
        device = cast(Tensor, base.weight).device
        self.left = nn.Parameter(torch.zeros(m, rank, dtype=torch.float32, device=device))
        self.right = nn.Parameter(torch.zeros(n, rank, dtype=torch.float32, device=device))

    @property
    def weight(self) -> Tensor:
        """The base's weight, without the update: parent modules read its dtype and device."""
        return cast(Tensor, self.base.weight)

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return cast(Tensor | None, self.base.bias)

    @property
    def in_features(self) -> int:
        """n, the length of an input."""
        return self.right.shape[0]

    @property
    def out_features(self) -> int:
        """m, the length of an output."""
        return self.left.shape[0]

    @property
    def scaling(self) -> float:
        """``alpha / rank``."""
        return self.alpha / self.rank

    @abstractmethod
    def magnitude(self) -> Tensor:
        """The core between ``left`` and ``rightᵀ``, scaling included: 0-d, (r,) or (r, r)."""

    def points(self) -> Points:
        """(key, frame, manifold) of the frames; none for free factors."""
        return ()

    def factors(self) -> Factors:
        """The update as detached factors: views of the parameters, or of rank 2r with a compensated start."""
        return self._current().factors()

    @torch.no_grad()
    def compensate(self) -> None:
        """Subtract the present update from here on, so that the adapter changes nothing until it is trained further.

        The present factors are kept as frozen ones. The update then has rank 2r and costs twice as much.
        """
        for name, parameter in self._own_parameters():
            self.register_buffer(f"start_{name}", parameter.detach().clone())
        self.compensated = True

    def own_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors to save: every parameter but the base's, and the start where it is compensated."""
        yield from self._own_parameters()
        if self.compensated:
            yield from ((f"start_{name}", getattr(self, f"start_{name}")) for name, _ in self._own_parameters())

    def forward(self, x: Tensor) -> Tensor:
        """The adapted layer's output. O((m + n) r) per row on top of the base."""
        if self.merged:
            return cast(Tensor, self.base(x))
        return cast(Tensor, self.base(x)) + self.update(self.dropout(x))

    def update(self, x: Tensor) -> Tensor:
        """``ΔW x`` for inputs as rows."""
        return self._current().apply(x)

    @property
    def merged(self) -> bool:
        """Whether the base weight holds the update at present."""
        return self._backup is not None

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to the base weight, in place; `unmerge` undoes it to the last bit.

        Raises:
            TypeError: for a quantised or computed base weight.
            ValueError: for frames off their manifolds or an update that is not finite; nothing is changed then.
        """
        if not self.merged:
            self._backup = merge_reversibly(
                self.base, [self.factors()], points=self.points(), layer=type(self).__name__
            )

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the base weight as it was before `merge`."""
        if self._backup is not None:
            self._backup.restore(self.base)
            self._backup = None

    def extra_repr(self) -> str:
        """Rank, alpha and compensation, for the printed module."""
        return f"rank={self.rank}, alpha={self.alpha:g}" + (", compensated" if self.compensated else "")

    def _own_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from ((name, p) for name, p in self.named_parameters() if not name.startswith("base."))

    def _current(self) -> Update:
        return Update(Factors(self.left, self.right, self.magnitude()), self._start() if self.compensated else None)

    def _start(self) -> Factors:
        return Factors(self.start_left, self.start_right, self.magnitude().detach())


class LoRALinear(Adapter):
    """``ΔW = (alpha / r) · left @ rightᵀ`` with free factors: right starts Kaiming-uniform, left at zero.

    Source: hu2022lora; right is its A transposed, left its B. Arguments and errors are those of `Adapter`;
    ``generator`` draws the start of ``right``.

    >>> LoRALinear(nn.Linear(6, 4), 2).factors().delta_weight().count_nonzero().item()
    0
    """

    kind = "lora"

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(base, rank, alpha=alpha, dropout=dropout)
        bound = 1 / math.sqrt(self.in_features)  # the bound of kaiming_uniform_(a=√5) on A (r, n)
        draw = torch.rand(self.in_features, rank, generator=generator, dtype=torch.float32)
        with torch.no_grad():
            self.right.copy_((2 * draw - 1) * bound)

    def magnitude(self) -> Tensor:
        """``alpha / r``."""
        return torch.tensor(self.scaling, dtype=self.left.dtype, device=self.left.device)
