"""Checks as classes for pytest: subclass one in a test module, and its cases become tests.

    class TestMine(RetractionContract):
        retraction = MyRetraction()

Each metric and size is one test. A failing test prints its complete report.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, cast

from torch import Tensor

from manifold_cl.geometry.checks import (
    Report,
    check_gradient,
    check_hessian,
    check_projection,
    check_retraction,
    check_transport,
)
from manifold_cl.geometry.retractions import as_retraction


class _Contract:
    @classmethod
    def _cases(cls) -> dict[str, Callable[[], Report]]:
        raise NotImplementedError

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Parametrize tests by case (a hook of pytest)."""
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", list(type(self)._cases()))

    def test_every_law_holds(self, case: str) -> None:
        """Every law of the case's report holds."""
        report = self._cases()[case]()
        assert report.passed, str(report)


class RetractionContract(_Contract):
    """`check_retraction` for every declared metric and several sizes, as tests.

    Set ``retraction`` in a subclass: a name, a `Retraction` or a bare function wrapped in ``staticmethod``.
    """

    retraction: ClassVar[Any] = "polar"
    sizes: ClassVar[Sequence[tuple[int, int, int]]] = ((20, 4, 5), (20, 4, 1), (20, 4, 0), (12, 4, 8), (12, 1, 3))
    """(n, p, k): several protected directions, one, none, square (n − k = p), one column."""
    seed: ClassVar[int] = 0

    @classmethod
    def _cases(cls) -> dict[str, Callable[[], Report]]:
        rule = as_retraction(cls.retraction)
        return {
            f"{metric}-{n}x{p}-{k}": partial(check_retraction, rule, cast(Any, metric), n=n, p=p, k=k, seed=cls.seed)
            for metric in rule.order
            for n, p, k in cls.sizes
        }


class ManifoldContract(_Contract):
    """`check_projection`, `check_transport`, `check_gradient` and `check_hessian` of a manifold, as tests.

    Set ``manifold`` and ``size`` in a subclass.
    """

    manifold: ClassVar[Any] = None
    size: ClassVar[tuple[int, int]] = (20, 4)
    seed: ClassVar[int] = 0

    @classmethod
    def _cases(cls) -> dict[str, Callable[[], Report]]:
        if cls.manifold is None:  # the class itself, when it is imported into a test module
            return {}
        return {
            "projection": partial(check_projection, cls.manifold, *cls.size, seed=cls.seed),
            "transport": partial(check_transport, cls.manifold, *cls.size, seed=cls.seed),
            "gradient": partial(check_gradient, cls.manifold, quartic, size=cls.size, seed=cls.seed),
            "hessian": partial(check_hessian, cls.manifold, quartic, size=cls.size, seed=cls.seed),
        }


def quartic(x: Tensor) -> Tensor:
    """The tests' cost: a polynomial of degree 4 in the entries, weighted so that no symmetry hides an error."""
    rows = 1 + 0.1 * x.new_tensor(range(x.shape[-2])).unsqueeze(-1)
    columns = x.new_tensor(range(1, x.shape[-1] + 1))
    return (rows * columns * x**2).sum() / 10 + (rows * x**3).sum() / 3 + (rows * x**4).sum() / 4
