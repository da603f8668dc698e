"""A network with an orthogonal layer, fitted to the answers of a network of the same kind."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from manifold_cl.lab.closed_forms import draw_basis
from manifold_cl.lab.pictures import leading_directions, patches
from manifold_cl.lab.problems import Problem


@dataclass(frozen=True)
class OrthogonalLayer(Problem):
    """``mean (tanh(Xx)W − Y)²/2``: a frame as first layer, a fixed second layer, patches of a picture as inputs.

    The answers Y are those of the same network with another frame, so the optimum is 0. The frame avoids the first
    principal directions of another picture. Derivatives come from automatic differentiation.
    """

    name: ClassVar[str] = "orthogonal_layer"
    known_by: ClassVar[str] = "construction"
    side: int = 8
    p: int = 8
    k: int = 8
    outputs: int = 10
    examples: int = 512
    seed: int = 5

    @cached_property
    def complement(self) -> Tensor:
        """The first principal directions of the scan."""
        return leading_directions(self.side, self.k)

    @cached_property
    def inputs(self) -> Tensor:
        """Patches of the elevation map, scaled so that their part off the complement has mean square 1."""
        rows = patches("elevation", self.side)
        rows = rows[torch.linspace(0, len(rows) - 1, self.examples).long()]
        free = rows - rows @ self.complement @ self.complement.mT
        scaled: Tensor = rows / free.square().mean().sqrt()
        return scaled

    @cached_property
    def second_layer(self) -> Tensor:
        """W (p, outputs)."""
        draw = torch.Generator().manual_seed(self.seed)
        gaussian: Tensor = torch.randn(self.p, self.outputs, dtype=torch.float64, generator=draw)
        return gaussian.div_(self.outputs**0.5)

    @cached_property
    def solution(self) -> Tensor:
        """The frame that made the answers."""
        gaussian = draw_basis(len(self.complement), 0, self.seed + 1)[1][:, : self.p]
        point: Tensor = self.manifold().projx(gaussian)
        return point

    @cached_property
    def answers(self) -> Tensor:
        """Y (examples, outputs)."""
        return torch.tanh(self.inputs @ self.solution) @ self.second_layer

    @property
    def optimum(self) -> float:
        """Zero."""
        return 0.0

    def cost(self, x: Tensor) -> Tensor:
        """``mean (tanh(Xx)W − Y)²/2``, the mean over all entries."""
        answers = torch.tanh(self.inputs @ x) @ self.second_layer
        return (answers - self.answers).square().mean() / 2
