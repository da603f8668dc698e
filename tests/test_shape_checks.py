"""Shapes are checked in every test, for its first calls."""

import jaxtyping
import pytest
import shape_checks
import torch

from manifold_cl import linalg


def test_a_wrong_shape_is_an_error() -> None:
    with pytest.raises(jaxtyping.TypeCheckError, match=r"parameters of manifold_cl\.linalg\.sym"):
        linalg.sym(torch.zeros(2, 3))


def test_checks_end_after_many_calls_until_the_next_test() -> None:
    square = torch.zeros(2, 2)
    while shape_checks.BUDGET.left > 0:
        linalg.sym(square)
    with pytest.raises(RuntimeError, match="must match the size"):  # torch's own error: nothing was checked
        linalg.sym(torch.zeros(2, 3))
    shape_checks.BUDGET.renew()
    test_a_wrong_shape_is_an_error()
