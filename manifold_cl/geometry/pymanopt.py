"""The restricted Stiefel manifold for pymanopt: numpy arrays in and out, computed by the torch manifold without copies.

Has a Riemannian Hessian in both metrics, for second-order solvers.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from manifold_cl.geometry.restricted_stiefel import RestrictedStiefel as TorchRestrictedStiefel
from manifold_cl.geometry.subspace import ProtectedSubspace

try:
    from pymanopt.manifolds.manifold import RiemannianSubmanifold
except ImportError as error:
    raise ImportError("the pymanopt twin needs pymanopt: pip install 'pymanopt>=2.2.1'") from error

Array = npt.NDArray[Any]


class RestrictedStiefel(RiemannianSubmanifold):  # type: ignore[misc]  # pymanopt is not typed
    """``St(n, p; F)^k``, as arrays (n, p), or (k, n, p) for k > 1.

    Args:
        F: directions that points must be orthogonal to, (n, m) with m ≥ 0: an array, a tensor or a `ProtectedSubspace`.
        p: columns of a point.
        k: number of copies; points are then stacks.
        retraction: a name or an object; by default the second-order retraction of the metric.
        metric: ``"euclidean"`` or ``"canonical"``.

    Raises:
        ValueError: when F leaves fewer than p free directions.
    """

    def __init__(
        self,
        F: Array | Tensor | ProtectedSubspace,
        p: int,
        *,
        k: int = 1,
        retraction: Any = None,
        metric: Literal["euclidean", "canonical"] = "euclidean",
    ) -> None:
        basis = F.basis if isinstance(F, ProtectedSubspace) else torch.as_tensor(F)
        self.space = TorchRestrictedStiefel(basis.double(), retraction=retraction, metric=metric)
        self._size = (basis.shape[0], p) if k == 1 else (k, basis.shape[0], p)
        self._p, self._k = p, k
        self._draw = torch.Generator()
        self._draw.seed()
        name = f"Restricted Stiefel manifold St({basis.shape[0]},{p};{basis.shape[1]}) ({metric} metric)"
        super().__init__(f"Product of {k} copies of {name}" if k > 1 else name, k * self.space.dim(basis.shape[0], p))

    @property
    def typical_dist(self) -> float:
        """``sqrt(k p)``, the length of a point, which scales trust regions."""
        return math.sqrt(self._k * self._p)

    def seed(self, seed: int) -> None:
        """Seed the generator of random points and vectors."""
        self._draw.manual_seed(seed)

    def inner_product(self, point: Array, tangent_vector_a: Array, tangent_vector_b: Array) -> float:
        """The metric's inner product, summed over copies."""
        return float(self.space.inner(_t(point), _t(tangent_vector_a), _t(tangent_vector_b)).sum())

    def norm(self, point: Array, tangent_vector: Array) -> float:
        """Length of a tangent vector."""
        return math.sqrt(max(self.inner_product(point, tangent_vector, tangent_vector), 0.0))

    def projection(self, point: Array, vector: Array) -> Array:
        """The orthogonal projection onto the tangent space, Euclidean in both metrics."""
        return _n(self.space.proju(_t(point), _t(vector)))

    to_tangent_space = projection

    def zero_vector(self, point: Array) -> Array:
        """The zero tangent vector."""
        return np.zeros_like(point)

    def random_tangent_vector(self, point: Array) -> Array:
        """A random tangent vector of length 1."""
        gaussian = torch.randn(self._size, dtype=torch.float64, generator=self._draw)
        vector = _n(self.space.proju(_t(point), gaussian))
        return vector / self.norm(point, vector)

    def random_point(self) -> Array:
        """A point drawn uniformly."""
        return _n(self.space.random(*self._size, dtype=torch.float64, generator=self._draw).as_subclass(Tensor))

    def euclidean_to_riemannian_gradient(self, point: Array, euclidean_gradient: Array) -> Array:
        """The Riemannian gradient in the manifold's metric."""
        return _n(self.space.egrad2rgrad(_t(point), _t(euclidean_gradient)))

    def euclidean_to_riemannian_hessian(
        self, point: Array, euclidean_gradient: Array, euclidean_hessian: Array, tangent_vector: Array
    ) -> Array:
        """The Riemannian Hessian along a tangent vector, in the manifold's metric."""
        return _n(self.space.ehess2rhess(_t(point), _t(euclidean_gradient), _t(euclidean_hessian), _t(tangent_vector)))

    def retraction(self, point: Array, tangent_vector: Array) -> Array:
        """The retraction of a tangent vector."""
        return _n(self.space.retr(_t(point), _t(tangent_vector)))

    def exp(self, point: Array, tangent_vector: Array) -> Array:
        """The point at time 1 of the geodesic."""
        return _n(self.space.expmap(_t(point), _t(tangent_vector)))

    def log(self, point_a: Array, point_b: Array) -> Array:
        """The velocity of the geodesic from the first point to the second; ValueError if it may not be the shortest."""
        return _n(self.space.logmap(_t(point_a), _t(point_b)))

    def dist(self, point_a: Array, point_b: Array) -> float:
        """Length of the geodesic between two points; over copies, the root of the sum of squares."""
        return float(self.space.dist(_t(point_a), _t(point_b)).square().sum().sqrt())

    def transport(self, point_a: Array, point_b: Array, tangent_vector_a: Array) -> Array:
        """The projection of a tangent vector at one point onto the tangent space at another."""
        return _n(self.space.proju(_t(point_b), _t(tangent_vector_a)))

    def pair_mean(self, point_a: Array, point_b: Array) -> Array:
        """The middle of the geodesic between two points."""
        return self.exp(point_a, self.log(point_a, point_b) / 2)


def _t(a: Array) -> Tensor:
    """A tensor that shares the array's memory; a copy of a read-only array, because torch could write to it."""
    return torch.from_numpy(a if a.flags.writeable else a.copy())


def _n(a: Tensor) -> Array:
    return a.detach().numpy()
