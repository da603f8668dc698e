"""The two steps with transported moments written out, one matrix at a time: slow and obvious, in float64."""

import torch


class SlowTransport:
    """Adam on one matrix x (n, p) off the basis f; the first moment is projected to the tangent space at each new x.

    ``matrix`` keeps one second moment, the mean square of the Riemannian gradient, for the whole matrix.
    """

    def __init__(self, x, f, *, lr, matrix, betas=(0.9, 0.999), eps=1e-8):
        self.x, self.lr, self.betas, self.eps, self.matrix = x.clone(), lr, betas, eps, matrix
        self.projector = torch.eye(x.shape[0], dtype=x.dtype) - (0 if f is None else f @ f.T)
        self.m, self.v, self.t = torch.zeros_like(x), torch.zeros_like(x), 0

    def tangent(self, z):
        pz = self.projector @ z
        inner = self.x.T @ pz
        return pz - self.x @ (inner + inner.T) / 2

    def step(self, gradient):
        g = self.tangent(gradient)
        self.t += 1
        b1, b2 = self.betas
        square = torch.full_like(g, float((g * g).mean())) if self.matrix else g * g
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * square
        m_hat, v_hat = self.m / (1 - b1**self.t), self.v / (1 - b2**self.t)
        displacement = self.tangent(-self.lr * m_hat / (v_hat.sqrt() + self.eps))
        left, _, right = torch.linalg.svd(self.projector @ (self.x + displacement), full_matrices=False)
        self.x = left @ right
        self.m = self.tangent(self.m)
