"""Restricted Stiefel manifolds for pymanopt: numpy arrays in and out, computed by the torch manifolds without copies.

Has a Riemannian Hessian in every metric, for second-order solvers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from manifold_cl.geometry.metrics import MetricChoice, as_metric
from manifold_cl.geometry.restricted_stiefel import RestrictedStiefel as TorchRestrictedStiefel
from manifold_cl.geometry.stiefel_images import GeneralizedStiefel as TorchGeneralizedStiefel
from manifold_cl.geometry.stiefel_images import ScaledStiefel as TorchScaledStiefel
from manifold_cl.geometry.subspace import ProtectedSubspace, as_basis

try:
    from pymanopt.manifolds.manifold import RiemannianSubmanifold
except ImportError as error:
    raise ImportError("the pymanopt twin needs pymanopt: pip install 'pymanopt>=2.2.1'") from error

Array = npt.NDArray[Any]


class StiefelTwin(RiemannianSubmanifold):  # type: ignore[misc]  # pymanopt is not typed
    """The verbs of pymanopt, from a torch manifold ``space`` of n × p points, for k copies of it."""

    def __init__(self, space: Any, n: int, p: int, k: int, name: str, *, length: float) -> None:
        self.space = space
        self._size = (n, p) if k == 1 else (k, n, p)
        self._length = length
        self._draw = torch.Generator()
        self._draw.seed()
        super().__init__(f"Product of {k} copies of {name}" if k > 1 else name, k * space.dim(n, p))

    @property
    def typical_dist(self) -> float:
        """The length of a point in its own metric, ``sqrt(k p)`` for scale 1, which scales trust regions."""
        return self._length

    def seed(self, seed: int) -> None:
        """Seed the generator of random points and vectors."""
        self._draw.manual_seed(seed)

    def inner_product(self, point: Array, tangent_vector_a: Array, tangent_vector_b: Array) -> float:
        """The metric's inner product, summed over copies."""
        return float(
            self.space.inner(
                self._t("point", point),
                self._t("tangent_vector_a", tangent_vector_a),
                self._t("tangent_vector_b", tangent_vector_b),
            ).sum()
        )

    def norm(self, point: Array, tangent_vector: Array) -> float:
        """Length of a tangent vector."""
        return math.sqrt(max(self.inner_product(point, tangent_vector, tangent_vector), 0.0))

    def projection(self, point: Array, vector: Array) -> Array:
        """The projection onto the tangent space: `proju` of the torch manifold."""
        return _n(self.space.proju(self._t("point", point), self._t("vector", vector)))

    to_tangent_space = projection

    def zero_vector(self, point: Array) -> Array:
        """The zero tangent vector."""
        self._t("point", point)
        return np.zeros_like(point)

    def random_tangent_vector(self, point: Array) -> Array:
        """A random tangent vector of length 1."""
        gaussian = torch.randn(self._size, dtype=torch.float64, generator=self._draw)
        vector = _n(self.space.proju(self._t("point", point), gaussian))
        return vector / self.norm(point, vector)

    def random_point(self) -> Array:
        """A point drawn uniformly."""
        return _n(self.space.random(*self._size, dtype=torch.float64, generator=self._draw).as_subclass(Tensor))

    def euclidean_to_riemannian_gradient(self, point: Array, euclidean_gradient: Array) -> Array:
        """The Riemannian gradient in the manifold's metric."""
        return _n(self.space.egrad2rgrad(self._t("point", point), self._t("euclidean_gradient", euclidean_gradient)))

    def euclidean_to_riemannian_hessian(
        self, point: Array, euclidean_gradient: Array, euclidean_hessian: Array, tangent_vector: Array
    ) -> Array:
        """The Riemannian Hessian along a tangent vector, in the manifold's metric."""
        return _n(
            self.space.ehess2rhess(
                self._t("point", point),
                self._t("euclidean_gradient", euclidean_gradient),
                self._t("euclidean_hessian", euclidean_hessian),
                self._t("tangent_vector", tangent_vector),
            )
        )

    def retraction(self, point: Array, tangent_vector: Array) -> Array:
        """The retraction of a tangent vector."""
        return _n(self.space.retr(self._t("point", point), self._t("tangent_vector", tangent_vector)))

    def exp(self, point: Array, tangent_vector: Array) -> Array:
        """The point at time 1 of the geodesic."""
        return _n(self.space.expmap(self._t("point", point), self._t("tangent_vector", tangent_vector)))

    def log(self, point_a: Array, point_b: Array) -> Array:
        """The velocity of the geodesic from the first point to the second; ValueError if it may not be the shortest."""
        return _n(self.space.logmap(self._t("point_a", point_a), self._t("point_b", point_b)))

    def dist(self, point_a: Array, point_b: Array) -> float:
        """Length of the geodesic between two points; over copies, the root of the sum of squares."""
        return float(self.space.dist(self._t("point_a", point_a), self._t("point_b", point_b)).square().sum().sqrt())

    def transport(self, point_a: Array, point_b: Array, tangent_vector_a: Array) -> Array:
        """The projection of a tangent vector at one point onto the tangent space at another."""
        return _n(self.space.proju(self._t("point_b", point_b), self._t("tangent_vector_a", tangent_vector_a)))

    def pair_mean(self, point_a: Array, point_b: Array) -> Array:
        """The middle of the geodesic between two points."""
        return self.exp(point_a, self.log(point_a, point_b) / 2)

    def _t(self, name: str, a: Array) -> Tensor:
        """A tensor that shares the array's memory; a copy of a read-only array, because torch could write to it.

        Refuses another kind or shape than that of a point, by the argument's name.
        """
        if not isinstance(a, np.ndarray) or a.dtype.kind != "f":
            kind = f"an array of {a.dtype}" if isinstance(a, np.ndarray) else type(a).__name__
            raise TypeError(f"{name} is an array of floating-point numbers {self._size}, got {kind}")
        if a.shape != self._size:
            turned = f": pass {name}.T" if a.shape == self._size[::-1] else ""
            raise ValueError(f"{name} has shape {a.shape} and must have {self._size}, that of a point here{turned}")
        return torch.from_numpy(a if a.flags.writeable and min(a.strides) >= 0 else a.copy())


