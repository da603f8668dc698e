"""The energy-balanced adapter: one magnitude, two orthonormal frames."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from manifold_cl.adapters.adapter import Adapter
from manifold_cl.adapters.base_layers import plain_weight, sides, validate_base
from manifold_cl.adapters.frames import adopt_all, leading_vectors, nearest_frame
from manifold_cl.adapters.low_rank import Factors
from manifold_cl.adapters.options import (
    Core,
    Start,
    initial_core,
    validate_core,
    validate_finite,
    validate_rank,
    validate_start,
)
from manifold_cl.geometry import ProtectedSubspace, RestrictedStiefel, Retraction
from manifold_cl.geometry.holders import Slot, enter_layer

Protected = Tensor | ProtectedSubspace | None


class EBLoRALinear(Adapter):
    """``ΔW = (alpha / r) · s · left @ rightᵀ`` with orthonormal columns, off what is protected.

    With the default core all r singular values of the update equal ``|s| alpha / r``: magnitude and direction are
    separate parameters. Train it with a Riemannian optimizer over `param_groups`, which asks the layer for its
    manifolds.

    Source: gu2026eblora; method.md 1.4. Diagonal and full cores are li2025stella's, for comparison.

    Args:
        base: the layer to adapt.
        rank: r.
        complement: what the input side must be orthogonal to: a basis (n, k) or a `ProtectedSubspace`.
        output_complement: the same for the output side, in R^m; beyond the paper.
        core: ``"scalar"`` (balanced spectrum), ``"diagonal"`` or ``"full"``.
        initial_scale: s at the start. Negative, with `point_along` a gradient, it makes the start a descent step.
        alpha: numerator of the scaling; the rank if not given.
        start: of the frames, ``"random"`` or ``"pretrained"``: the leading singular vectors of the weight, off what
            is protected. A task's directions come with `point_along`.
        compensate: subtract the start, so that a new adapter changes nothing at all. The start is kept as frozen
            factors and the base stays as it is; the update then has rank 2r and costs twice as much.
        dropout: share of the adapter's inputs that are zeroed in training.
        retraction: of both frames; the metric's own if not given (``"polar"``, ``"cayley"``).
        metric: of both manifolds, ``"euclidean"`` or ``"canonical"``.
        generator: draws the random start of the frames.

    Raises:
        ValueError: when a complement leaves no room for ``rank`` columns; for unknown names.
    """

    kind = "eblora"
    start_scale: Tensor

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        *,
        complement: Protected = None,
        output_complement: Protected = None,
        core: Core = "scalar",
        initial_scale: float = -0.005,
        alpha: float | None = None,
        start: Start = "random",
        compensate: bool = False,
        dropout: float = 0.0,
        retraction: Retraction | str | Callable[[Tensor, Tensor], Tensor] | None = None,
        metric: Literal["euclidean", "canonical"] = "euclidean",
        generator: torch.Generator | None = None,
    ) -> None:
        validate_core(core)
        validate_start(start)
        manifolds = [
            RestrictedStiefel(protected, retraction=retraction, metric=metric)
            for protected in (output_complement, complement)
        ]
        validate_base(base)
        validate_rank(base, rank)
        validate_finite(initial_scale=initial_scale)
        for manifold, size in zip(manifolds, sides(base), strict=True):
            manifold.require_room(size, rank)
        if start == "pretrained":
            plain_weight(base, to="take singular vectors of")
        super().__init__(base, rank, alpha=alpha, dropout=dropout)  # nothing below is refused: this freezes the base
        device = self.left.device
        self.left_manifold, self.right_manifold = (manifold.to(device) for manifold in manifolds)
        self.core = core
        self.scale = nn.Parameter(initial_core(core, rank, initial_scale, device=device))
        with torch.no_grad():
            for frame, manifold in ((self.left, self.left_manifold), (self.right, self.right_manifold)):
                frame.copy_(manifold.random(*frame.shape, dtype=frame.dtype, device=device, generator=generator))
        if compensate:
            self.compensate()
        if start == "pretrained":
            self.point_along(
                *leading_vectors(
                    plain_weight(base, to="take singular vectors of").to(device),
                    rank,
                    left_manifold=self.left_manifold,
                    right_manifold=self.right_manifold,
                    generator=generator,
                )
            )
        enter_layer(self)

    @property
    def restricted(self) -> Literal["none", "input", "output", "both"]:
        """Which sides are kept off a protected subspace."""
        sides = (self.right_manifold.k > 0, self.left_manifold.k > 0)
        return {(False, False): "none", (True, False): "input", (False, True): "output", (True, True): "both"}[sides]  # type: ignore[return-value]

    def magnitude(self) -> Tensor:
        """``s · alpha / r``; for a scalar core the one singular value of the update, with its sign."""
        return self.scale * self.scaling

    @torch.no_grad()
    def point_along(self, left: Tensor, right: Tensor) -> None:
        """Start the frames at the nearest points to ``left`` (m, r) and ``right`` (n, r).

        Where these have fewer than r independent directions outside what is protected, as a gradient of low rank
        has, the present frame supplies the others.
        """
        self.left.copy_(nearest_frame(self.left_manifold, left.to(self.left), self.left))
        self.right.copy_(nearest_frame(self.right_manifold, right.to(self.right), self.right))
        if self.compensated:
            self.compensate()

    def manifold_parameters(self) -> Iterator[tuple[str, nn.Parameter, RestrictedStiefel]]:
        """Both frames with the manifolds they live on."""
        yield "left", self.left, self.left_manifold
        yield "right", self.right, self.right_manifold

    def scale_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The magnitude."""
        yield "scale", self.scale

    def held_points(self) -> Iterator[Slot]:
        """Both frames, with the places of their manifolds."""
        for name in ("left", "right"):
            if (frame := self._parameters.get(name)) is not None:
                yield Slot(frame, self._modules, f"{name}_manifold")

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        enter_layer(self)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        pairs = (("left", self.left, self.left_manifold), ("right", self.right, self.right_manifold))
        rest[-1].extend(adopt_all(((n, p, f"{n}_manifold", m) for n, p, m in pairs), state_dict, prefix))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """What the printed module shows."""
        core = f", core={self.core!r}" if self.core != "scalar" else ""
        return super().extra_repr() + core

    def _start(self) -> Factors:
        return Factors(self.start_left, self.start_right, self.start_scale * self.scaling)
