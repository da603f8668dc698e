"""Cases that the property tests draw from, their number, and counts of those that held.

``make slow`` runs `CASES` cases per property with fixed seeds. ``make properties`` runs ten times as many with new
seeds, by ``MANIFOLD_CL_PROPERTIES=many``, and writes the counts to ``benchmarks/results/properties.json``.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manifold_cl import RestrictedStiefel
from manifold_cl.geometry.subspace import stack_bases

CASES = 80
"""Cases per property in the slow suite."""
PROFILES = {"few": 1, "many": 10}
"""Name of a profile → its factor on `CASES`."""
PROFILE = os.environ.get("MANIFOLD_CL_PROPERTIES", "few")
ran: dict[str, int] = {}
"""Property → cases that ran in this process."""

EPS = {torch.float32: 1.2e-7, torch.float64: 2.3e-16}
PROMISE = {torch.float32: 2e-6, torch.float64: 2e-13}
"""Largest constraint error: the documented one in float32, a thousand roundings in float64."""
LENGTHS = (0.0, 1e-20, 1e-9, 1e-4, 0.1, 1.0, 7.9, 8.1, 1e3, 1e7, 1e20, 1e30)
"""Lengths of steps, on both sides of the length from which steps are taken in float64."""
SHORT = LENGTHS[:6]


def holds_for(cases: int = CASES, **strategies: Any) -> Callable[[Callable[..., None]], Any]:
    """Decorator: the test holds for every draw of the strategies."""

    def decorate(test: Callable[..., None]) -> Any:
        name = f"{test.__module__}.{test.__name__}"

        @functools.wraps(test)
        def counted(*args: Any, **kwargs: Any) -> None:
            test(*args, **kwargs)
            ran[name] = ran.get(name, 0) + 1

        counted.__signature__ = inspect.signature(test)  # type: ignore[attr-defined]
        chosen = settings(
            max_examples=cases * PROFILES[PROFILE],
            deadline=None,
            derandomize=PROFILE == "few",
            database=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.differing_executors],
        )
        made = chosen(given(**strategies)(counted))
        made.cases = cases
        return made

    return decorate


@dataclass(frozen=True)
class Case:
    """Sizes, precision and seed of one case; tensors are drawn from the seed."""

    n: int
    p: int
    k: int
    batch: tuple[int, ...]
    dtype: torch.dtype
    seed: int

    @functools.cached_property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def gaussian(self, *size: int) -> torch.Tensor:
        """Normal numbers in the case's precision."""
        return torch.randn(*size, dtype=torch.float64, generator=self.generator).to(self.dtype)

    def orthogonal(self, size: int) -> torch.Tensor:
        """A random orthogonal matrix in float64."""
        return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=self.generator))[0]

    def bases(self) -> torch.Tensor | None:
        """Protected directions: none for k = 0; for a batch, k, k − 1, ... directions, padded with zero columns."""
        if not self.k:
            return None
        count = 1
        for size in self.batch:
            count *= size
        drawn = [torch.linalg.qr(self.gaussian(self.n, self.k).double())[0].to(self.dtype) for _ in range(count)]
        if not self.batch:
            return drawn[0]
        widths = [max(self.k - i, 0) for i in range(count)]
        each = [basis[:, :width] if width else None for basis, width in zip(drawn, widths, strict=True)]
        stacked = stack_bases(each, self.n, like=drawn[0], width=self.k)
        return stacked.reshape(*self.batch, self.n, self.k)

    def manifold(self, **options: Any) -> RestrictedStiefel:
        return RestrictedStiefel(self.bases(), **options)

    def point(self, manifold: RestrictedStiefel) -> torch.Tensor:
        drawn = manifold.random(*self.batch, self.n, self.p, dtype=self.dtype, generator=self.generator)
        return drawn.as_subclass(torch.Tensor)

    def vector(self, manifold: RestrictedStiefel, x: torch.Tensor, length: float = 1.0) -> torch.Tensor:
        """A tangent vector at x; the longest of the batch has this length. Zero where no vector is tangent."""
        u = manifold.proju(x, self.gaussian(*self.batch, self.n, self.p))
        sizes = torch.linalg.matrix_norm(u, keepdim=True)
        return torch.where(sizes > 1e-3, u, 0) * (length / max(float(sizes.max()), 1e-3))


KINDS = ("usual", "one column", "no freedom", "square", "nothing protected")


@st.composite
def cases(
    draw: st.DrawFn,
    kinds: tuple[str, ...] = KINDS,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64),
    batches: tuple[tuple[int, ...], ...] = ((), (), (2,), (3,), (2, 2)),
    largest: int = 14,
) -> Case:
    """Sizes of every kind: usual ones, p = 1, n − k = p, n = p, k = 0; batches whose members protect different k."""
    kind = draw(st.sampled_from(kinds))
    p = 1 if kind == "one column" else draw(st.integers(1, 5))
    if kind == "no freedom":
        k = draw(st.integers(1, largest - p))
        n = p + k
    elif kind == "square":
        n, k = p, 0
    else:
        n = draw(st.integers(p + 1, largest))
        k = 0 if kind == "nothing protected" else draw(st.integers(min(1, n - p), n - p))
    seed = draw(st.integers(0, 2**32 - 1))
    return Case(n, p, k, draw(st.sampled_from(batches)), draw(st.sampled_from(dtypes)), seed)


def double(**options: Any) -> st.SearchStrategy[Case]:
    """`cases` in float64."""
    return cases(dtypes=(torch.float64,), **options)


def single(**options: Any) -> st.SearchStrategy[Case]:
    """`cases` of one point in float64."""
    return cases(dtypes=(torch.float64,), batches=((),), **options)


def close(a: Any, b: Any, atol: float) -> None:
    """Assert that no entries differ by more than ``atol``."""
    torch.testing.assert_close(a, b, rtol=0, atol=atol)
