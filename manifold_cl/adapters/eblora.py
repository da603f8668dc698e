"""The energy-balanced adapter: one magnitude, two orthonormal frames."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from manifold_cl.adapters.adapter import Adapter
from manifold_cl.geometry import ProtectedSubspace, RestrictedStiefel, Retraction

FILL = 0.01
"""Share of the present frame in a start that lacks directions: far above rounding, a tilt of half a degree at most."""


class EBLoRALinear(Adapter):
    """``ΔW = (alpha / r) · s · left @ rightᵀ`` with orthonormal columns, right orthogonal to what is protected.

    All r singular values of the update equal ``|s| alpha / r``: magnitude and direction are separate
    parameters. Train it with a Riemannian optimizer over `param_groups`, which asks the layer for its manifolds.

    Source: gu2026eblora; method.md 1.4.

    Args:
        base: the layer to adapt.
        rank: r.
        complement: what the input side must be orthogonal to: a basis (n, k) or a `ProtectedSubspace`.
        initial_scale: s at the start. Negative, with `point_along` a gradient, it makes the start a descent step.
        alpha: numerator of the scaling; the rank if not given.
        retraction: of both frames.
        generator: draws the random start of the frames.

    Raises:
        ValueError: when the complement leaves no room for ``rank`` columns.
    """

    kind = "eblora"

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        *,
        complement: Tensor | ProtectedSubspace | None = None,
        initial_scale: float = -0.005,
        alpha: float | None = None,
        retraction: Retraction | str | Callable[[Tensor, Tensor], Tensor] = "polar",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(base, rank, alpha=alpha)
        m, n = base.weight.shape
        device = base.weight.device
        self.left_manifold = RestrictedStiefel(retraction=retraction)
        self.right_manifold = RestrictedStiefel(complement, retraction=retraction).to(device)
        self.scale = nn.Parameter(torch.tensor(float(initial_scale), device=device))
        with torch.no_grad():
            self.left.copy_(self.left_manifold.random(m, rank, device=device, generator=generator))
            self.right.copy_(self.right_manifold.random(n, rank, device=device, generator=generator))

    def magnitude(self) -> Tensor:
        """``s · alpha / r``: the one singular value of the update, with its sign."""
        return self.scale * self.scaling

    @torch.no_grad()
    def point_along(self, left: Tensor, right: Tensor) -> None:
        """Start the frames at the nearest points to ``left`` (m, r) and ``right`` (n, r).

        Where these have fewer than r independent directions outside what is protected, as a gradient of low rank
        has, the present frame supplies the others.
        """
        self.left.copy_(_nearest(self.left_manifold, left.to(self.left), self.left))
        self.right.copy_(_nearest(self.right_manifold, right.to(self.right), self.right))

    def manifold_parameters(self) -> Iterator[tuple[str, nn.Parameter, RestrictedStiefel]]:
        """Both frames with the manifolds they live on."""
        yield "left", self.left, self.left_manifold
        yield "right", self.right, self.right_manifold

    def scale_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The magnitude."""
        yield "scale", self.scale


def _nearest(manifold: RestrictedStiefel, wanted: Tensor, present: Tensor) -> Tensor:
    try:
        return manifold.projx(wanted)
    except ValueError:  # no nearest point
        size = wanted.norm()
        return manifold.projx((wanted / size if size > 0 else wanted) + FILL * present)
