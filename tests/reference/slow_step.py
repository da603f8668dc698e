"""The optimizer step written out, one matrix at a time, with dense projectors and SVDs: slow and obvious.

Follows docs/method.md, "Our step and the released one", in float64, independent of the library's code.
"""

import math

import torch


class SlowAdamW:
    """Element-wise AdamW on one matrix x (n, p), its step made Riemannian; f is a basis (n, k) or None."""

    def __init__(self, x, f, *, lr, official, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        self.x, self.lr, self.betas, self.eps, self.weight_decay = x.clone(), lr, betas, eps, weight_decay
        self.official = official
        n, p = x.shape
        self.projector = torch.eye(n, dtype=x.dtype) - (0 if f is None else f @ f.T)
        self.kappa = math.sqrt(4096 / p) if official else 1.0
        self.m = torch.zeros_like(x)
        self.v = torch.zeros_like(x)
        self.t = 0

    def canonical(self, z):
        pz = self.projector @ z
        return pz - self.x @ pz.T @ self.x

    def tangent(self, z):
        pz = self.projector @ z
        inner = self.x.T @ pz
        return pz - self.x @ (inner + inner.T) / 2

    def step(self, gradient):
        transform = self.canonical if self.official else self.tangent
        g = transform(gradient)
        self.t += 1
        b1, b2 = self.betas
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g * g
        m_hat, v_hat = self.m / (1 - b1**self.t), self.v / (1 - b2**self.t)
        half = self.x * (1 - self.lr * self.weight_decay) - self.lr * m_hat / (v_hat.sqrt() + self.eps)
        displacement = transform((half - self.x) * self.kappa)
        left, _, right = torch.linalg.svd(self.projector @ (self.x + displacement), full_matrices=False)
        self.x = left @ right
