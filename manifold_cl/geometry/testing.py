"""The checks as classes for pytest: subclass one in a test module, and its cases become tests.

    class TestMine(RetractionContract):
        retraction = MyRetraction()

Every metric and size is a test of its own; one that fails prints its whole report.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

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
        """Make a test of every case; pytest calls this."""
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", list(type(self)._cases()))

    def test_every_law_holds(self, case: str) -> None:
        """The report of the case, printed in full where a law is broken."""
        report = self._cases()[case]()
        assert report.passed, str(report)


class RetractionContract(_Contract):
    """`check_retraction` for every declared metric and a spread of sizes, as tests.

    Set ``retraction`` in a subclass: a name, a `Retraction` or a bare function wrapped in ``staticmethod``.
    """

    retraction: ClassVar[Any] = "polar"
    sizes: ClassVar[Sequence[tuple[int, int, int]]] = ((20, 4, 5), (20, 4, 1), (20, 4, 0), (12, 4, 8), (12, 1, 3))
    """(n, p, k): usual, almost and quite unrestricted, square (n − k = p), one column."""
    seed: ClassVar[int] = 0

    @classmethod
    def _cases(cls) -> dict[str, Callable[[], Report]]:
        rule = as_retraction(cls.retraction)

        def case(metric: Any, size: tuple[int, int, int]) -> Callable[[], Report]:
            n, p, k = size
            return lambda: check_retraction(rule, metric, n=n, p=p, k=k, seed=cls.seed)

        return {
            f"{metric}-{size[0]}x{size[1]}-{size[2]}": case(metric, size) for metric in rule.order for size in cls.sizes
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
        m, size, seed = cls.manifold, cls.size, cls.seed
        if m is None:  # the class itself, when it is imported into a test module
            return {}
        return {
            "projection": lambda: check_projection(m, *size, seed=seed),
            "transport": lambda: check_transport(m, *size, seed=seed),
            "gradient": lambda: check_gradient(m, quartic, size=size, seed=seed),
            "hessian": lambda: check_hessian(m, quartic, size=size, seed=seed),
        }


def quartic(x: Tensor) -> Tensor:
    """A polynomial of degree 4 in the entries, weighted so that no symmetry hides an error: the tests' cost."""
    rows = 1 + 0.1 * x.new_tensor(range(x.shape[-2])).unsqueeze(-1)
    columns = x.new_tensor(range(1, x.shape[-1] + 1))
    return (rows * columns * x**2).sum() / 10 + (rows * x**3).sum() / 3 + (rows * x**4).sum() / 4
