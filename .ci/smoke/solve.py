"""Trust regions of pymanopt on the restricted Stiefel manifold: the leading eigenvectors off a protected subspace."""

import numpy as np
import pymanopt
import torch

from manifold_cl.geometry.pymanopt import RestrictedStiefel

matrix = torch.diag(torch.arange(12.0, 0.0, -1.0, dtype=torch.float64))
manifold = RestrictedStiefel(np.eye(12, 3), 2)


@pymanopt.function.pytorch(manifold)
def cost(x: torch.Tensor) -> torch.Tensor:
    """Minus the energy that the frame holds."""
    return -(x.mT @ matrix @ x).trace()


np.random.seed(0)
found = pymanopt.optimizers.TrustRegions(verbosity=0).run(pymanopt.Problem(manifold, cost))
np.testing.assert_allclose(found.cost, -(9.0 + 8.0), rtol=1e-9)
