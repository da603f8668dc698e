"""StelLA, task after task: frames on plain Stiefel manifolds, a free core, merged and restarted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from torch import nn
from torch.optim import Optimizer

from manifold_cl.adapters import eblora_adapters, inject_adapters
from manifold_cl.adapters.base_layers import sides
from manifold_cl.adapters.layers import target_linears
from manifold_cl.continual.methods.bases import AdapterMethod
from manifold_cl.continual.stage import Stage
from manifold_cl.continual.validation import one_of, option, unless_none
from manifold_cl.optim import RiemannianAdamW, param_groups
from manifold_cl.rules import validate_number, validate_whole


@dataclass
class StellaMerge(AdapterMethod):
    """``W + (alpha / r) U S Vᵀ`` with random orthonormal U, V and S = I at the start of every task.

    The start is not compensated, as in the original: each task begins with a random update of that size.

    Source: li2025stella; docs/method.md, "The other methods".

    Args:
        core: S, ``"diagonal"`` or ``"full"``.
        initial_scale: S at the start over the identity; 1 in the original.
        hidden: c in the rescaling of steps by sqrt(c / n), the width of the model's hidden states; by default the
            most frequent number of inputs among the target layers.
    """

    name = "stella_merge"

    lr: float = 1e-2
    core: Literal["diagonal", "full"] = option("diagonal", one_of("diagonal", "full"))
    initial_scale: float = option(0.05, validate_number)
    hidden: int | None = option(None, unless_none(validate_whole))
    _width: int = field(default=0, init=False, repr=False)

    def begin_task(self, model: nn.Module, stage: Stage) -> None:
        """Inject fresh adapters."""
        widths = [sides(layer)[1] for layer in target_linears(model, stage.targets).values()]
        self._width = self.hidden or Counter(widths).most_common(1)[0][0]
        options: dict[str, Any] = {"core": self.core, "initial_scale": self.initial_scale, "alpha": self.alpha}
        draw = stage.generator("adapters")
        inject_adapters(model, stage.targets, eblora_adapters(rank=self.rank, generator=draw, **options))

    def make_optimizer(self, model: nn.Module) -> Optimizer:
        """AdamW, canonical gradients before it, displacements over sqrt(n / c) and projected after it."""
        rule = {"metric_pre": "canonical", "tangent_post": "orthogonal", "step_scale": "width"}
        options: dict[str, Any] = {"lr": self.lr, "weight_decay": 0.0, "reference_width": self._width, **rule}
        return cast(Optimizer, RiemannianAdamW(param_groups(model, lr=self.lr), **options))
