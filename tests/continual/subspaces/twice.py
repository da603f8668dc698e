"""A model that calls one linear layer twice, and batches for it."""

import torch
from torch import Tensor, nn

M, N = 14, 20


class Shared(nn.Module):
    """A model that calls one linear layer twice in a forward pass."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.layer = nn.Linear(N, M)
        self.back = nn.Linear(M, N)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(torch.tanh(self.back(torch.tanh(self.layer(x)))))
        return out


def loss_of(model: Shared, x: Tensor) -> Tensor:
    return model(x)[..., :2].square().sum()


def batches_of(generator: torch.Generator) -> list[Tensor]:
    return [torch.randn(5, 3, N, generator=generator) for _ in range(2)]