class RestrictedStiefel(StiefelTwin):
    """``St(n, p; F)^k``, as arrays (n, p), or (k, n, p) for k > 1.

    Args:
        F: directions that points must be orthogonal to, (n, m) with m ≥ 0: an array, a tensor or a `ProtectedSubspace`.
        p: columns of a point.
        k: number of copies; points are then stacks.
        retraction: a name or an object; by default the second-order retraction of the metric.
        metric: ``"euclidean"``, ``"canonical"`` or a `BetaMetric`.

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
        metric: MetricChoice = "euclidean",
    ) -> None:
        basis = _basis(F)
        (n, m), space = basis.shape, TorchRestrictedStiefel(basis, retraction=retraction, metric=metric)
        name = f"Restricted Stiefel manifold St({n},{p};{m}) ({_called(space)} metric)"
        super().__init__(space, n, p, k, name, length=math.sqrt(k * p))


class ScaledStiefel(StiefelTwin):
    """``{x : xᵀx = s² I, Fᵀx = 0}^k``, see `manifold_cl.geometry.ScaledStiefel`.

    Args:
        scale: s > 0, a number, or an array (k,) with one per copy.
        F: directions that points must be orthogonal to, (n, m) with m ≥ 0.
        p: columns of a point.
        k: number of copies; points are then stacks.
        retraction: a name or an object; by default the second-order retraction of the metric.
        metric: ``"euclidean"``, ``"canonical"`` or a `BetaMetric`.

    Raises:
        ValueError: for a scale that is not positive, and when F leaves fewer than p free directions.
    """

    def __init__(
        self,
        scale: float | Array,
        F: Array | Tensor | ProtectedSubspace,
        p: int,
        *,
        k: int = 1,
        retraction: Any = None,
        metric: MetricChoice = "euclidean",
    ) -> None:
        basis, s = _basis(F), torch.as_tensor(scale, dtype=torch.float64)
        (n, m), space = basis.shape, TorchScaledStiefel(s, basis, retraction=retraction, metric=metric)
        name = f"Scaled Stiefel manifold St({n},{p};{m}) ({_called(space.frames)} metric)"
        super().__init__(space, n, p, k, name, length=math.sqrt(k * p * float(s.square().mean())))


class GeneralizedStiefel(StiefelTwin):
    """``{x : xᵀBx = I, Fᵀx = 0}^k`` with the metric tr(uᵀBv), see `manifold_cl.geometry.GeneralizedStiefel`.

    Args:
        B: (n, n), symmetric and positive definite.
        F: directions that points must be orthogonal to, (n, m) with m ≥ 0.
        p: columns of a point.
        k: number of copies; points are then stacks.
        retraction: a name or an object; by default the second-order retraction of the metric.
        metric: ``"euclidean"``, ``"canonical"`` or a `BetaMetric`.

    Raises:
        ValueError: for a B that is not positive definite, and when F leaves fewer than p free directions.
    """

    def __init__(
        self,
        B: Array,
        F: Array | Tensor | ProtectedSubspace,
        p: int,
        *,
        k: int = 1,
        retraction: Any = None,
        metric: MetricChoice = "euclidean",
    ) -> None:
        basis = _basis(F)
        (n, m), space = basis.shape, TorchGeneralizedStiefel(B, basis, retraction=retraction, metric=metric)
        name = f"Generalized Stiefel manifold St({n},{p};{m}) ({_called(space.frames)} metric)"
        super().__init__(space, n, p, k, name, length=math.sqrt(k * p))


def _basis(F: Array | Tensor | ProtectedSubspace) -> Tensor:
    return (F.basis if isinstance(F, ProtectedSubspace) else as_basis(F)).double()


def _called(space: TorchRestrictedStiefel) -> str:
    """The name of the metric."""
    return as_metric(space.metric).name


def _n(a: Tensor) -> Array:
    return a.detach().numpy()
