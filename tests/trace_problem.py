"""A problem for pymanopt that several tests share."""

import numpy as np
import pymanopt


def trace_problem(manifold, a):
    """Maximise tr(xᵀ A x) for a symmetric A, with its gradient and Hessian."""

    @pymanopt.function.numpy(manifold)
    def cost(x):
        return -np.trace(x.T @ a @ x) / 2

    @pymanopt.function.numpy(manifold)
    def gradient(x):
        return -a @ x

    @pymanopt.function.numpy(manifold)
    def hessian(x, u):
        return -a @ u

    return pymanopt.Problem(manifold, cost, euclidean_gradient=gradient, euclidean_hessian=hessian)
