"""The pre-trained model without training: the reference that learns and forgets nothing."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from manifold_cl.continual.method import Method
from manifold_cl.continual.stage import Stage


@dataclass
class ZeroShot(Method):
    """No training at all; every row of its accuracy matrix is the pre-trained model's."""

    name = "zero_shot"
    trains = False

    def begin_task(self, model: nn.Module, stage: Stage) -> None:
        """Nothing to prepare."""

    def make_optimizer(self, model: nn.Module) -> Optimizer:
        """Refuse.

        Raises:
            TypeError: always; the runner makes no optimizer for a method that does not train.
        """
        raise TypeError("zero_shot does not train")

    def end_task(self, model: nn.Module, stage: Stage) -> None:
        """Nothing to merge."""
