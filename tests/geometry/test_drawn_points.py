"""Random points of draws for which one orthonormal factor magnifies rounding errors."""

import pytest
import torch

from manifold_cl import RestrictedStiefel

PROMISE = {torch.float32: 2e-6, torch.float64: 2e-15}


@pytest.mark.parametrize("dtype", PROMISE)
@pytest.mark.parametrize("seed", range(20))
def test_a_draw_nearly_inside_the_protected_subspace_gives_a_point_off_it(seed, dtype):
    draw = torch.randn(2, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    manifold = RestrictedStiefel((draw / draw.norm()).to(torch.float32))  # the draw of the point, but for its rounding
    x = manifold.random(2, 1, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    assert max(manifold.constraint_error(x)) <= max(PROMISE[dtype], 2e-7)  # F is rounded to float32


@pytest.mark.parametrize("seed", range(8))
def test_a_nearly_dependent_draw_gives_a_point_off_the_protected_subspace(seed):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(13, 11, dtype=torch.float64, generator=generator))[0]
    manifold = RestrictedStiefel(basis)
    for _ in range(50):  # p = n − k = 2: now and then the two columns are nearly parallel outside F
        x = manifold.random(13, 2, generator=generator)
        assert max(manifold.constraint_error(x)) <= PROMISE[torch.float64]
