"""What every low-rank adapter of a linear layer is: a frozen base and two tall factors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import ClassVar, Self, cast

import torch
from torch import Tensor, nn

from manifold_cl.adapters.base_layers import apply_keeping, plain_weight, sides, validate_base
from manifold_cl.adapters.frames import points_of, validate_frames
from manifold_cl.adapters.low_rank import Factors, low_rank
from manifold_cl.adapters.merging import merge_into
from manifold_cl.adapters.options import validate_finite, validate_rank


class Adapter(nn.Module, ABC):
    """``y = W x + (alpha / r) · s · left (rightᵀ x)`` around a frozen linear layer.

    Factors are float32 whatever the base is, and stay so when the model is converted; their product with the
    input is computed in the input's precision.

    Args:
        base: the layer to adapt, `nn.Linear` or GPT-2's Conv1D; it is frozen and shared, not copied.
        rank: r, at most the smaller side of the weight.
        alpha: numerator of the scaling alpha / r; the rank if not given, so that the scaling is 1.
        dropout: share of the adapter's inputs that are zeroed in training; the base sees them all.
    """

    kind: ClassVar[str]
    start_left: Tensor
    start_right: Tensor

    def __init__(self, base: nn.Module, rank: int, *, alpha: float | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        validate_base(base)
        validate_rank(base, rank)
        validate_finite(alpha=rank if alpha is None else alpha, dropout=dropout)
        self.base = base.requires_grad_(False)
        self.rank = rank
        self.alpha = float(rank if alpha is None else alpha)
        self.dropout = nn.Dropout(dropout)
        self._unmerged: Tensor | None = None
        self.compensated = False
        m, n = sides(base)
        device = cast(Tensor, base.weight).device
        self.left = nn.Parameter(torch.zeros(m, rank, dtype=torch.float32, device=device))
        self.right = nn.Parameter(torch.zeros(n, rank, dtype=torch.float32, device=device))

    @property
    def weight(self) -> Tensor:
        """The base's weight, without the update: parents look at its dtype and device."""
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
        """What stands between ``left`` and ``rightᵀ``, scaling included: 0-d, (r,) or (r, r)."""

    def factors(self) -> Factors:
        """The update as detached factors: views of the parameters, or of rank 2r with a start that is compensated."""
        trained = Factors(self.left.detach(), self.right.detach(), self.magnitude().detach())
        return trained.minus(self._start()) if self.compensated else trained

    @torch.no_grad()
    def compensate(self) -> None:
        """Subtract the update as it is now from here on: the adapter changes nothing until it is trained further.

        What is subtracted is kept as frozen factors. The update then has rank 2r and costs twice as much.
        """
        for name, parameter in self._own_parameters():
            self.register_buffer(f"start_{name}", parameter.detach().clone())
        self.compensated = True

    def own_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What a file keeps: every parameter but the base's, and the start where it is compensated."""
        yield from self._own_parameters()
        if self.compensated:
            yield from ((f"start_{name}", getattr(self, f"start_{name}")) for name, _ in self._own_parameters())

    def forward(self, x: Tensor) -> Tensor:
        """The adapted layer's output. O((m + n) r) a row on top of the base."""
        if self.merged:
            return cast(Tensor, self.base(x))
        return cast(Tensor, self.base(x)) + self.update(self.dropout(x))

    def update(self, x: Tensor) -> Tensor:
        """``ΔW x`` for inputs as rows."""
        update = low_rank(x, self.left, self.right, self.magnitude())
        if self.compensated:  # the same operations on equal numbers: at the start the difference is zero, not small
            start = self._start()
            update = update - low_rank(x, start.left, start.right, start.magnitude)
        return update

    @property
    def merged(self) -> bool:
        """Whether the update is in the base weight at present."""
        return self._unmerged is not None

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to the base weight, in place; `unmerge` undoes it to the last bit.

        The weight as it was is kept on the CPU meanwhile: subtracting would leave a bfloat16 weight off by 1e-3.

        Raises:
            TypeError: for a quantised or computed base weight.
            ValueError: for frames off their manifolds or an update that is not finite; nothing is changed then.
        """
        if not self.merged:
            validate_frames(points_of(self), to="merge")
            before = plain_weight(self.base, to="merge into").detach().cpu().clone()
            merge_into(self.base, [self.factors()], layer=type(self).__name__)
            self._unmerged = before

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base weight back as it was before `merge`."""
        if self._unmerged is not None:
            plain_weight(self.base, to="restore").copy_(self._unmerged)
            self._unmerged = None

    def extra_repr(self) -> str:
        """What the printed module shows."""
        return f"rank={self.rank}, alpha={self.alpha:g}" + (", compensated" if self.compensated else "")

    def _own_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from ((name, p) for name, p in self.named_parameters() if not name.startswith("base."))

    def _start(self) -> Factors:
        """What a compensated adapter subtracts."""
        return Factors(self.start_left, self.start_right, self.magnitude().detach())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        apply_keeping(self, fn, base="base", recurse=recurse)
        return self
