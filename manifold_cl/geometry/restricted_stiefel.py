"""The restricted Stiefel manifold as geoopt sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import geoopt
import torch
from geoopt.manifolds.base import Manifold
from torch import Tensor

from manifold_cl.geometry.distances import Distance, inverse_retraction, logarithm
from manifold_cl.geometry.long_steps import is_long, widened
from manifold_cl.geometry.metrics import METRICS
from manifold_cl.geometry.points import RestrictedPoints, require_dtype
from manifold_cl.geometry.retractions import Retraction, as_retraction
from manifold_cl.geometry.retractions.protocol import sums
from manifold_cl.geometry.subspace import Array, ProtectedSubspace, stack_bases
from manifold_cl.geometry.transports import REVERSIBLE, carry, check_transport, default_retraction, default_transport
from manifold_cl.linalg import NEAR, Point, Tangent, full_precision, minus_product, polar_near, sym


class RestrictedStiefel(RestrictedPoints):
    """``St(n, p; F) = {x : xᵀx = I, Fᵀx = 0}`` with the Euclidean or the canonical metric.

    Geometrically the Stiefel manifold of the complement of F; in coordinates it stays in Rⁿ, so that its
    points are the factors a layer multiplies with. Passing ``complement=None`` protects nothing.

    The manifold, not the retraction, makes a vector tangent and applies ``P = I − FFᵀ`` to the *sum*
    x + u: a point that has drifted into F is brought back by every step, at the price of one projection.

    Where F fills the space up to p dimensions (n − k = p) the manifold is a rotation group and its mirror image:
    two components, which no path joins. `random` draws from both with equal chance, no step ever changes the
    determinant, and `logmap` between them is refused.

    Values pass through: a NaN in x or u comes out as NaN, for a gradient scaler to see. Only what must read its
    result anyway (`projx` far from the manifold, `inverse_retr`, `logmap`, `dist`) refuses it.

    Args:
        complement: what points must be orthogonal to. A tensor or array (…, n, k) is copied, and orthonormalised in
            float64 unless it is orthonormal already; zero columns are legal padding. Kept in float32 or wider,
            whatever the module is converted to. To change it, assign a new tensor or write to it in place. An
            optimizer sees a write through ``.data`` only when it measures the constraint, which then fails.
        retraction: a name, a `Retraction`, or a bare function of (x, u). If not given, the second-order one of the
            metric (``polar``, ``cayley``) or the one that the transport needs.
        metric: ``"euclidean"``, tr(uᵀv), or ``"canonical"``, tr(uᵀ(I − xxᵀ/2)v): decides inner products, gradients,
            geodesics and distances.
        transport: how vectors follow a step: ``"projection"``, ``"differentiated"``, ``"isometric"`` or
            ``"parallel"`` (see `transports`). The last two make the manifold ``reversible``. If not given,
            ``"differentiated"`` for the Cayley retractions and ``"projection"`` for all others.

    Raises:
        ValueError: for a complement with NaNs or without full column rank, for unknown names, and for a transport
            that does not belong to the retraction or metric.
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
        metric: Literal["euclidean", "canonical"] = "euclidean",
        transport: str | None = None,
    ) -> None:
        super().__init__(complement)
        if metric not in METRICS:
            raise ValueError(f"metric is one of {', '.join(METRICS)}, got {metric!r}")
        self.metric = metric
        self.retraction = as_retraction(default_retraction(metric, transport) if retraction is None else retraction)
        self.transport = default_transport(self.retraction) if transport is None else transport
        check_transport(self.transport, self.retraction, metric)
        self.reversible = self.transport in REVERSIBLE

    @classmethod
    def stack(cls, manifolds: Sequence[RestrictedStiefel]) -> RestrictedStiefel:
        """One manifold for a batch of points (B, n, p), the i-th on ``manifolds[i]``.

        The complements are padded to one width by zero columns, which protect nothing.

        Raises:
            ValueError: for no manifolds, or ones that differ in rows, retraction, metric, transport or device.
        """
        if len({(m.retraction, m.metric, m.transport) for m in manifolds}) != 1:
            raise ValueError("a batch is one or more manifolds of the same retraction, metric and transport")
        bases = [m.complement for m in manifolds]
        known = [basis for basis in bases if basis is not None]
        if len({(basis.shape[:-1], basis.device) for basis in known}) > 1 or any(basis.ndim != 2 for basis in known):
            raise ValueError(
                "a batch stacks complements (n, k) of one n on one device, got "
                + ", ".join(f"{tuple(basis.shape)} on {basis.device}" for basis in known)
            )
        complement = None
        if known:
            widest = max(known, key=lambda basis: basis.element_size())
            complement = stack_bases(bases, widest.shape[0], like=widest)
        first = manifolds[0]
        return cls(complement, retraction=first.retraction, metric=first.metric, transport=first.transport)

    # -- metric ---------------------------------------------------------------------------------

    def egrad2rgrad(self, x: Point, u: Tangent) -> Tangent:
        """The Riemannian gradient of the Euclidean gradient u, in this manifold's metric.

        ``P (u − x sym(xᵀu))`` or, canonical, ``P (u − x uᵀx)``: a projection only in the first case.
        """
        require_dtype(x)
        with full_precision(x.device):
            return self._project_out(METRICS[self.metric].gradient(x, u))

    def ehess2rhess(self, x: Point, g: Tangent, h: Tangent, u: Tangent) -> Tangent:
        """The Riemannian Hessian along the tangent vector u, in this manifold's metric.

        Args:
            x: where.
            g: the Euclidean gradient there.
            h: the Euclidean Hessian along u, that is the derivative of g in direction u.
            u: a tangent vector.
        """
        require_dtype(x)
        with full_precision(x.device):
            return METRICS[self.metric].hessian(x, self._project_out(g), self._project_out(h), u)

    def inner(self, x: Point, u: Tangent, v: Tangent | None = None, *, keepdim: bool = False) -> Tensor:
        """``tr(uᵀv)`` or ``tr(uᵀ(I − xxᵀ/2)v)``, batched; ``keepdim`` keeps the two summed dimensions as size 1."""
        with full_precision(x.device):
            return METRICS[self.metric].inner(x, u, u if v is None else v, keepdim=keepdim)

    def dist(self, x: Point, y: Point, *, keepdim: bool = False) -> Tensor:
        """Length of the one shortest geodesic from x to y; `logmap` says how far that is known.

        Differentiable: its gradient is minus the unit vector of the logarithm, 0 where x = y.
        """
        length: Tensor = Distance.apply(x, y, self)  # type: ignore[no-untyped-call]
        return length if keepdim else length[..., 0, 0]

    @torch.no_grad()
    def logmap(self, x: Point, y: Point) -> Tangent:
        """The tangent vector at x whose geodesic reaches y at time 1, shorter than any other. Carries no gradient.

        Found in float64 by iteration (`logarithms`), then checked: it leads to y, and it is shorter than a known
        lower bound of the injectivity radius (π in the Euclidean metric, 0.89 π in the canonical one), which makes
        it the only shortest one.

        Raises:
            ValueError: where either check fails; beyond the radius nothing is claimed. For NaN, and for points off
                the manifold by more than 1e-4.
        """
        with full_precision(x.device):
            return logarithm(METRICS[self.metric], *self._settled(x, y), tangent=self._tangent).to(x.dtype)

    # -- moving ---------------------------------------------------------------------------------

    def retr(self, x: Point, u: Tangent) -> Point:
        """The point reached by u, by this manifold's retraction; u need not be tangent, its tangent part counts.

        Raises:
            ValueError: when a retraction of one's own returns another shape.
        """
        with full_precision(x.device):
            return self._retracted(*self._step(x, u)).to(x.dtype)

    @torch.no_grad()
    def inverse_retr(self, x: Point, y: Point) -> Tangent:
        """The tangent vector that `retr` takes from x to y, in closed form. Carries no gradient.

        Raises:
            ValueError: when the retraction has no inverse (`Invertible`), or reaches y by no vector that it finds.
        """
        with full_precision(x.device):
            return inverse_retraction(self.retraction, *self._settled(x, y), tangent=self._tangent).to(x.dtype)

    def expmap(self, x: Point, u: Tangent) -> Point:
        """The point at time 1 of this metric's geodesic from x with velocity u (tangent part).

        Source: edelman1998geometry; see `geodesic`. O(n p²) + O(p³).
        """
        with full_precision(x.device):
            start, step, _ = self._step(x, u)
            return polar_near(self._project_out(METRICS[self.metric].exp(start, step)), far=NEAR).to(x.dtype)

    def transp(self, x: Point, y: Point, v: Tangent) -> Tangent:
        """The projection of v, tangent at x, onto the tangent space at y: what two points alone allow."""
        return self.proju(y, v)

    def retr_transp(self, x: Point, u: Tangent, v: Tangent) -> tuple[Point, Tangent]:
        """``retr(x, u)`` and v carried there by this manifold's transport."""
        with full_precision(x.device):
            start, step, long = self._step(x, u)
            y, v = self._retracted(start, step, long), v.to(start.dtype)
            if self.transport != "projection":
                v = carry(self.transport, self.retraction, start, step, self._tangent(start, v))
            return y.to(x.dtype), self._tangent(y, v).to(x.dtype)

    def expmap_transp(self, x: Point, u: Tangent, v: Tangent) -> tuple[Point, Tangent]:
        """``expmap(x, u)`` and v carried there: parallel if that is this manifold's transport, else projected."""
        y = self.expmap(x, u)
        if self.transport == "parallel":
            with full_precision(x.device):
                start, step, _ = self._step(x, u)
                v = carry(self.transport, self.retraction, start, step, self._tangent(start, v.to(start.dtype)))
                v = v.to(x.dtype)
        return y, self.transp(x, y, v)

    def transp_follow_retr(self, x: Point, u: Tangent, v: Tangent) -> Tangent:
        """The vector v carried along the retraction curve of u."""
        return self.retr_transp(x, u, v)[1]

    def transp_follow_expmap(self, x: Point, u: Tangent, v: Tangent) -> Tangent:
        """The vector v carried along the geodesic of u."""
        return self.expmap_transp(x, u, v)[1]

    def extra_repr(self) -> str:
        """What the printed module shows."""
        options = f", metric={self.metric!r}" if self.metric != "euclidean" else ""
        options += f", transport={self.transport!r}" if self.transport != "projection" else ""
        return f"protected={self.k}, retraction={self.retraction.name!r}{options}"

    # -- inside ---------------------------------------------------------------------------------

    def _step(self, x: Tensor, u: Tensor) -> tuple[Point, Tangent, bool]:
        """The point, the tangent part of u less what of x itself has drifted into F, and whether u is long.

        Off F is the sum x + step. The normal part leaves first, P comes last: docs/geometry.md, section 3. Both are
        in float64 where u is long.
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
        # A retraction that weighs x and the step apart lets a leak of x through; after a long step F is not orthonormal
        # enough for the sum alone to be clean.
        return polar_near(self._project_out(y), far=NEAR) if long or not sums(self.retraction) else y


geoopt.Stiefel.register(RestrictedStiefel)  # isinstance and geoopt.utils.ismanifold answer True


def kind_of(manifold: Any) -> str:
    """A plain-text name of the manifold, for parameter groups and records."""
    return str(getattr(manifold, "name", type(manifold).__name__))
