"""The restricted Stiefel manifold, a geoopt `Manifold`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import geoopt
import torch
from geoopt.manifolds.base import Manifold
from torch import Tensor

from manifold_cl.geometry.arguments import validate_arguments
from manifold_cl.geometry.distances import Distance, inverse_retraction, logarithm
from manifold_cl.geometry.long_steps import is_long, widened
from manifold_cl.geometry.metrics import MetricChoice, as_metric, geodesic, normalised_metric
from manifold_cl.geometry.points import RestrictedPoints, require_dtype
from manifold_cl.geometry.retractions import Retraction, as_retraction
from manifold_cl.geometry.retractions.protocol import Scheduled, depends_on_sum
from manifold_cl.geometry.subspace import Array, ProtectedSubspace, stack_bases
from manifold_cl.geometry.transports import REVERSIBLE, carry, default_retraction, default_transport, validate_transport
from manifold_cl.linalg import NEAR, Point, Tangent, full_precision, minus_product, polar_near, sym


class RestrictedStiefel(RestrictedPoints):
    """``St(n, p; F) = {x : xᵀx = I, Fᵀx = 0}`` with the Euclidean or the canonical metric, or one of their family.

    The manifold, not the retraction, makes vectors tangent and applies ``P = I − FFᵀ`` to the *sum* x + u
    (docs/geometry.md, "Project the sum").

    For n − k = p the manifold has two components. `random` draws from both with equal probability, steps stay in one,
    and `logmap` between them is refused.

    A NaN in x or u gives NaN, which a gradient scaler detects. Only methods that read their values (`projx` far from
    the manifold, `inverse_retr`, `logmap`, `dist`) refuse it.

    Args:
        complement: the directions F that points must be orthogonal to; None protects nothing. A tensor or array
            (…, n, k) is copied, and orthonormalised in float64 unless it is orthonormal; zero columns are padding. It
            stays in float32 or wider when the module is converted. To change it, assign a new tensor or write to it in
            place. An optimizer detects a write through ``.data`` only when it measures the constraint, and then raises.
        retraction: a name, a `Retraction`, or a function of (x, u). By default the retraction that the transport needs,
            else the second-order one of the metric (``polar``, ``cayley``), or the geodesic of a `BetaMetric`.
        metric: ``"euclidean"``, tr(uᵀv), ``"canonical"``, tr(uᵀ(I − xxᵀ/2)v), or a `BetaMetric` of the family that
            contains both. Determines inner products, gradients, geodesics and distances.
        transport: how vectors are carried along a step: ``"projection"``, ``"differentiated"``, ``"isometric"`` or
            ``"parallel"`` (see `transports`). The last two make the manifold ``reversible``. By default
            ``"differentiated"`` for the Cayley retractions, else ``"projection"``.

    Raises:
        ValueError: for a complement with NaNs or without full column rank, for unknown names, and for a transport
            that does not fit the retraction or metric.
        TypeError: for a complement that is no tensor or array, or not float32 or float64.
    """

    name = "RestrictedStiefel"
    reversible = False
    __scaling__ = Manifold.__scaling__.copy()
    __scaling__["inverse_retr"] = __scaling__["logmap"]

    def __init__(
        self,
        complement: Tensor | ProtectedSubspace | Array | None = None,
        *,
        retraction: Retraction | str | Callable[[Tensor, Tensor], Tensor] | None = None,
        metric: MetricChoice = "euclidean",
        transport: str | None = None,
    ) -> None:
        super().__init__(complement)
        self.metric: MetricChoice = normalised_metric(metric)
        default = default_retraction(self.metric, transport) if retraction is None else retraction
        self.retraction = as_retraction(default)
        self.transport = default_transport(self.retraction) if transport is None else transport
        validate_transport(self.transport, self.retraction, self.metric)
        self.reversible = self.transport in REVERSIBLE

    @classmethod
    def stack(cls, manifolds: Sequence[RestrictedStiefel]) -> RestrictedStiefel:
        """One manifold for a batch of points (B, n, p), the i-th on ``manifolds[i]``.

        Complements are padded to one width with zero columns.

        Raises:
            TypeError: for anything but `RestrictedStiefel`, such as the tensors of complements.
            ValueError: for no manifolds, or manifolds that differ in rows, retraction, metric, transport or device.
        """
        if wrong := [type(m).__name__ for m in manifolds if not isinstance(m, RestrictedStiefel)]:
            raise TypeError(f"a batch stacks manifolds of RestrictedStiefel, got {wrong[0]}")
        if len({(m.retraction, m.metric, m.transport) for m in manifolds}) != 1:
            raise ValueError("a batch is one or more manifolds of the same retraction, metric and transport")
        bases = [m.complement for m in manifolds]
        known = [basis for basis in bases if basis is not None]
        if len({(basis.shape[:-1], basis.device) for basis in known}) > 1 or any(basis.ndim != 2 for basis in known):
            raise ValueError(
                "a batch stacks complements (n, k) of one n on one device, got "
                + ", ".join(f"{tuple(basis.shape)} on {basis.device}" for basis in known)
            )
        precise = max(known, key=lambda basis: basis.element_size(), default=None)
        complement = None if precise is None else stack_bases(bases, precise.shape[0], like=precise)
        first = manifolds[0]
        return cls(complement, retraction=first.retraction, metric=first.metric, transport=first.transport)

    def egrad2rgrad(self, x: Point, u: Tangent) -> Tangent:
        """The Riemannian gradient of the Euclidean gradient u, in this manifold's metric.

        ``P (u − x sym(xᵀu))`` or, canonical, ``P (u − x uᵀx)``: a projection only in the first case.
        """
        validate_arguments(self._outline, x=x, u=u)
        require_dtype(x)
        with full_precision(x.device):
            return self._project_out(as_metric(self.metric).gradient(x, u))

    def ehess2rhess(self, x: Point, g: Tangent, h: Tangent, u: Tangent) -> Tangent:
        """The Riemannian Hessian along the tangent vector u, in this manifold's metric.

        ``g`` is the Euclidean gradient at x, ``h`` the Euclidean Hessian along u: the derivative of g in direction u.
        """
        validate_arguments(self._outline, x=x, g=g, h=h, u=u)
        require_dtype(x)
        with full_precision(x.device):
            return as_metric(self.metric).hessian(x, self._project_out(g), self._project_out(h), u)

    def inner(self, x: Point, u: Tangent, v: Tangent | None = None, *, keepdim: bool = False) -> Tensor:
        """The inner product, batched: ``tr(uᵀv)``, ``tr(uᵀ(I − xxᵀ/2)v)``, or that of a `BetaMetric`.

        ``keepdim`` keeps the two summed dimensions as size 1.
        """
        v = u if v is None else v
        validate_arguments(self._outline, one_dtype=False, x=x, u=u, v=v)
        with full_precision(x.device):
            return as_metric(self.metric).inner(x, u, v, keepdim=keepdim)

    def dist(self, x: Point, y: Point, *, keepdim: bool = False) -> Tensor:
        """Length of the shortest geodesic from x to y, within the radius of `logmap`.

        Differentiable: the gradient is minus the unit vector of the logarithm, 0 where x = y.
        """
        length: Tensor = Distance.apply(x, y, self)  # type: ignore[no-untyped-call]
        return length if keepdim else length[..., 0, 0]

    @torch.no_grad()
    def logmap(self, x: Point, y: Point) -> Tangent:
        """The tangent vector at x of the shortest geodesic that reaches y at time 1. Carries no gradient.

        Computed in float64 by iteration, then verified: the geodesic ends at y, and is shorter than a lower bound of
        the injectivity radius (docs/geometry.md, "Logarithm and distance"), so it is the only shortest one.

        Raises:
            ValueError: when either fails, for NaN, and for points off the manifold by more than 1e-4.
        """
        validate_arguments(self._outline, one_dtype=False, x=x, y=y)
        with full_precision(x.device):
            return logarithm(as_metric(self.metric), *self._refined(x, y), tangent=self._tangent).to(x.dtype)

    def retr(self, x: Point, u: Tangent) -> Point:
        """The retraction of u at x; only the tangent part of u counts. ValueError if it returns another shape."""
        validate_arguments(self._outline, x=x, u=u)
        with full_precision(x.device):
            return self._retracted(*self._step(x, u)).to(x.dtype)

    @torch.no_grad()
    def inverse_retr(self, x: Point, y: Point) -> Tangent:
        """The tangent vector u with ``retr(x, u) = y``, in closed form. Carries no gradient.

        Raises:
            ValueError: when the retraction has no closed-form inverse (`Invertible`), or it does not lead to y.
        """
        validate_arguments(self._outline, one_dtype=False, x=x, y=y)
        with full_precision(x.device):
            return inverse_retraction(self.retraction, *self._refined(x, y), tangent=self._tangent).to(x.dtype)

    def expmap(self, x: Point, u: Tangent) -> Point:
        """The point at time 1 of this metric's geodesic from x with velocity u (tangent part).

        Source: edelman1998geometry; see `geodesic`. O(n p²) + O(p³).
        """
        validate_arguments(self._outline, x=x, u=u)
        with full_precision(x.device):
            start, step, _ = self._step(x, u)
            y = geodesic(start, step, twist=as_metric(self.metric).twist)
            return polar_near(self._project_out(y), far=NEAR).to(x.dtype)

    def transp(self, x: Point, y: Point, v: Tangent) -> Tangent:
        """The projection of v, tangent at x, onto the tangent space at y."""
        validate_arguments(self._outline, y=y, v=v)
        return self.proju(y, v)

    def retr_transp(self, x: Point, u: Tangent, v: Tangent) -> tuple[Point, Tangent]:
        """``retr(x, u)`` and v carried there by this manifold's transport."""
        validate_arguments(self._outline, x=x, u=u)
        validate_arguments(self._outline, one_dtype=False, x=x, v=v)
        with full_precision(x.device):
            start, step, long = self._step(x, u)
            y, v = self._retracted(start, step, long), v.to(start.dtype)
            if self.transport != "projection":
                v = carry(self.transport, self.retraction, start, step, self._tangent(start, v))
            return y.to(x.dtype), self._tangent(y, v).to(x.dtype)

    def expmap_transp(self, x: Point, u: Tangent, v: Tangent) -> tuple[Point, Tangent]:
        """``expmap(x, u)`` and v carried there: parallel if that is this manifold's transport, else projected."""
        validate_arguments(self._outline, x=x, u=u)
        validate_arguments(self._outline, one_dtype=False, x=x, v=v)
        y = self.expmap(x, u)
        if self.transport == "parallel":
            with full_precision(x.device):
                start, step, _ = self._step(x, u)
                v = carry(self.transport, self.retraction, start, step, self._tangent(start, v.to(start.dtype)))
                v = v.to(x.dtype)
        return y, self.transp(x, y, v)

    def extra_repr(self) -> str:
        """The options that the printed module shows."""
        options = f", metric={self.metric!r}" if self.metric != "euclidean" else ""
        options += f", transport={self.transport!r}" if self.transport != "projection" else ""
        return f"protected={self.k}, retraction={self.retraction.name!r}{options}"

    def _step(self, x: Tensor, u: Tensor) -> tuple[Point, Tangent, bool]:
        """The point, the tangent part of u minus the leak of x into F, and whether u is long (then in float64).

        The sum x + step is orthogonal to F. The normal part is removed first, and P is applied last: docs/geometry.md,
        "Project the sum".
        """
        require_dtype(x)
        if long := is_long(u):
            x, u = widened(x, u, off=self._project_out)
        step = minus_product(u, x, sym(x.mT @ u))
        return x, self._project_out(x + step) - x if self.width else step, long

    def _retracted(self, x: Point, step: Tangent, long: bool) -> Point:
        y = self.retraction(x, step)
        if y.shape != step.shape:
            raise ValueError(
                f"the retraction {self.retraction.name!r} returned shape {tuple(y.shape)} for a step of shape "
                f"{tuple(step.shape)}: it must keep it"
            )
        if long and isinstance(self.retraction, Scheduled):
            y = polar_near(y, far=NEAR)  # columns of very different lengths would magnify the rounding of F
        # A retraction that weighs x and the step separately keeps a leak of x. After a long step, the rounding of F
        # makes a second projection necessary.
        return polar_near(self._project_out(y), far=NEAR) if long or not depends_on_sum(self.retraction) else y


geoopt.Stiefel.register(RestrictedStiefel)  # for isinstance and geoopt.utils.ismanifold


def kind_of(manifold: Any) -> str:
    """The name of a manifold, for parameter groups and records."""
    return str(getattr(manifold, "name", type(manifold).__name__))
