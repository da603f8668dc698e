"""The factory that transformers' ``Trainer`` calls for an optimizer that must see the whole model."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from manifold_cl.optim.riemannian import RiemannianStep, param_groups, riemannian


class TrainerOptimizer:
    """For ``Trainer(optimizer_cls_and_kwargs=(TrainerOptimizer, {"lr": 1e-3}))``.

    Trainer makes an instance and calls it with the model, wrapped and placed as it will train, and the keywords. Its
    own groups would put frames and magnitudes under weight decay; these come from `param_groups`.
    """

    def __call__(
        self,
        model: nn.Module,
        *,
        lr: float,
        scale_lr: float | None = None,
        weight_decay: float = 0.0,
        optimizer: type[Optimizer] = torch.optim.AdamW,
        **options: Any,
    ) -> Optimizer:
        """A Riemannian optimizer over the model's points, magnitudes and other trainable parameters.

        Raises:
            ValueError: for a model without trainable parameters.
        """
        groups = param_groups(model, lr=lr, scale_lr=scale_lr, weight_decay=weight_decay)
        make = optimizer if issubclass(optimizer, RiemannianStep) else riemannian(cast(Any, optimizer))
        made: Optimizer = make(groups, lr=lr, **options)
        return made
