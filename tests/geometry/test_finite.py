"""`is_finite` against the mask of the entries, also where a sum of finite entries overflows."""

import pytest
import torch

from manifold_cl.linalg import is_finite

LARGEST = torch.finfo(torch.float16).max
CASES = {
    "finite": [1.0, -2.0, 0.0],
    "empty": [],
    "nan": [1.0, float("nan"), 2.0],
    "infinite": [float("inf"), 1.0],
    "infinite of both signs": [float("inf"), 1.0, -float("inf")],
    "a finite sum that overflows": [LARGEST, LARGEST, 1.0],
    "an overflow, and then an infinite entry": [LARGEST, LARGEST, -float("inf")],
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_is_finite_agrees_with_every_entry(case, dtype):
    a = torch.tensor(CASES[case], dtype=torch.float64)
    if case.startswith("a") and dtype != torch.float16:
        a = torch.where(a == LARGEST, torch.finfo(dtype).max, a)
    a = a.to(dtype).repeat(40).view(2, -1).mT  # long enough for vectors, and not contiguous
    assert is_finite(a) is bool(a.isfinite().all())
    assert is_finite(a) is (case in ("finite", "empty", "a finite sum that overflows"))


def test_whole_numbers_and_parameters_are_finite():
    assert is_finite(torch.full((300,), 255, dtype=torch.uint8))
    assert is_finite(torch.nn.Parameter(torch.ones(3)))
