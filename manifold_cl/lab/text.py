"""One task of the stream text-three as a problem; needs the streams' encoder and texts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from manifold_cl.lab.meter import Limits
from manifold_cl.lab.problems import Problem
from manifold_cl.lab.registry import STEPS
from manifold_cl.lab.runs import Contestant, run
from manifold_cl.lab.steps import Setting

LOGIT_SCALE = 20.0
"""The factor from similarities to logits, as in the stream's own loss."""
SEARCH_STARTS = 2
SEARCH_EVALUATIONS = 1500
"""Per start; trust regions end at gradients of 1e-8 or so after 1000."""


@dataclass(frozen=True)
class TextTask(Problem):
    """Cross-entropy of ``20 (Zx)(Lx)ᵀ``: texts and labels of a task of text-three, compared in a frame's coordinates.

    Z holds the frozen encoder's vectors of the second task's training texts, L those of its labels. F holds the first
    principal directions of the first task's texts. The optimum is the least cost of trust regions from several starts:
    no proof, so a contestant may find a lower one.
    """

    name: ClassVar[str] = "text_task"
    known_by: ClassVar[str] = "trust regions"
    p: int = 8
    k: int = 32
    examples: int = 400

    @cached_property
    def _vectors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Vectors of the earlier task's texts, of this task's texts and labels, and the targets."""
        from manifold_cl.streams import load_encoder, open_stream

        encoder = load_encoder()
        tasks: Any = open_stream("text-three", examples=self.examples).tasks  # of streams' TextTask
        earlier, task = tasks[:2]
        with torch.no_grad():
            pairs = [(part.texts, part.targets) for part in (earlier.part("train"), task.part("train"))]
            old, new = (encoder(list(texts), task.max_tokens).double() for texts, _ in pairs)
            labels = encoder(list(task.labels), task.max_tokens).double()
        return old, new, labels, torch.tensor(pairs[1][1])

    @cached_property
    def complement(self) -> Tensor:
        """The first principal directions of the earlier task's texts."""
        old = self._vectors[0]
        directions: Tensor = torch.linalg.svd(old, full_matrices=False).Vh
        return directions[: self.k].mT.contiguous()

    @cached_property
    def optimum(self) -> float:
        """The least cost of trust regions from several starts."""
        solver, same, costs = Contestant("reference", STEPS["trust_regions"]), _SameCost(self, self.p), []
        for seed in range(100, 100 + SEARCH_STARTS):
            start = self.start(seed)
            ended = run(solver, same, start, Setting(), Limits(SEARCH_EVALUATIONS, gap=0.0))
            costs.append(ended.last_gap * float(self.cost(start)))
        return min(costs)

    def cost(self, x: Tensor) -> Tensor:
        """The mean cross-entropy over texts."""
        _, texts, labels, targets = self._vectors
        return torch.nn.functional.cross_entropy(LOGIT_SCALE * (texts @ x) @ (labels @ x).mT, targets)


@dataclass(frozen=True)
class _SameCost(Problem):
    """The cost of a problem with 0 in place of its optimum, so that a gap times the first cost is a cost."""

    of: Problem
    p: int
    name: ClassVar[str] = "same_cost"
    known_by: ClassVar[str] = "nothing"

    @property
    def complement(self) -> Tensor:
        """That of the problem."""
        return self.of.complement

    @property
    def optimum(self) -> float:
        """Zero."""
        return 0.0

    def cost(self, x: Tensor) -> Tensor:
        """That of the problem."""
        return self.of.cost(x)
