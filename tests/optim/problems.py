"""Small training problems that the optimizer tests share."""

import geoopt
import torch
from torch import nn

from manifold_cl import EBLoRALinear, RestrictedStiefel


class Net(nn.Module):
    """Two adapted layers of different sizes and complements, a trainable head, and a loss that falls."""

    def __init__(self, seed=0, k=(6, 11)):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.first = self._adapted(24, 32, k[0], draw)
        self.second = self._adapted(32, 24, k[1], draw)
        self.head = nn.Linear(32, 3)
        self.x = torch.randn(40, 32, generator=draw)
        self.y = torch.randn(40, 3, generator=draw)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(3, 32, generator=draw) / 6)
            self.head.bias.zero_()

    @staticmethod
    def _adapted(m, n, k, draw):
        base = nn.Linear(n, m, bias=False)
        with torch.no_grad():
            base.weight.copy_(torch.randn(m, n, generator=draw) / n**0.5)
        basis = torch.linalg.qr(torch.randn(n, k, generator=draw))[0]
        return EBLoRALinear(base, 4, complement=basis, initial_scale=0.3, generator=draw)

    def loss(self):
        return ((self.head(self.second(torch.tanh(self.first(self.x)))) - self.y) ** 2).mean()

    def worst(self):
        return max(
            max(manifold.constraint_error(p))
            for layer in (self.first, self.second)
            for _, p, manifold in layer.manifold_parameters()
        )


def train(net, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        net.loss().backward()
        optimizer.step()


class Plain(torch.optim.Optimizer):
    """Gradient descent as packages write it: private ``_step`` per group, plain numbers and lists in the state."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})
        self.count = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.count += 1
        for group in self.param_groups:
            self._step(group)

    def _step(self, group):
        for p in group["params"]:
            if p.grad is not None:
                self.state[p].setdefault("history", []).append(float(p.grad.norm()))
                self.move(p, p.grad, group["lr"])

    def move(self, p, grad, lr):
        p.data.sub_(grad, alpha=lr)


def problem(generator, dtype=torch.float32):
    """Two points of one shape and one of another, with complements, and a plain weight; a loss with gradients."""
    points = []
    for n, p, k in ((18, 3, 5), (18, 3, 6), (11, 2, 3)):
        manifold = RestrictedStiefel(torch.linalg.qr(torch.randn(n, k, dtype=dtype, generator=generator))[0])
        start = manifold.random(n, p, dtype=dtype, generator=generator).detach()
        points.append(geoopt.ManifoldParameter(start, manifold=manifold))
    return [*points, nn.Parameter(torch.ones(4, dtype=dtype))]


def backward(params, *, without=None):
    for p in params:
        p.grad = None
    sum(((p - 0.3) ** 3).sum() * (i + 1) for i, p in enumerate(params)).backward()
    if without is not None:
        params[without].grad = None
