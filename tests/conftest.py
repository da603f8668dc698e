"""Shape checking in the tests only: every jaxtyping annotation of the geometry is enforced by beartype."""

import gc

import pytest
import shape_checks
import torch
from jaxtyping import install_import_hook

gc.set_threshold(50_000)  # each collection visits all that torch and transformers have imported

install_import_hook(["manifold_cl.linalg", "manifold_cl.geometry"], "shape_checks.counted")


@pytest.fixture(autouse=True)
def _checked_shapes() -> None:
    shape_checks.BUDGET.renew()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
